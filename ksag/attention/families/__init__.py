"""One file per library, one block per way of writing self-attention: `Family` says what a block holds.

A way of writing attention that no block covers can be added, from anywhere: `FAMILIES.insert(0, mine)`. What is not in
any block can still be read once it is named, if it calls `F.scaled_dot_product_attention`: `ksag.attention.families.sdpa`.
"""

from torch import nn

from ksag.attention.families import compvis, diffusers, k_diffusion, lucidrains, nvlabs, openai, stable_audio, timm, transformers
from ksag.attention.families.family import Attention, Family, Seen
from ksag.attention.families.refused import BY_NAME

FAMILIES: list[Family] = [
    *k_diffusion.FAMILIES,
    *transformers.FAMILIES,
    *diffusers.FAMILIES,
    *compvis.FAMILIES,
    *openai.FAMILIES,
    *nvlabs.FAMILIES,
    *lucidrains.FAMILIES,
    *timm.FAMILIES,
    *stable_audio.FAMILIES,
]
"""The first one that fits a layer is the one that reads it."""

__all__ = ["FAMILIES", "Attention", "Family", "Seen", "family_of"]


def family_of(layer: nn.Module, path: str, parent: nn.Module) -> Family | None:
    """The family that a layer belongs to, the first that matches; None if there is none.

    Args:
        layer: any module.
        path: where it is in its model.
        parent: the module that holds it.

    >>> from diffusers.models.attention_processor import Attention
    >>> family_of(Attention(32), "mid_block.attn1", nn.Module()).name
    'diffusers Attention'
    """
    if type(layer).__name__ in BY_NAME:
        return None
    return next((family for family in FAMILIES if family.matches(layer, path, parent)), None)
