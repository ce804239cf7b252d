"""Attention that ksag cannot guide by, and why."""

import re
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from ksag.attention.families.family import Family, has_modules

BY_NAME = {
    "BriaFibo2Attention": "the order of its image and text tokens depends on the batch",
    "Ideogram4Attention": "only a table that the model is given says which tokens are the image's",
    "MochiAttention": "it attends in several calls, each for one sample",
    "QwenImage21Attention": "it attends in several calls, each for some of the tokens",
}
"""The class of the layer → why."""


def _is_linear(layer: Any) -> bool:
    # Sana's processors, lucidrains' modules
    return bool(re.search("Linear.*Att", f"{type(layer).__name__} {type(getattr(layer, 'processor', None)).__name__}"))


def _is_differential(layer: Any) -> bool:
    return has_modules(layer, "to_out") and bool(getattr(layer, "differential", False))


def _is_local(layer: Any) -> bool:
    # HDiT's upper levels
    return has_modules(layer, "qkv_proj", "out_proj") and (hasattr(layer, "kernel_size") or hasattr(layer, "window_size"))


def _is_torch(layer: Any) -> bool:
    return type(layer).__module__.startswith("torch.nn.")


def _mixes_sequences(layer: Any) -> bool:
    return hasattr(layer, "processor") and getattr(layer, "added_kv_proj_dim", None) is not None


def _attends_elsewhere(layer: Any) -> bool:
    # what the families leave out: attn2, a time_stack, attn1 where a flag makes it cross-attention
    return bool(getattr(layer, "is_cross_attention", False)) or (hasattr(layer, "to_q") and hasattr(layer, "heads"))


Reasons: TypeAlias = tuple[tuple[Callable[[Any], bool], str], ...]
ALWAYS: Reasons = (
    (_is_linear, "linear attention has no softmax, so that nothing says how much attention a token receives"),
    (_is_differential, "it subtracts one attention from another"),
)
OF_NO_FAMILY: Reasons = (
    (_is_local, "it attends within a neighbourhood or a window, and never relates all tokens to all"),
    (_is_torch, "its queries and keys cannot be read from outside"),
    (_mixes_sequences, "it attends to text and image in an order that ksag does not know"),
    (_attends_elsewhere, "it attends to the text, or from frame to frame"),
)


def refusal(layer: nn.Module, family: Family | None) -> str | None:
    """Why a layer is refused; None if its family, or its call of `F.scaled_dot_product_attention`, may read it."""
    reasons = ALWAYS if family else (*ALWAYS, *OF_NO_FAMILY)
    return BY_NAME.get(type(layer).__name__) or next((reason for matches, reason in reasons if matches(layer)), None)
