"""The design's seven steps once more, in float64, sharing nothing with the package but the inner model.

The attention is the one that the layer applied: its arguments to scaled_dot_product_attention, as they were called.
The blur is SciPy's.
"""

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch.overrides import TorchFunctionMode


class WatchSDPA(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls.append((args[0].detach(), args[1].detach(), (kwargs or {}).get("scale")))
        return func(*args, **(kwargs or {}))


def applied_attention(run, index):
    """The attention matrix (b, heads, queries, keys) of the index-th SDPA call while `run()` runs, float64."""
    with WatchSDPA() as watch:
        result = run()
    q, k, scale = watch.calls[index]
    q, k = q.double(), k.double()
    return result, (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)


def saliency_of(attention, grid):
    return attention.mean(1).sum(1).reshape(-1, *grid)


def blurred(u, sigma, kernel_size):
    if sigma == 0:
        return u
    out = [gaussian_filter(plane, sigma, mode="mirror", radius=kernel_size // 2) for plane in u.double().flatten(0, 1).numpy()]
    return torch.from_numpy(np.stack(out)).view(u.shape)


def upsampled(mask, size):
    rows = (torch.arange(size[0]) * mask.shape[1]) // size[0]
    columns = (torch.arange(size[1]) * mask.shape[2]) // size[1]
    return mask[:, rows][:, :, columns][:, None]


def sag(D, x, cond, uncond, cond_scale, sag_scale, blur_sigma, kernel_size, grid, index=0, threshold=1.0):
    """D(x, cond) is the inner model at the step's sigma; returns float64."""
    u, attention = applied_attention(lambda: D(x, uncond), index)
    u, g = u.double(), D(x, cond).double()
    cfg = u + (g - u) * cond_scale
    mask = upsampled((saliency_of(attention, grid) > threshold).double(), x.shape[2:])
    d = mask * blurred(u, blur_sigma, kernel_size) + (1 - mask) * u
    r = D((d + (x.double() - u)).to(x.dtype), uncond).double()
    return cfg + (d - r) * sag_scale
