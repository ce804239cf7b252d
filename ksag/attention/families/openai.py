"""OpenAI: guided-diffusion (ADM), improved-diffusion, consistency models."""

import inspect
from typing import Any

import torch
from einops import rearrange
from torch import nn

from ksag.attention.families.family import Attention, Family, Seen, reads_image, unet


def _level(input_blocks: nn.Module, path: str) -> int:
    """How many of the blocks before it go down a level."""
    before = list(input_blocks.children())[: int(path.partition(".")[0])]
    return sum(any(type(module).__name__ == "Downsample" for module in block.modules()) for block in before)


MIDDLE = unet(down="input_blocks", middle="middle_block", up="output_blocks", level=_level)
"""As CompVis has it too."""


def _is_block(layer: Any, convolution: type) -> bool:
    attention, qkv = getattr(layer, "attention", None), getattr(layer, "qkv", None)
    if not isinstance(attention, nn.Module) or not isinstance(qkv, convolution) or not hasattr(layer, "num_heads"):
        return False
    # GLIDE's attention takes the text's keys besides
    return len(inspect.signature(attention.forward).parameters) == 1


# AttentionBlock. Only the class of the module that splits qkv says in which order the channels are


def _is_attention_block(layer: Any, path: str, parent: nn.Module) -> bool:
    return _is_block(layer, nn.Conv1d) and type(layer.attention).__name__ in ("QKVAttention", "QKVAttentionLegacy")


def _read(layer: Any, seen: Seen) -> Attention | None:
    if "qkv" not in seen:
        return None
    # improved-diffusion's QKVAttention is called with the heads split off already, and does not know them
    new = type(layer.attention).__name__ == "QKVAttention" and hasattr(layer.attention, "n_heads")
    order = "three heads d" if new else "heads three d"
    q, k, v = rearrange(seen["qkv"][0], f"b ({order}) tokens -> three b heads tokens d", three=3, heads=layer.num_heads)
    return Attention(q, k, v, q.shape[-1] ** -0.5)


ATTENTION_BLOCK = Family(
    "OpenAI AttentionBlock",
    matches=_is_attention_block,
    middle=MIDDLE,
    read=_read,
    projection="proj_out",
    merged="b heads tokens d -> b (heads d) tokens",
    outputs=("qkv",),
    heads="num_heads",
)


# AttentionBlock of consistency models. Its QKVAttentionLegacy has the new order, and attends in half precision


def _is_consistency_model(layer: Any, path: str, parent: nn.Module) -> bool:
    names = ("QKVAttentionLegacy", "QKVFlashAttention")
    return _is_block(layer, nn.Conv2d) and type(layer.attention).__name__ in names


CONSISTENCY_MODEL = Family(
    "OpenAI AttentionBlock (consistency models)",
    matches=_is_consistency_model,
    middle=MIDDLE,
    read=reads_image("qkv", "num_heads", "three heads d"),
    projection="proj_out",
    merged="b heads (h w) d -> b (heads d) h w",
    outputs=("qkv",),
    heads="num_heads",
    computes_in=torch.float16,
)

FAMILIES = (ATTENTION_BLOCK, CONSISTENCY_MODEL)
