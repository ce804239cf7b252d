"""The attention of one layer, and whole steps of SAG, PAG and SEG, by the tests' own computation in float64."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tests.reference import blurred


class Call(NamedTuple):
    """What a layer passes to scaled_dot_product_attention, in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | float

    def weights(self, q):
        return (q @ self.k.mT * self.scale + self.bias).softmax(-1)


class Attending(TorchFunctionMode):
    """Computes the attention of one layer by itself: softmax(q kᵀ) over all tokens. `change` may replace its output.

    Args:
        layer: the layer.
        change: (call, output) → output.
    """

    def __init__(self, layer, change=lambda call, output: output):
        super().__init__()
        self.change, self.weights, self.inside = change, None, False
        self.handles = [
            layer.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            layer.register_forward_hook(lambda *_: setattr(self, "inside", False)),
        ]

    def __exit__(self, *exc_info):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exc_info)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention or not self.inside:
            return func(*args, **(kwargs or {}))
        return self.attend(*args, **(kwargs or {}))

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        q, k, v = query.double(), key.double(), value.double()
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        bias = 0.0 if attn_mask is None else attn_mask
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            bias = torch.zeros(attn_mask.shape, dtype=torch.float64).masked_fill(~attn_mask, -torch.inf)
        call = Call(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, bias)
        self.weights = call.weights(q)
        return self.change(call, self.weights @ v).to(query.dtype)


class Image(NamedTuple):
    """Where the tokens of the image, the sound or the video are among those of a layer."""

    start: int
    grid: tuple[int, ...]

    def among(self, length):
        """Which of `length` queries or keys they are."""
        n = math.prod(self.grid)
        return slice(self.start, self.start + n) if length >= self.start + n else slice(0, n)

    def received(self, weights):
        """(b, *grid): how much attention each token gets from the others, at a mean of 1."""
        keys = weights[:, :, self.among(weights.shape[2])].mean(1).sum(1)[:, self.among(weights.shape[3])]
        return (keys / keys.mean(1, keepdim=True)).view(-1, *self.grid)

    def pag(self, call, output):
        output[:, :, self.among(output.shape[2])] = call.v[:, :, self.among(call.v.shape[2])]
        return output

    def seg(self, call, output):
        part = self.among(output.shape[2])
        q = call.q.clone()
        q[:, :, part] = q[:, :, part].mean(2, keepdim=True)
        output[:, :, part] = (call.weights(q) @ call.v)[:, :, part]
        return output


def upsampled(mask, size):
    """(b, *grid) → (b, 1, *size), by the nearest neighbour."""
    for dim, side in enumerate(size, 1):
        mask = mask.index_select(dim, torch.arange(side) * mask.shape[dim] // side)
    return mask[:, None]


def step(denoise, layer, image, x, cond, uncond, blur_sigma, kernel_size):
    """What the predictions of one call are by the formulas, and the directions of SAG, PAG and SEG with a mean of the queries.

    Args:
        denoise: (x, conditioning) → the model's prediction at the call's noise level.
        layer: the layer that is read and changed.
        image: an `Image`.
        blur_sigma: of SAG, or one for each side.

    Returns:
        u, g, the directions (SAG, PAG, SEG), the saliency and the mask.
    """
    with Attending(layer) as own:
        u = denoise(x, uncond)
    g = denoise(x, cond)
    with Attending(layer, image.pag):
        p = denoise(x, cond)
    with Attending(layer, image.seg):
        s = denoise(x, cond)
    saliency = image.received(own.weights)
    mask = upsampled((saliency > 1).double(), x.shape[2:])
    d = mask * blurred(u, blur_sigma, kernel_size) + (1 - mask) * u
    r = denoise((d + (x - u)).to(x.dtype), uncond)
    return u, g, (d - r, g - p, g - s), saliency, mask
