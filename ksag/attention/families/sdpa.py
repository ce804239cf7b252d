"""Attention of any writing that calls `F.scaled_dot_product_attention`: the call tells what it attends with."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ksag.attention.families.family import Attention, Grid


class Call(NamedTuple):
    """The arguments of a call of `F.scaled_dot_product_attention`."""

    query: Tensor
    """(b, heads, tokens, dim) or (b heads, tokens, dim)"""
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class WatchSDPA(TorchFunctionMode):
    """Keeps the arguments of every `F.scaled_dot_product_attention` while the mode is entered, and lets each one run.

    Args:
        attended: is passed each call and its output, and returns what the caller gets as the output.

    >>> with WatchSDPA() as watch:
    ...     attended = F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 16, 8))
    >>> [call.query.shape for call in watch.calls]
    [torch.Size([1, 2, 16, 8])]
    """

    def __init__(self, attended: Callable[[Call, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.attended = attended
        self.calls: list[Call] = []
        self._entered = False

    def __enter__(self) -> "WatchSDPA":
        self._entered = super().__enter__() is self  # type: ignore[no-untyped-call]
        return self

    def close(self) -> None:
        """Leaves the mode if it is entered."""
        if self._entered:
            self._entered = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.calls.append(Call(*args, **(kwargs or {})))
            if self.attended is not None:
                return self.attended(self.calls[-1], output)
        return output


def read(call: Call, batch: int | None, spatial: Grid | None) -> Attention:
    """What one call attends with. Its tokens may be the pixels of the nearest spatial input, or square patches of them.

    Args:
        call: its tensors are (b, heads, tokens, dim) or (b heads, tokens, dim); keys and values may be grouped.
        batch: b of the nearest spatial input, if there was one.
        spatial: its sides.

    Raises:
        ValueError: another shape.

    >>> q, k, v = torch.randn(3, 1, 2, 16, 8)
    >>> read(Call(q, k, v), batch=1, spatial=(8, 8)).grid
    (4, 4)
    """
    q, k, v = call[:3]
    if q.ndim == k.ndim == 3 and batch and q.shape[0] == k.shape[0] and q.shape[0] % batch == 0:
        q, k, v = (rearrange(x, "(b heads) n d -> b heads n d", b=batch) for x in (q, k, v))
    heads = q.shape[1]
    if call.enable_gqa and q.ndim == k.ndim == 4:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    # A batch of another size is one of windows, rows or frames, whose tokens could pass for an image's
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[0] != batch:
        raise ValueError(
            f"its scaled_dot_product_attention has queries {tuple(q.shape)} and keys {tuple(k.shape)}, where both should be "
            f"(b, heads, tokens, dim), of the {batch} samples that the model was given"
        )
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    grid = patches(spatial, q.shape[2]) if spatial else None
    return Attention(q, k, v, scale, grid, mask=_mask(call, q, k))


def _mask(call: Call, q: Tensor, k: Tensor) -> Tensor | None:
    b, heads, tokens, _ = q.shape
    if call.is_causal:
        mask = torch.ones(tokens, k.shape[2], dtype=torch.bool, device=q.device).tril()
    elif call.attn_mask is None:
        return None
    else:
        mask = call.attn_mask
    if call.query.ndim == mask.ndim == 3 and mask.shape[0] > 1:  # (b heads, tokens, keys)
        mask = mask.unflatten(0, (b, heads))
    return mask.expand(b, heads, tokens, k.shape[2])


def image_last(read: Attention) -> Attention:
    """The same with what the mask leaves out at the end of each sample moved to its beginning."""
    if read.mask is None:
        return read
    padding = read.mask[:, 0, 0].flip(1).int().argmax(dim=1)
    places = (torch.arange(read.q.shape[2], device=read.q.device) - padding[:, None]) % read.q.shape[2]
    q, k, v = (None if x is None else x.take_along_dim(places[:, None, :, None], 2) for x in (read.q, read.k, read.v))
    assert q is not None and k is not None
    return replace(read, q=q, k=k, v=v, mask=read.mask.take_along_dim(places[:, None, None], 3), places=places)


def patches(spatial: Grid, tokens: int) -> Grid | None:
    """The grid of `tokens` square patches (of one frame, in a video); None if there is none."""
    for patch in range(1, max(spatial) + 1):
        for first in {1, patch} if len(spatial) == 3 else {patch}:
            sides = (first, *[patch] * (len(spatial) - 1))
            grid = tuple(side // size for side, size in zip(spatial, sides, strict=True))
            if math.prod(grid) == tokens and all(side % size == 0 for side, size in zip(spatial, sides, strict=True)):
                return grid
    return None
