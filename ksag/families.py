"""One small reader per way of writing self-attention: how to know a layer, and how to read its queries and keys.

A new way of writing attention is one more entry in `FAMILIES`. What none of them knows can still be read, once it is named,
if it calls `F.scaled_dot_product_attention`: `WatchSDPA`.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Outputs: TypeAlias = dict[str, list[Tensor]]
"""What the layer's sources returned, call by call, while the layer ran once; a source that did not run is missing."""


class Applied(NamedTuple):
    """The queries and keys that a layer applied: its attention is softmax(q kᵀ · scale)."""

    q: Tensor
    """(b, heads, tokens, dim)"""
    k: Tensor
    """(b, heads, memory + tokens, dim)"""
    scale: float
    """What the layer multiplies q kᵀ by, as a rule dim ** -0.5."""
    grid: tuple[int, int] | None = None
    """(h', w') of the tokens; None where the layer sees a sequence, whose grid only the modules around it know."""
    memory: int = 0
    """How many keys, the first ones, are no tokens of the image."""


class Family(NamedTuple):
    """How to know a self-attention layer, which of its submodules to hook, and how to read their outputs."""

    name: str
    """What `ksag.list_attention` shows."""
    heads: str
    """The layer's attribute that holds its number of heads."""
    sources: tuple[str, ...]
    """Names of submodules; a layer need not have, nor run, all of them."""
    matches: Callable[[nn.Module, str], bool]
    """Whether a module at a path is such a layer."""
    read: Callable[[Any, Outputs], Applied | None]
    """The layer and its sources' outputs → what it applied; None if the sources that it needs did not run."""


def _has_modules(layer: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(layer, name, None), nn.Module) for name in names)


def _read_spatial(layer: Any, qkv: Tensor, heads: int, order: str) -> Applied:
    """qkv (b, three heads d, h, w), its channels in the given order."""
    q, k, _ = rearrange(qkv, f"b ({order}) h w -> three b heads (h w) d", three=3, heads=heads)
    return Applied(q, k, q.shape[-1] ** -0.5, grid=(qkv.shape[2], qkv.shape[3]))


# k-diffusion: ImageDenoiserModelV1


def _is_self_attention_2d(layer: nn.Module, path: str) -> bool:
    return isinstance(getattr(layer, "qkv_proj", None), nn.Conv2d) and hasattr(layer, "n_head")


def _read_self_attention_2d(layer: Any, outputs: Outputs) -> Applied | None:
    return _read_spatial(layer, outputs["qkv_proj"][0], layer.n_head, "three heads d") if "qkv_proj" in outputs else None


# k-diffusion: ImageTransformerDenoiserModelV1 rotates q and then k in one module, V2 applies the angles that its module returns


def _is_v1_transformer(layer: nn.Module, path: str) -> bool:
    return _has_modules(layer, "qkv_proj", "qk_norm", "pos_emb") and hasattr(layer, "n_heads")


def _read_v1_transformer(layer: Any, outputs: Outputs) -> Applied | None:
    if len(outputs.get("pos_emb", ())) != 2:
        return None
    q, k = outputs["pos_emb"]
    return Applied(q, k, q.shape[-1] ** -0.5)


def _is_v2_transformer(layer: nn.Module, path: str) -> bool:
    # Attention within a neighbourhood or a shifted window has the same parts, and never relates all tokens to all.
    local = hasattr(layer, "kernel_size") or hasattr(layer, "window_size")
    scaled = isinstance(getattr(layer, "scale", None), Tensor) and hasattr(layer, "n_heads")
    return _has_modules(layer, "qkv_proj", "pos_emb") and scaled and not local


def _read_v2_transformer(layer: Any, outputs: Outputs) -> Applied | None:
    if "qkv_proj" not in outputs or "pos_emb" not in outputs:
        return None
    qkv, theta = outputs["qkv_proj"][0], outputs["pos_emb"][0]
    q, k, _ = rearrange(qkv, "b h w (three heads d) -> three b heads (h w) d", three=3, heads=layer.n_heads)
    theta = rearrange(theta, "tokens heads d -> heads tokens d").float()

    def cosine_scaled_and_rotated(x: Tensor) -> Tensor:
        x = x.float()
        x = x * (layer.scale.detach().float()[:, None, None].sqrt() * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt())
        d = theta.shape[-1]
        first, second, rest = x[..., :d], x[..., d : 2 * d], x[..., 2 * d :]
        cos, sin = theta.cos(), theta.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    return Applied(cosine_scaled_and_rotated(q), cosine_scaled_and_rotated(k), 1.0, grid=(qkv.shape[1], qkv.shape[2]))


# CompVis, SGM, diffusers


def is_cross_attention(layer: nn.Module, path: str) -> bool:
    """Whether the layer is of CompVis's or diffusers' form, but reads something besides the image.

    >>> from diffusers.models.attention_processor import Attention
    >>> is_cross_attention(Attention(32), "attn1"), is_cross_attention(Attention(32, cross_attention_dim=64), "attn2")
    (False, True)
    """
    # Nothing in a CompVis CrossAttention says whether it reads the image or the text, but its transformer block
    # calls the one attn1 and the other attn2; diffusers says it outright, and its added keys are text as well.
    to_q, to_k = getattr(layer, "to_q", None), getattr(layer, "to_k", None)
    return (isinstance(to_q, nn.Module) and hasattr(layer, "heads")) and (
        getattr(to_q, "in_features", None) != getattr(to_k, "in_features", None)
        or getattr(layer, "is_cross_attention", False)
        or getattr(layer, "added_kv_proj_dim", None) is not None
        or path.rpartition(".")[2] == "attn2"
    )


def _is_to_q_to_k(layer: nn.Module, path: str) -> bool:
    return _has_modules(layer, "to_q", "to_k") and hasattr(layer, "heads") and not is_cross_attention(layer, path)


def _read_to_q_to_k(layer: Any, outputs: Outputs) -> Applied | None:
    # diffusers keeps to_q and to_k beside its fused to_qkv, and norm_q and norm_k need not be used: what ran says which
    if "to_qkv" in outputs:
        q, k, _ = outputs["to_qkv"][0].chunk(3, dim=-1)
    elif "to_q" in outputs and "to_k" in outputs:
        q, k = outputs["to_q"][0], outputs["to_k"][0]
    else:
        return None
    q = outputs["norm_q"][0] if "norm_q" in outputs else q
    k = outputs["norm_k"][0] if "norm_k" in outputs else k
    q, k = (x if x.ndim == 4 else rearrange(x, "b n (heads d) -> b heads n d", heads=layer.heads) for x in (q, k))
    return Applied(q, k, getattr(layer, "scale", q.shape[-1] ** -0.5))


# OpenAI: guided-diffusion (ADM), improved-diffusion


def _is_openai(order: str, layer: nn.Module, path: str) -> bool:
    # Only the class of the module that splits qkv says in which order. GLIDE's QKVAttention has the other one: it is
    # left out because it takes the text's keys besides.
    attention = getattr(layer, "attention", None)
    if not isinstance(getattr(layer, "qkv", None), nn.Conv1d) or not hasattr(layer, "num_heads"):
        return False
    if not isinstance(attention, nn.Module) or len(inspect.signature(attention.forward).parameters) != 1:
        return False
    name, knows_heads = type(attention).__name__, hasattr(attention, "n_heads")
    if order == "three heads d":
        return name == "QKVAttention" and knows_heads
    # improved-diffusion's QKVAttention is called with the heads split off already
    return name == "QKVAttentionLegacy" or (name == "QKVAttention" and not knows_heads)


def _read_openai(order: str, layer: Any, outputs: Outputs) -> Applied | None:
    if "qkv" not in outputs:
        return None
    q, k, _ = rearrange(outputs["qkv"][0], f"b ({order}) n -> three b heads n d", three=3, heads=layer.num_heads)
    return Applied(q, k, q.shape[-1] ** -0.5)


# NVlabs: EDM, EDM2. The block may resample on the way to its attention, so that only qkv's own output knows the grid


def _is_edm(layer: nn.Module, path: str) -> bool:
    return _has_modules(layer, "conv0", "conv1", "affine", "norm2", "qkv", "proj") and bool(getattr(layer, "num_heads", 0))


def _read_edm(layer: Any, outputs: Outputs) -> Applied | None:
    return _read_spatial(layer, outputs["qkv"][0], layer.num_heads, "heads d three") if "qkv" in outputs else None


def _is_edm2(layer: nn.Module, path: str) -> bool:
    return _has_modules(layer, "attn_qkv", "attn_proj", "conv_res0") and bool(getattr(layer, "num_heads", 0))


def _read_edm2(layer: Any, outputs: Outputs) -> Applied | None:
    if "attn_qkv" not in outputs:
        return None
    q, k, scale, grid, _ = _read_spatial(layer, outputs["attn_qkv"][0], layer.num_heads, "heads d three")

    def pixel_normalised(x: Tensor) -> Tensor:
        # The root mean square over the head's channels becomes 1; EDM2 adds its epsilon to it, not to its square
        return x / (x.float().square().mean(-1, keepdim=True).sqrt() + 1e-4).to(x.dtype)

    return Applied(pixel_normalised(q), pixel_normalised(k), scale, grid)


# lucidrains: denoising_diffusion_pytorch


def _is_lucidrains(layer: nn.Module, path: str) -> bool:
    # Its LinearAttention has to_qkv and mem_kv as well, but no attend: it takes no softmax of q kᵀ
    return (
        _has_modules(layer, "to_qkv", "attend") and isinstance(getattr(layer, "mem_kv", None), Tensor) and hasattr(layer, "heads")
    )


def _read_lucidrains(layer: Any, outputs: Outputs) -> Applied | None:
    if "to_qkv" not in outputs:
        return None
    q, k, scale, grid, _ = _read_spatial(layer, outputs["to_qkv"][0], layer.heads, "three heads d")
    memory = repeat(layer.mem_kv.detach()[0], "heads n d -> b heads n d", b=k.shape[0])
    k = torch.cat((memory, k), dim=2)
    if hasattr(layer, "pixel_norm"):  # KarrasUnet's
        q, k = layer.pixel_norm(q), layer.pixel_norm(k)
    return Applied(q, k, scale if layer.attend.scale is None else layer.attend.scale, grid, memory=memory.shape[2])


FAMILIES = (
    Family("k-diffusion SelfAttention2d", "n_head", ("qkv_proj",), _is_self_attention_2d, _read_self_attention_2d),
    Family("k-diffusion transformer v1", "n_heads", ("pos_emb",), _is_v1_transformer, _read_v1_transformer),
    Family("k-diffusion transformer v2", "n_heads", ("qkv_proj", "pos_emb"), _is_v2_transformer, _read_v2_transformer),
    Family("CompVis / SGM / diffusers", "heads", ("to_q", "to_k", "to_qkv", "norm_q", "norm_k"), _is_to_q_to_k, _read_to_q_to_k),
    *(
        Family("OpenAI AttentionBlock", "num_heads", ("qkv",), partial(_is_openai, order), partial(_read_openai, order))
        for order in ("heads three d", "three heads d")
    ),
    Family("EDM UNetBlock", "num_heads", ("qkv",), _is_edm, _read_edm),
    Family("EDM2 Block", "num_heads", ("attn_qkv",), _is_edm2, _read_edm2),
    Family("lucidrains Attention", "heads", ("to_qkv",), _is_lucidrains, _read_lucidrains),
)


def family_of(layer: nn.Module, path: str) -> Family | None:
    """The family that the layer at `path` of a model belongs to, the first that matches; None if there is none.

    >>> from diffusers.models.attention_processor import Attention
    >>> family_of(Attention(32), "mid_block.attn1").name
    'CompVis / SGM / diffusers'
    """
    return next((family for family in FAMILIES if family.matches(layer, path)), None)


# Any other layer: its call of scaled_dot_product_attention


class Call(NamedTuple):
    """What a call of `F.scaled_dot_product_attention` attends with."""

    q: Tensor
    """(b, heads, tokens, dim) or (b heads, tokens, dim)"""
    k: Tensor
    """of the shape of q, its tokens being the keys"""
    masked: bool
    """Whether it had a mask, or was causal."""
    scale: float | None
    """As it was given; None is dim ** -0.5."""


def _call(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Call:  # type: ignore
    return Call(query.detach(), key.detach(), attn_mask is not None or is_causal, scale)


class WatchSDPA(TorchFunctionMode):
    """Keeps what every `F.scaled_dot_product_attention` attends with while the mode is entered, and lets each one run.

    >>> with WatchSDPA() as watch:
    ...     attended = F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 16, 8))
    >>> [call.q.shape for call in watch.calls]
    [torch.Size([1, 2, 16, 8])]
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(_call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def read_sdpa(call: Call, batch: int | None, spatial: tuple[int, int] | None) -> Applied:
    """The queries and keys of one call. Its tokens may be the pixels of the nearest spatial input, or square patches of them.

    Args:
        call: its q and k are (b, heads, tokens, dim) or (b heads, tokens, dim).
        batch: b of the nearest spatial input, if there was one.
        spatial: (h, w) of that.

    Raises:
        ValueError: a mask, or another shape.

    >>> q, k = torch.randn(2, 1, 2, 16, 8)
    >>> read_sdpa(Call(q, k, masked=False, scale=None), batch=1, spatial=(8, 8)).grid
    (4, 4)
    """
    q, k = call.q, call.k
    if call.masked:
        raise ValueError("its scaled_dot_product_attention has a mask, so that not every token attends to every other")
    if q.ndim == k.ndim == 3 and batch and q.shape[0] == k.shape[0] and q.shape[0] % batch == 0:
        q, k = (rearrange(x, "(b heads) n d -> b heads n d", b=batch) for x in (q, k))
    # A batch of another size is one of windows, rows or frames, whose tokens could pass for an image's
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[0] != batch:
        raise ValueError(
            f"its scaled_dot_product_attention has queries {tuple(q.shape)} and keys {tuple(k.shape)}, where both should be "
            f"(b, heads, tokens, dim), of the {batch} samples that the model was given"
        )
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    return Applied(q, k, scale, grid=spatial and _patches(spatial, q.shape[2]))


def _patches(spatial: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The grid of so many square patches; that of the pixels where there is none."""
    h, w = spatial
    patch = max(1, math.isqrt(h * w // tokens))
    return (h // patch, w // patch) if h % patch == w % patch == 0 else spatial
