"""What is read is what was applied: a layer's attention computed anew from what was read, against what the layer computed."""

import torch
from einops import rearrange
from torch import Tensor

from ksag.attention.families.family import Attention
from ksag.attention.saliency import attention

FLOAT32_SUMS = 1e-4
"""The relative error that sums over many tokens may have in float32, however they are ordered."""


def error(read: Attention, merged: str, grid: tuple[int, int], applied: Tensor, computes_in: torch.dtype | None = None) -> float:
    """How far the attention that was read is from the one that was applied, over what the dtype justifies: above 1 it is another.

    The memory is that of `ksag.attention.saliency`'s chunks. Reads the result on the host.

    Args:
        read: q, k, v, the scale and the mask, of any number of samples.
        merged: an einops pattern, from (b, heads, tokens, dim) to the shape of `applied`.
        grid: (h, w) of the tokens.
        applied: what the layer gave to its output projection.
        computes_in: the dtype that the layer computes in, if that is not its tensors' own.

    Returns:
        The largest of the samples' errors, without those that have no finite output; NaN where none has.

    >>> q, k, v = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    >>> applied = rearrange(torch.nn.functional.scaled_dot_product_attention(q, k, v), "b n t d -> b t (n d)")
    >>> error(Attention(q, k, v, 8**-0.5), "b heads tokens d -> b tokens (heads d)", (4, 4), applied) < 1
    True
    >>> error(Attention(q, k, v, 1.0), "b heads tokens d -> b tokens (heads d)", (4, 4), applied) > 1
    True
    """
    assert read.v is not None
    allowed = tolerance(read, applied.dtype, computes_in)
    sizes = {"h": grid[0], "w": grid[1]} if "(h w)" in merged else {}
    with torch.autocast(applied.device.type, enabled=False):
        v = read.v.float()
        output = torch.cat([chunk() @ v for chunk in attention(read.q, read.k, read.scale, read.mask)], dim=2)
    expected = rearrange(output, merged, **sizes).flatten(1)
    if expected.numel() != applied.numel():
        return torch.inf
    applied = applied.float().reshape(expected.shape)
    distance = (expected - applied).norm(dim=1)
    allowed = allowed * expected.norm(dim=1) + torch.finfo(torch.float32).tiny
    ratio = (distance / allowed).nan_to_num(torch.inf)
    telling = ratio[applied.isfinite().all(dim=1)]
    return float(telling.max()) if len(telling) else torch.nan


def tolerance(read: Attention, applied: torch.dtype, computes_in: torch.dtype | None) -> Tensor:
    """(b,) relative errors that rounding justifies: of the products and sums, and of the logits, which the softmax multiplies."""
    device = read.q.device
    dtypes = {read.q.dtype, read.k.dtype, applied, computes_in or torch.float32, torch.float32}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        eps = max(eps, 2**-10)
    # No logit is larger than the longest query times the longest key, and it is rounded by half an eps of itself at the most
    longest_q, longest_k = (x.float().norm(dim=-1).amax(dim=(1, 2)) for x in (read.q, read.k))
    return FLOAT32_SUMS + eps * (8 + 0.5 * abs(read.scale) * longest_q * longest_k)
