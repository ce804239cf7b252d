"""lucidrains: denoising_diffusion_pytorch's Unet and KarrasUnet, and its Unet for classifier-free guidance."""

from dataclasses import replace
from typing import Any

from torch import nn

from ksag.attention.families.family import Attention, Family, Seen, from_image, has_modules, unet

MIDDLE = unet(down="downs", middle="(?:mid_attn|mids)", up="ups")


# Attention of Unet and KarrasUnet: a module attends, and is given the queries and keys as they are applied, memory first


def _is_attention(layer: Any, path: str, parent: nn.Module) -> bool:
    # Its LinearAttention has to_qkv and mem_kv as well, but no attend: it takes no softmax of q kᵀ
    return has_modules(layer, "to_qkv", "attend", "to_out") and hasattr(layer, "mem_kv") and hasattr(layer, "heads")


def _read(layer: Any, seen: Seen) -> Attention | None:
    if "attend" not in seen:
        return None
    q, k, v = seen["attend"][0]
    d, scale = q.shape[-1], layer.attend.scale
    if scale is None:
        scale = d**-0.5
    elif layer.attend.flash:  # it scales q by scale / d, and scaled_dot_product_attention then does as usual
        scale = scale / d * d**-0.5
    return Attention(q, k, v, scale, tokens="last")


ATTENTION = Family(
    "lucidrains Attention",
    matches=_is_attention,
    middle=MIDDLE,
    read=_read,
    projection="to_out",
    merged="b heads (h w) d -> b (heads d) h w",
    inputs=("attend",),
    dropout="attend.attn_dropout",
)


# Attention of classifier_free_guidance.Unet. Its LinearAttention has a norm behind the projection


def _is_guided(layer: Any, path: str, parent: nn.Module) -> bool:
    has_parts = has_modules(layer, "to_qkv") and hasattr(layer, "heads") and hasattr(layer, "scale")
    return has_parts and isinstance(getattr(layer, "to_out", None), nn.Conv2d) and not hasattr(layer, "attend")


def _read_guided(layer: Any, seen: Seen) -> Attention | None:
    if "to_qkv" not in seen:
        return None
    return replace(from_image(seen["to_qkv"][0], layer.heads, "three heads d"), scale=layer.scale)


GUIDED = Family(
    "lucidrains Attention (classifier-free guidance)",
    matches=_is_guided,
    middle=MIDDLE,
    read=_read_guided,
    projection="to_out",
    merged="b heads (h w) d -> b (heads d) h w",
    outputs=("to_qkv",),
)

FAMILIES = (ATTENTION, GUIDED)
