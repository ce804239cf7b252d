"""Whether the attention that was read is the applied one: it is recomputed from q, k and v, against the layer's own output."""

from collections import deque

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from ksag.attention.families.family import Attention
from ksag.attention.saliency import softmax_chunks

FLOAT32_SUMS = 1e-4
"""The relative error that sums over many tokens may have in float32, in any order."""
FARTHEST = 32
"""Calls from one check to the next, at most."""
SAMPLED_QUERIES = 64
"""How many queries of a layer are recomputed when it is checked again."""


def is_due(call: int) -> bool:
    """Whether a layer that was found right at a run's first call is checked again at its n-th: 1, 2, 4, 8, 16, 32, 64, 96, ...

    >>> [call for call in range(1, 100) if is_due(call)]
    [1, 2, 4, 8, 16, 32, 64, 96]
    """
    return call % FARTHEST == 0 or (call < FARTHEST and call & (call - 1) == 0)


def unmerged(applied: Tensor, merged: str, heads: int) -> Tensor | None:
    """What a layer gave to its output projection, as (b, heads, tokens, dim); None if it has another shape.

    Args:
        applied: the projection's input.
        merged: an einops pattern, from (b, heads, tokens, dim) to the shape of `applied`.
        heads: how many there are.
    """
    separate, together = merged.split(" -> ")
    try:
        return rearrange(applied, f"{together} -> {separate}", heads=heads)
    except EinopsError:
        return None


def error(read: Attention, applied: Tensor | None, computes_in: torch.dtype | None = None) -> Tensor:
    """How far the attention that was read is from the applied one, over what the dtype justifies: above 1 it is another.

    Args:
        read: q, k, v, the scale and the mask, of any samples and queries.
        applied: the layer's attention output for them, (b, heads, queries, dim).
        computes_in: the dtype that the layer computes in, if that is not its tensors' own.

    Returns:
        A number on the layer's device, the largest of the samples' errors: samples whose output is not finite do not count,
            and it is NaN if none counts.

    >>> q, k, v = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    >>> applied = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    >>> bool(error(Attention(q, k, v, 8**-0.5), applied) < 1), bool(error(Attention(q, k, v, 1.0), applied) < 1)
    (True, False)
    """
    assert read.v is not None
    if applied is None or applied.shape != (*read.q.shape[:3], read.v.shape[3]):
        return torch.tensor(torch.inf)
    allowed = tolerance(read, applied.dtype, computes_in)
    with torch.autocast(applied.device.type, enabled=False):
        v = read.v.float()
        output = torch.cat([chunk() @ v for chunk in softmax_chunks(read.q, read.k, read.scale, read.mask)], dim=2)
    expected, applied = output.flatten(1), applied.float().flatten(1)
    distance = (expected - applied).norm(dim=1)
    allowed = allowed * expected.norm(dim=1) + torch.finfo(torch.float32).tiny
    ratio = (distance / allowed).nan_to_num(torch.inf)
    worst = torch.where(applied.isfinite().all(dim=1), ratio, -1.0).amax()
    return torch.where(worst < 0, torch.nan, worst)


def tolerance(read: Attention, applied: torch.dtype, computes_in: torch.dtype | None) -> Tensor:
    """(b,) relative errors that rounding justifies: of the products and sums, and of the logits, which the softmax multiplies."""
    device = read.q.device
    dtypes = {read.q.dtype, read.k.dtype, applied, computes_in or torch.float32, torch.float32}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        eps = max(eps, 2**-10)
    # No logit is larger than the longest query times the longest key, and it is rounded by at most half an eps of itself
    longest_q, longest_k = (x.float().norm(dim=-1).amax(dim=(1, 2)) for x in (read.q, read.k))
    logits: Tensor = 0.5 * abs(read.scale) * longest_q * longest_k
    return FLOAT32_SUMS + eps * (8 + logits)


class Pending:
    """Errors that are still being computed on a GPU: they are read once they are there, so that nobody waits for them."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, call: int, value: Tensor) -> None:
        """`value` is the error found at the `call`-th call."""
        if not value.is_cuda:
            self._waiting.append((call, value, None))
            return
        host = torch.empty_like(value, device="cpu", pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((call, host, event))

    def failed(self) -> tuple[int, float] | None:
        """The first call with an error above 1, and the error, among those that are there; they are dropped."""
        while True:
            try:  # no lock, which Ctrl-C could leave locked
                call, value, event = self._waiting.popleft()
            except IndexError:
                return None
            if event is not None and not event.query():
                self._waiting.appendleft((call, value, event))
                return None
            if float(value) > 1:
                return call, float(value)
