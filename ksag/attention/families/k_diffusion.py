"""crowsonkb: k-diffusion's UNet and its two transformers, v-diffusion's UNets."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ksag.attention.families.family import Attention, Family, Place, Seen, from_tokens, has_modules, reads_image, stack, unet

# SelfAttention2d, in k-diffusion's ImageDenoiserModelV1 and in v-diffusion


def _is_self_attention_2d(layer: Any, path: str, parent: nn.Module) -> bool:
    return isinstance(getattr(layer, "qkv_proj", None), nn.Conv2d) and hasattr(layer, "n_head")


_levels = unet(down="d_blocks", up="u_blocks")


def _levels_or_nest(model: nn.Module, paths: Sequence[str]) -> list[Place]:
    """k-diffusion's UNet has its levels in a row. v-diffusion's has each level inside the one above, under the name main."""
    if places := _levels(model, paths):
        return places
    nested = [path for path in paths if "main" in path.split(".")]
    return [Place(max(nested, key=lambda path: path.split(".").count("main")), whole=True)] if nested else []


SELF_ATTENTION_2D = Family(
    "k-diffusion SelfAttention2d",
    matches=_is_self_attention_2d,
    middle=_levels_or_nest,
    read=reads_image("qkv_proj", "n_head", "three heads d"),
    projection="out_proj",
    merged="b heads (h w) d -> b (heads d) h w",
    outputs=("qkv_proj",),
    heads="n_head",
    dropout="dropout",
    drops_in_eval=True,
)


# SelfAttentionBlock in ImageTransformerDenoiserModelV1: one module rotates first q, then k


def _is_v1_transformer(layer: Any, path: str, parent: nn.Module) -> bool:
    return has_modules(layer, "qkv_proj", "qk_norm", "pos_emb", "out_proj") and hasattr(layer, "n_heads")


def _read_v1_transformer(layer: Any, seen: Seen) -> Attention | None:
    if "qkv_proj" not in seen or len(seen.get("pos_emb", ())) != 2:
        return None
    _, _, v = seen["qkv_proj"][0].chunk(3, dim=-1)
    q, k = seen["pos_emb"]
    return from_tokens(q, k, v, layer.n_heads)


V1_TRANSFORMER = Family(
    "k-diffusion transformer v1",
    matches=_is_v1_transformer,
    middle=stack("blocks"),
    read=_read_v1_transformer,
    projection="out_proj",
    outputs=("qkv_proj", "pos_emb"),
    heads="n_heads",
    dropout="dropout",
    patch=("patch_in.patch_size",),
)


# Global SelfAttentionBlock in ImageTransformerDenoiserModelV2 (HDiT): a module returns the angles, and the layer rotates


def _is_v2_transformer(layer: Any, path: str, parent: nn.Module) -> bool:
    # Attention within a neighbourhood or a shifted window has the same parts, and never relates all tokens to all
    local = hasattr(layer, "kernel_size") or hasattr(layer, "window_size")
    scaled = isinstance(getattr(layer, "scale", None), Tensor) and hasattr(layer, "n_heads")
    return has_modules(layer, "qkv_proj", "pos_emb", "out_proj") and scaled and not local


def _read_v2_transformer(layer: Any, seen: Seen) -> Attention | None:
    if "qkv_proj" not in seen or "pos_emb" not in seen:
        return None
    qkv, theta = seen["qkv_proj"][0], seen["pos_emb"][0]
    q, k, v = rearrange(qkv, "b h w (three heads d) -> three b heads (h w) d", three=3, heads=layer.n_heads)
    theta = rearrange(theta, "... heads d -> heads (...) d").float()

    def cosine_scaled_and_rotated(x: Tensor) -> Tensor:
        x = x.float()
        x = x * (layer.scale.detach().float()[:, None, None].sqrt() * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt())
        d = theta.shape[-1]
        first, second, rest = x[..., :d], x[..., d : 2 * d], x[..., 2 * d :]
        cos, sin = theta.cos(), theta.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    return Attention(cosine_scaled_and_rotated(q), cosine_scaled_and_rotated(k), v, 1.0, grid=(qkv.shape[1], qkv.shape[2]))


V2_TRANSFORMER = Family(
    "k-diffusion transformer v2",
    matches=_is_v2_transformer,
    middle=unet(down="down_levels", middle="mid_level", up="up_levels"),
    read=_read_v2_transformer,
    projection="out_proj",
    merged="b heads (h w) d -> b h w (heads d)",
    outputs=("qkv_proj", "pos_emb"),
    heads="n_heads",
    dropout="dropout",
)

FAMILIES = (SELF_ATTENTION_2D, V1_TRANSFORMER, V2_TRANSFORMER)
