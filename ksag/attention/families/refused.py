"""Attention that ksag cannot guide by, and why."""

import re
from typing import Any

from ksag.attention.families.family import Family, has_modules

BY_NAME = {
    "BriaFibo2Attention": "the order of its image and text tokens depends on the batch",
    "Ideogram4Attention": "only a table that the model is given says which tokens are the image's",
    "MochiAttention": "it attends in several calls, each for one sample",
    "QwenImage21Attention": "it attends in several calls, each for some of the tokens",
}
"""The class of the layer → why."""


def refusal(layer: Any, family: Family | None) -> str | None:
    """Why a layer is refused; None if its family, or its call of `F.scaled_dot_product_attention`, may read it."""
    name, processor = type(layer).__name__, type(getattr(layer, "processor", None)).__name__
    if name in BY_NAME:
        return BY_NAME[name]
    if re.search("Linear.*Att", f"{name} {processor}"):  # Sana's processors, lucidrains' modules
        return "linear attention has no softmax, so that nothing says how much attention a token receives"
    if has_modules(layer, "to_out") and getattr(layer, "differential", False):
        return "it subtracts one attention from another"
    if family is not None:
        return None
    if has_modules(layer, "qkv_proj", "out_proj") and (hasattr(layer, "kernel_size") or hasattr(layer, "window_size")):
        return "it attends within a neighbourhood or a window, and never relates all tokens to all"  # HDiT's upper levels
    if type(layer).__module__.startswith("torch.nn."):
        return "its queries and keys cannot be read from outside"
    if hasattr(layer, "processor") and getattr(layer, "added_kv_proj_dim", None) is not None:
        return "it attends to text and image in an order that ksag does not know"
    # what the families leave out: attn2, a time_stack, attn1 where a flag makes it cross-attention
    if getattr(layer, "is_cross_attention", False) or (hasattr(layer, "to_q") and hasattr(layer, "heads")):
        return "it attends to the text, or from frame to frame"
    return None
