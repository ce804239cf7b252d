"""diffusers' transformers, in which image and text attend together or whose queries and keys are rotated.

Stable Diffusion 3 and AuraFlow do not rotate, so that the outputs of their submodules are read. All others are read, and edited, at
their call of `F.scaled_dot_product_attention`, which is given both sequences, normalised and rotated.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ksag.attention.families.diffusers import MIDDLE, is_in_refiner, projected
from ksag.attention.families.family import Attention, Family, Seen, Tokens

TOKENS: dict[str, Tokens] = {
    # text, then image
    "BriaFiboSingleTransformerBlock": "last",
    "BriaFiboTransformerBlock": "last",
    "BriaSingleTransformerBlock": "last",
    "BriaTransformerBlock": "last",
    "ChromaSingleTransformerBlock": "last",
    "ChromaTransformerBlock": "last",
    "CogView3PlusTransformerBlock": "last",
    "CogView4TransformerBlock": "last",
    "Flux2SingleTransformerBlock": "last",
    "Flux2TransformerBlock": "last",
    "Flux3SingleTransformerBlock": "last",
    "FluxSingleTransformerBlock": "last",
    "FluxTransformerBlock": "last",
    "GlmImageTransformerBlock": "last",
    "Krea2TransformerBlock": "last",
    "LongCatImageSingleTransformerBlock": "last",
    "LongCatImageTransformerBlock": "last",
    "Lumina2TransformerBlock": "last",
    "OmniGenBlock": "last",
    "OvisImageSingleTransformerBlock": "last",
    "OvisImageTransformerBlock": "last",
    "PRXBlock": "last",
    "QwenImageTransformerBlock": "last",
    # image, then text
    "ErnieImageSharedAdaLNBlock": "first",
    "HiDreamImageSingleTransformerBlock": "first",
    "HiDreamImageTransformerBlock": "first",
    "HunyuanImageSingleTransformerBlock": "first",
    "HunyuanImageTransformerBlock": "first",
    "HunyuanVideoSingleTransformerBlock": "first",
    "HunyuanVideoTransformerBlock": "first",
    "NucleusMoEImageTransformerBlock": "first",
    "ZImageTransformerBlock": "first",
    # image alone
    "CosmosTransformerBlock": "all",
    "HunyuanDiTBlock": "all",
    "Kandinsky5TransformerDecoderBlock": "all",
    "LTXVideoTransformerBlock": "all",
    "LuminaNextDiTBlock": "all",
    "SkyReelsV2TransformerBlock": "all",
    "WanTransformerBlock": "all",
}
"""The class of the block that holds a layer → which of the tokens in its attention are the image's."""

PATCH = ("config.patch_size", "patch_size")
"""Of diffusers' models, and of modules around those that are given patches."""
PACKED = ("hidden_states", "image_cond_hidden_states")
RAGGED = ("Lumina2TransformerBlock",)
NAMES = ("attn", "attn1", "attention", "self_attn", "self_attention")
"""What the blocks call their self-attention."""


def _is_in(tokens: Tokens, ragged: bool = False) -> Callable[[Any, str, nn.Module], bool]:
    def matches(layer: Any, path: str, parent: nn.Module) -> bool:
        block, name = type(parent).__name__, path.rpartition(".")[2]
        is_one = name in NAMES and TOKENS.get(block) == tokens and (block in RAGGED) == ragged
        return is_one and not is_in_refiner(path)

    return matches


def _at_its_call(name: str, tokens: Tokens, ragged: bool = False) -> Family:
    return Family(
        f"diffusers {name}",
        matches=_is_in(tokens, ragged),
        middle=MIDDLE,
        tokens=tokens,
        ragged=ragged,
        patch=PATCH,
        packed=PACKED,
    )


# Without rotation: Stable Diffusion 3 and AuraFlow

IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def _is_in_block(*blocks: str) -> Callable[[Any, str, nn.Module], bool]:
    return lambda layer, path, parent: type(parent).__name__ in blocks and path.rpartition(".")[2] == "attn"


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
    matches=_is_in_block("JointTransformerBlock"),
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
    matches=_is_in_block("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
    read=partial(_read, tokens="last"),
)

FAMILIES = (
    STABLE_DIFFUSION_3,
    AURA_FLOW,
    _at_its_call("text before image", "last"),
    _at_its_call("Lumina 2", "last", ragged=True),
    _at_its_call("image before text", "first"),
    _at_its_call("rotated", "all"),
)
