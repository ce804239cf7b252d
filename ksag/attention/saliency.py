"""Queries and keys → how much attention each token receives, without holding the whole attention matrix."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F

MAX_LOGITS = 6 * 2**20
"""Attention logits computed at once, in float32: 24 MiB, because a CPU's allocator maps 32 MiB or more again each time, which is
slow. They and their softmax hold 48 MiB; on a GPU the sum may take as much as the softmax, 72 MiB together.

A chunk has at least one query of each sample and head; in a large batch of large pictures even these are more.
"""
MAX_ELEMENTS = 3 * 2**22
"""Of the queries or the keys that flash attention gets at once. With what it returns they hold 72 MiB."""
COLUMNS, UNIT = 8, 256.0
"""Columns appended to q and k for flash attention, and their value in k, which keeps float16 from overflowing."""


def softmax_chunks(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> list[Callable[[], Tensor]]:
    """softmax(q kᵀ · scale) in float32, autocast or not, in chunks of queries.

    Args:
        q: queries, (b, heads, queries, dim).
        k: keys, (b, heads, keys, dim).
        scale: the factor of q kᵀ, usually dim ** -0.5.
        mask: as `F.scaled_dot_product_attention` takes it: of a shape that broadcasts to (b, heads, queries, keys), True where a
            query attends to a key, or a number that is added to the logit.

    Returns:
        For each chunk, in order, a function that computes it: (b, heads, chunk, keys).
    """
    b, heads, queries, _ = q.shape
    keys = k.shape[2]
    size = max(1, MAX_LOGITS // (b * heads * keys))
    # flat, for bmm: matmul would copy those of a batch again for each chunk
    q, k = (x.to(torch.float32, memory_format=torch.contiguous_format).flatten(0, 1) for x in (q, k))
    q, k = q * scale, k.mT
    rows = q.split(size, dim=1)
    masks = [None] * len(rows) if mask is None else mask.expand(b, heads, queries, keys).split(size, dim=2)
    return [partial(_softmax, q, k, mask, (b, heads)) for q, mask in zip(rows, masks, strict=True)]


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None, shape: tuple[int, int]) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.bmm(q, k).unflatten(0, shape)
        if mask is None:
            return torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return torch.softmax(logits, dim=-1).nan_to_num(0.0)  # of a query that attends to nothing


def saliency(q: Tensor, k: Tensor, scale: float, image: slice | None = None, mask: Tensor | None = None) -> Tensor:
    """How much attention each key token receives: the mean over heads and the sum over queries of softmax(q kᵀ · scale).

    Its mean over tokens is 1: a token above 1 gets more attention than the average (Hong et al. 2023, arXiv:2210.00939, section
    4.3).

    Args:
        q: queries, (b, heads, queries, dim).
        k: keys, (b, heads, keys, dim).
        scale: the factor of q kᵀ, usually dim ** -0.5.
        image: the keys that are tokens of the image, if not all are: the others take part in the softmax, and what the image's
            receive is rescaled to mean 1.
        mask: as `F.scaled_dot_product_attention` takes it, or None.

    Returns:
        (b, tokens), float32. Large attention in half precision goes through flash attention on a GPU that has it.
    """
    heads, queries = q.shape[1:3]
    if _can_use_flash(q, k, mask):
        received = _received_by_flash(q, k, scale)
    else:
        first, *others = softmax_chunks(q, k, scale, mask)
        received = first().sum(dim=(1, 2))
        for chunk in others:
            received = received + chunk().sum(dim=(1, 2))
    if image is not None:
        received = received[:, image]
        return received / received.mean(dim=1, keepdim=True)
    return received * (k.shape[2] / (queries * heads))


def _can_use_flash(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether flash attention's kernel can compute it, and it takes more than one chunk otherwise."""
    (b, heads, queries, dim), keys = q.shape, k.shape[2]
    if not q.is_cuda or mask is not None or b * heads * queries * keys <= MAX_LOGITS:
        return False
    if dim % 8 or q.stride(-1) != 1 or k.stride(-1) != 1:
        return False
    if torch.compiler.is_compiling():  # can_use_flash_attention cannot be traced
        return False
    wide = q.new_empty(1, 1, 1, dim + COLUMNS)
    return can_use_flash_attention(SDPAParams(wide, wide, wide, None, 0.0, False, False))


def _received_by_flash(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The sum over heads and queries of softmax(q kᵀ · scale), (b, keys)."""
    b, _, tokens, dim = (max(sizes) for sizes in zip(q.shape, k.shape, strict=True))
    received = k.new_zeros(b, k.shape[2], dtype=torch.float32)
    size = max(1, MAX_ELEMENTS // (b * tokens * (dim + COLUMNS)))
    with torch.autocast(q.device.type, enabled=False):
        for queries, keys in zip(q.split(size, dim=1), k.split(size, dim=1), strict=True):  # of some heads
            received += _received_from_heads(queries, keys, scale)
    total = q.shape[1] * q.shape[2]  # each query of each head gives 1
    return received * (total / received.sum(dim=1, keepdim=True))


def _received_from_heads(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What each key receives from these heads, (b, keys). A function of its own, so that its tensors are freed between groups.

    A key receives exp(logit − lse) from a query, where lse is the logarithm of the sum of exp(logit) over all keys. Flash attention
    returns lse for each query. A second call, with q and k exchanged and −lse added to the logits, returns the logarithm of what
    each key receives. Appended columns of q hold −lse: three, since half precision has too few digits for one.
    """
    rest = _log_sums(q, k, scale) / (-scale * UNIT)
    first = q.shape[-1]
    q, k = F.pad(q, (0, COLUMNS)), F.pad(k, (0, COLUMNS))
    for column in range(first, first + 3):
        q[..., column], k[..., column] = rest, UNIT
        rest = rest - q[..., column]
    return _log_sums(k, q, scale).exp().sum(dim=1)


def _log_sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """For each query, the logarithm of the sum of exp(q kᵀ · scale) over the keys, (b, heads, queries), float32."""
    found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, scale=scale)[1]
    return found
