"""timm's Attention, in facebookresearch's DiT and what is built like it."""

from typing import Any

from torch import nn

from ksag.attention.families.family import Attention, Family, Seen, from_tokens, has_modules, stack


def _is_attention(layer: Any, path: str, parent: nn.Module) -> bool:
    has_parts = has_modules(layer, "q_norm", "k_norm", "proj") and hasattr(layer, "num_heads")
    return has_parts and isinstance(getattr(layer, "qkv", None), nn.Linear)


def _read(layer: Any, seen: Seen) -> Attention | None:
    if "qkv" not in seen:
        return None
    q, k, v = seen["qkv"][0].chunk(3, dim=-1)
    # PixArt's own blocks, which derive from timm's, leave the norms out
    return from_tokens(seen.get("q_norm", [q])[0], seen.get("k_norm", [k])[0], v, layer.num_heads, layer.scale)


ATTENTION = Family(
    "timm Attention",
    matches=_is_attention,
    middle=stack("blocks"),
    read=_read,
    projection="proj",
    outputs=("qkv", "q_norm", "k_norm"),
    heads="num_heads",
    dropout="attn_drop",
    patch=("x_embedder.patch_size",),
)

FAMILIES = (ATTENTION,)
