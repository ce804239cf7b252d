"""diffusers' Attention: UNet2DModel and UNet2DConditionModel, and the transformers DiT and PixArt.

The transformers in which image and text attend together, or which rotate their queries, are in `transformers.py` beside this file.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ksag.attention.families.family import Attention, Family, Place, Seen, from_tokens, has_modules, ran, stack, unet

_unet = unet(down="down_blocks", middle="mid_block", up="up_blocks")
_stack = stack(r"\w*(?:blocks|layers)", inside=lambda module: _is_whole(module))


def MIDDLE(model: nn.Module, paths: Sequence[str]) -> list[Place]:
    """Of a UNet, whose blocks hold stacks as well, or else of a transformer."""
    return _unet(model, paths) or _stack(model, paths)


def _is_whole(module: Any) -> bool:
    """Whether a module is a transformer, and not part of a UNet or of an adapter."""
    return hasattr(module, "config") and not getattr(module, "is_input_continuous", False)


def projected(seen: Seen, names: Sequence[str], fused: str) -> list[Tensor] | None:
    """What the projections to q, k and v returned, or the one that they were fused into: both stay there, and one of them runs."""
    if fused in seen:
        return list(seen[fused][0].chunk(3, dim=-1))
    return [seen[name][0] for name in names] if ran(seen, *names) else None


def attention_backend(layer: nn.Module) -> str | None:
    """The backend that diffusers passes a layer's attention to; None if it has no choice."""
    processor: Any = getattr(layer, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return None
    backend, dispatch = processor._attention_backend, sys.modules.get("diffusers.models.attention_dispatch")
    if backend is None and dispatch is not None:
        backend, _ = dispatch._AttentionBackendRegistry.get_active_backend()
    return str(getattr(backend, "value", backend))


# Attention over the image alone


def _is_attention(layer: Any, path: str, parent: nn.Module) -> bool:
    has_parts = has_modules(layer, "to_q", "to_k", "to_v", "to_out") and hasattr(layer, "heads") and hasattr(layer, "processor")
    return has_parts and not (_is_joint(layer) or _is_cross_attention(layer) or is_in_refiner(path))


def is_in_refiner(path: str) -> bool:
    """Whether a layer's block refines the text, or the image before the text joins it."""
    return any("refiner" in name for name in path.split(".")[-3:])


def _is_joint(layer: Any) -> bool:
    return getattr(layer, "added_kv_proj_dim", None) is not None


def _is_cross_attention(layer: Any) -> bool:
    sizes = {getattr(to, "in_features", None) for to in (layer.to_q, layer.to_k)}  # None if something took a projection's place
    return bool(getattr(layer, "is_cross_attention", False)) or (None not in sizes and len(sizes) == 2)


def _read(layer: Any, seen: Seen) -> Attention | None:
    qkv = projected(seen, ("to_q", "to_k", "to_v"), "to_qkv")
    if qkv is None:
        return None
    q, k, v = qkv
    # norm_q and norm_k need not be used
    q, k = _by_head(seen.get("norm_q", [q])[0], q.shape[1]), _by_head(seen.get("norm_k", [k])[0], k.shape[1])
    return from_tokens(q, k, v, layer.heads, getattr(layer, "scale", None))


def _by_head(x: Tensor, tokens: int) -> Tensor:
    """Some processors normalise (b, heads, tokens, d), and some (b, tokens, heads, d)."""
    return x.transpose(1, 2) if x.ndim == 4 and x.shape[1] == tokens != x.shape[2] else x


ATTENTION = Family(
    "diffusers Attention",
    matches=_is_attention,
    middle=MIDDLE,
    read=_read,
    projection="to_out.0",
    outputs=("to_q", "to_k", "to_v", "to_qkv", "norm_q", "norm_k"),
    patch=("config.patch_size",),
)


# Kandinsky 2 and DeepFloyd IF: the text's keys come before the image's


def _has_added_keys(layer: Any, path: str, parent: nn.Module) -> bool:
    has_parts = has_modules(layer, "to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out") and hasattr(layer, "processor")
    return has_parts and not has_modules(layer, "add_q_proj")


def _read_added_keys(layer: Any, seen: Seen) -> Attention | None:
    if not ran(seen, "to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"):
        return None
    q, k, v, text_k, text_v = (seen[name][0] for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"))
    k, v = torch.cat([text_k, k], dim=1), torch.cat([text_v, v], dim=1)
    return replace(from_tokens(q, k, v, layer.heads, getattr(layer, "scale", None)), tokens="last")


ADDED_KEYS = Family(
    "diffusers Attention with added keys",
    matches=_has_added_keys,
    middle=MIDDLE,
    read=_read_added_keys,
    projection="to_out.0",
    outputs=("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"),
)

FAMILIES = (ATTENTION, ADDED_KEYS)
