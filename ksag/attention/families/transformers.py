"""diffusers' transformers, in which image and text attend together or whose queries and keys are rotated.

Stable Diffusion 3 and AuraFlow do not rotate, so that the outputs of their submodules are read. All others are read, and edited, at
their call of `F.scaled_dot_product_attention`, which is given both sequences, normalised and rotated.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ksag.attention.families.diffusers import MIDDLE, is_in_refiner, projected
from ksag.attention.families.family import Attention, Family, Seen, Tokens

# The classes of the blocks that hold such a layer, by the order of its tokens
TEXT_FIRST = (
    "BriaFiboSingleTransformerBlock", "BriaFiboTransformerBlock", "BriaSingleTransformerBlock", "BriaTransformerBlock",
    "ChromaSingleTransformerBlock", "ChromaTransformerBlock", "CogView3PlusTransformerBlock", "CogView4TransformerBlock",
    "Flux2SingleTransformerBlock", "Flux2TransformerBlock", "Flux3SingleTransformerBlock", "FluxSingleTransformerBlock",
    "FluxTransformerBlock", "GlmImageTransformerBlock", "Krea2TransformerBlock", "LongCatImageSingleTransformerBlock",
    "LongCatImageTransformerBlock", "OmniGenBlock", "OvisImageSingleTransformerBlock", "OvisImageTransformerBlock", "PRXBlock",
    "QwenImageTransformerBlock",
)  # fmt: skip
IMAGE_FIRST = (
    "ErnieImageSharedAdaLNBlock", "HiDreamImageSingleTransformerBlock", "HiDreamImageTransformerBlock",
    "HunyuanImageSingleTransformerBlock", "HunyuanImageTransformerBlock", "HunyuanVideoSingleTransformerBlock",
    "HunyuanVideoTransformerBlock", "NucleusMoEImageTransformerBlock", "ZImageTransformerBlock",
)  # fmt: skip
IMAGE_ALONE = (
    "CosmosTransformerBlock", "HunyuanDiTBlock", "Kandinsky5TransformerDecoderBlock", "LTXVideoTransformerBlock",
    "LuminaNextDiTBlock", "SkyReelsV2TransformerBlock", "WanTransformerBlock",
)  # fmt: skip

PATCH = ("config.patch_size", "patch_size")
"""Of diffusers' models, and of modules around those that are given patches."""
PACKED = ("hidden_states", "image_cond_hidden_states")
NAMES = ("attn", "attn1", "attention", "self_attn", "self_attention")
"""What the blocks call their self-attention."""


def _is_in(*blocks: str) -> Callable[[Any, str, nn.Module], bool]:
    def matches(layer: Any, path: str, parent: nn.Module) -> bool:
        return type(parent).__name__ in blocks and path.rpartition(".")[2] in NAMES and not is_in_refiner(path)

    return matches


def _at_its_call(name: str, tokens: Tokens, blocks: Sequence[str], ragged: bool = False) -> Family:
    return Family(
        f"diffusers {name}", matches=_is_in(*blocks), middle=MIDDLE, tokens=tokens, ragged=ragged, patch=PATCH, packed=PACKED
    )


# Without rotation: Stable Diffusion 3 and AuraFlow

IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def _read(layer: Any, seen: Seen, tokens: Literal["first", "last"]) -> Attention | None:
    """Both sequences, the image's first or last; a layer that is given one sequence has no text of its own."""
    image, text = projected(seen, IMAGE, "to_qkv"), projected(seen, TEXT, "to_added_qkv")
    if image is None:
        return None

    def by_head(x: Tensor, norm: str) -> Tensor:
        if norm not in seen:
            return rearrange(x, "b tokens (heads d) -> b heads tokens d", heads=layer.heads)
        normalised: Tensor = seen[norm][0]
        return normalised.transpose(1, 2) if tokens == "last" else normalised  # AuraFlow normalises (b, tokens, heads, d)

    streams = [[by_head(x, norm) for x, norm in zip(image, ("norm_q", "norm_k", ""), strict=True)]]
    if text is not None:
        streams.append([by_head(x, norm) for x, norm in zip(text, ("norm_added_q", "norm_added_k", ""), strict=True)])
    q, k, v = (torch.cat(parts, dim=2) for parts in zip(*(streams if tokens == "first" else streams[::-1]), strict=True))
    return Attention(q, k, v, layer.scale, tokens=tokens)


STABLE_DIFFUSION_3 = Family(
    "diffusers Stable Diffusion 3",
    matches=_is_in("JointTransformerBlock"),
    middle=MIDDLE,
    read=partial(_read, tokens="first"),
    projection="to_out.0",
    outputs=(*IMAGE, *TEXT, "to_qkv", "to_added_qkv", *NORMS),
    patch=PATCH,
    packed=PACKED,
)
AURA_FLOW = replace(
    STABLE_DIFFUSION_3,
    name="diffusers AuraFlow",
    matches=_is_in("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
    read=partial(_read, tokens="last"),
)

FAMILIES = (
    STABLE_DIFFUSION_3,
    AURA_FLOW,
    _at_its_call("text before image", "last", TEXT_FIRST),
    _at_its_call("Lumina 2", "last", ("Lumina2TransformerBlock",), ragged=True),
    _at_its_call("image before text", "first", IMAGE_FIRST),
    _at_its_call("rotated", "all", IMAGE_ALONE),
)
