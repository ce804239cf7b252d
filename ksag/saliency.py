"""Queries and keys → how much attention each token receives, without ever holding the whole attention matrix."""

import functools

import torch
from torch import Tensor

MAX_LOGITS = 6 * 2**20
"""Attention logits computed at once, in float32: 24 MiB, because a CPU's allocator maps 32 MiB or more anew each time, at a high
price. They and their softmax hold 48 MiB, and on a GPU the sum may take as much as the softmax for itself: 72 MiB at the most.

A chunk has at least one query of each sample and head; in a large batch of large pictures even these are more.
"""


def saliency(q: Tensor, k: Tensor, scale: float, memory: int = 0) -> Tensor:
    """How much attention each key token receives: the mean over heads and the sum over queries of softmax(q kᵀ · scale).

    Its mean over tokens is 1, so that a token above 1 is looked at more than the average one (Hong et al. 2023,
    arXiv:2210.00939, section 4.3). The softmax is taken in float32, autocast or not, over chunks of queries.

    Args:
        q: queries, (b, heads, tokens, dim).
        k: keys, (b, heads, memory + tokens, dim).
        scale: what the layer multiplies q kᵀ by, as a rule dim ** -0.5.
        memory: how many keys, the first ones, are no tokens of the image: they take part in the softmax, and what the
            tokens receive of it is scaled to a mean of 1 again.

    Returns:
        (b, tokens), float32.
    """
    b, heads, queries, _ = q.shape
    tokens = k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        # flat, for bmm: matmul would copy those of a batch again for each chunk
        q, k = (x.to(torch.float32, memory_format=torch.contiguous_format).flatten(0, 1) for x in (q, k))
        q, keys = q * scale, k.mT
        chunks = q.split(max(1, MAX_LOGITS // (b * heads * tokens)), dim=1)
        # in one expression, so that a chunk is freed before the next one is made
        received = functools.reduce(
            torch.add, (torch.bmm(rows, keys).softmax(dim=-1).unflatten(0, (b, heads)).sum(dim=(1, 2)) for rows in chunks)
        )
    if memory:
        received = received[:, memory:]
        return received / received.mean(dim=1, keepdim=True)
    return received * (tokens / (queries * heads))
