"""stable-audio-tools: the transformer of Stable Audio, whose conditioning and memory tokens come before the audio's."""

from typing import Any

from torch import nn

from ksag.attention.families.family import Family, has_modules, stack


def _is_attention(layer: Any, path: str, parent: nn.Module) -> bool:
    has_parts = has_modules(layer, "to_qkv", "to_out") and hasattr(layer, "num_heads") and hasattr(layer, "kv_heads")
    return has_parts and not getattr(layer, "differential", False)


ATTENTION = Family(
    "stable-audio-tools Attention",
    matches=_is_attention,
    middle=stack("layers"),
    tokens="last",
    heads="num_heads",
    patch=("patch_size",),
)

FAMILIES = (ATTENTION,)
