"""One small reader per way of writing self-attention: how to know a layer, and how to read its queries and keys.

A new way of writing attention is one more entry in `FAMILIES`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn


class Family(NamedTuple):
    """How to know a self-attention layer, which of its submodules to hook, and how to read their outputs."""

    name: str
    heads: str
    sources: tuple[str, ...]
    matches: Callable[[nn.Module, str], bool]
    read: Callable[..., tuple[Tensor, Tensor, float]]


def _is_fused_conv(layer: nn.Module, path: str) -> bool:
    return isinstance(getattr(layer, "qkv_proj", None), nn.Conv2d) and hasattr(layer, "n_head")


def _read_fused_conv(layer: Any, qkv: Tensor) -> tuple[Tensor, Tensor, float]:
    q, k, _ = rearrange(qkv, "b (three heads d) h w -> three b heads (h w) d", three=3, heads=layer.n_head)
    return q, k, q.shape[-1] ** -0.5


def _is_to_q_to_k(layer: nn.Module, path: str) -> bool:
    # Nothing in a CompVis CrossAttention says whether it reads the image or the text, but its transformer block
    # calls the one attn1 and the other attn2; diffusers says it outright, and its added keys are text as well.
    to_q, to_k = getattr(layer, "to_q", None), getattr(layer, "to_k", None)
    return (
        isinstance(to_q, nn.Module)
        and isinstance(to_k, nn.Module)
        and hasattr(layer, "heads")
        and getattr(to_q, "in_features", None) == getattr(to_k, "in_features", None)
        and not getattr(layer, "is_cross_attention", False)
        and getattr(layer, "added_kv_proj_dim", None) is None
        and path.rpartition(".")[2] != "attn2"
    )


def _read_to_q_to_k(layer: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
    q = rearrange(q, "b n (heads d) -> b heads n d", heads=layer.heads)
    k = rearrange(k, "b n (heads d) -> b heads n d", heads=layer.heads)
    return q, k, getattr(layer, "scale", q.shape[-1] ** -0.5)


FAMILIES = (
    Family("k-diffusion SelfAttention2d", "n_head", ("qkv_proj",), _is_fused_conv, _read_fused_conv),
    Family("CompVis / SGM / diffusers", "heads", ("to_q", "to_k"), _is_to_q_to_k, _read_to_q_to_k),
)


def family_of(layer: nn.Module, path: str) -> Family | None:
    return next((family for family in FAMILIES if family.matches(layer, path)), None)
