"""CompVis's attention module and its descendants: Stable Diffusion 1.x and 2.x, SGM (SDXL), ComfyUI, A1111, Forge."""

from typing import Any

from torch import nn

from ksag.attention.families.family import Attention, Family, Seen, from_tokens, has_modules, ran
from ksag.attention.families.openai import MIDDLE


def _is_cross_attention(layer: Any, path: str, parent: nn.Module) -> bool:
    # Nothing in a CrossAttention says whether it reads the image or the text, but its block does: it calls the one attn1 and the
    # other attn2, and has a flag where attn1 reads the text. A time_stack attends from frame to frame.
    return (
        getattr(layer.to_q, "in_features", None) != getattr(layer.to_k, "in_features", None)
        or getattr(parent, "disable_self_attn", False)
        or path.rpartition(".")[2] == "attn2"
        or "time_stack" in path.split(".")
    )


def _is_attention(layer: Any, path: str, parent: nn.Module) -> bool:
    has_parts = has_modules(layer, "to_q", "to_k", "to_v", "to_out") and isinstance(getattr(layer, "heads", None), int)
    return has_parts and not hasattr(layer, "processor") and not _is_cross_attention(layer, path, parent)


def _read(layer: Any, seen: Seen) -> Attention | None:
    if not ran(seen, "to_q", "to_k", "to_v"):
        return None
    return from_tokens(seen["to_q"][0], seen["to_k"][0], seen["to_v"][0], layer.heads, getattr(layer, "scale", None))


CROSS_ATTENTION = Family(
    "CompVis CrossAttention",
    matches=_is_attention,
    middle=MIDDLE,
    read=_read,
    projection="to_out.0",
    outputs=("to_q", "to_k", "to_v"),
)

FAMILIES = (CROSS_ATTENTION,)
