"""The design's seven steps once more, in float64, sharing nothing with the package but the inner model.

The attention is recorded as the layer applies it: its arguments to scaled_dot_product_attention, as they were called.
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
    """Any number of spatial dimensions; `sigma` may be one for each."""
    if sigma == 0:
        return u
    out = [gaussian_filter(plane, sigma, mode="mirror", radius=kernel_size // 2) for plane in u.double().flatten(0, 1).numpy()]
    return torch.from_numpy(np.stack(out)).view(u.shape)


def upsampled(mask, size):
    for dim, side in enumerate(size, 1):
        mask = mask.index_select(dim, torch.arange(side) * mask.shape[dim] // side)
    return mask[:, None]


def sag(D, x, cond, uncond, cond_scale, sag_scale, blur_sigma, kernel_size, grid, index=0, threshold=1.0):
    """D(x, cond) is the inner model at the step's sigma; returns float64."""
    u, attention = applied_attention(lambda: D(x, uncond), index)
    u, g = u.double(), D(x, cond).double()
    cfg = u + (g - u) * cond_scale
    mask = upsampled((saliency_of(attention, grid) > threshold).double(), x.shape[2:])
    d = mask * blurred(u, blur_sigma, kernel_size) + (1 - mask) * u
    r = D((d + (x.double() - u)).to(x.dtype), uncond).double()
    return cfg + (d - r) * sag_scale


def tensors(step):
    """All tensors of a step of a trace."""
    return [step.sigma, step.uncond, step.cond, step.direction, *step.parts.values()]


def same_steps(steps, others):
    """Whether two traces hold the same, bit for bit."""
    return len(steps) == len(others) and all(
        one.name == other.name and one.parts.keys() == other.parts.keys() and all(map(torch.equal, tensors(one), tensors(other)))
        for one, other in zip(steps, others, strict=True)
    )


# PAG and SEG: the model's own code, with another attention map


class Perturbed(TorchFunctionMode):
    """While a layer runs, its attention map is the identity, or its queries are blurred.

    The layer computes this itself: of `scaled_dot_product_attention`, the arguments are changed; of a softmax, the result or the
    logits, which are linear in the queries.

    Args:
        layers: the modules.
        how: "identity", or the standard deviation of the blur in tokens.
        grid: (h', w') of the tokens, or a function of their number.
    """

    def __init__(self, layers, how, grid):
        super().__init__()
        self.how, self.grid, self.inside, self.layers = how, grid, False, layers

    def __enter__(self):
        self.handles = []
        for layer in self.layers:
            self.handles.append(layer.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)))
            self.handles.append(layer.register_forward_hook(lambda *_: setattr(self, "inside", False)))
        return super().__enter__()

    def __exit__(self, *exc_info):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exc_info)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_softmax = func in (torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax)
        if self.inside and func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v, *others = args
            if self.how == "identity":
                return v[..., -q.shape[-2] :, :]
            args = (blurred_queries(q, self.how, self.grid), k, v, *others)
        elif self.inside and is_softmax and self.how != "identity":
            args = (blurred_queries(args[0], self.how, self.grid), *args[1:])
        result = func(*args, **kwargs)
        if self.inside and is_softmax and self.how == "identity":
            queries, keys = result.shape[-2:]
            identity = torch.eye(keys, dtype=result.dtype)[keys - queries :]
            return identity.expand_as(result).clone()
        return result


def blurred_queries(q, sigma, grid):
    """(..., tokens, d), blurred as in the code of the SEG paper (arXiv:2408.00760), with one kernel for each side."""
    if sigma == float("inf"):
        return q.mean(dim=-2, keepdim=True).expand_as(q)
    if sigma == 0:
        return q
    grid = grid(q.shape[-2]) if callable(grid) else grid
    planes = q.transpose(-1, -2).reshape(-1, 1, *grid)
    size = int(np.ceil(6 * sigma)) + 1 - int(np.ceil(6 * sigma)) % 2
    sizes = [min(size, side - (side % 2 - 1)) for side in grid]
    kernel = torch.ones((), dtype=torch.float64)
    for size in sizes:
        half = (size - 1) * 0.5
        weights = torch.exp(-0.5 * (torch.linspace(-half, half, size, dtype=torch.float64) / sigma) ** 2)
        kernel = kernel.unsqueeze(-1) * (weights / weights.sum())
    padding = [half for size in reversed(sizes) for half in (size // 2, size // 2)]
    padded = torch.nn.functional.pad(planes.double(), padding, mode="reflect")
    convolution = getattr(torch.nn.functional, f"conv{len(sizes)}d")
    blurred = convolution(padded, kernel[None, None])
    return blurred.reshape(*q.shape[:-2], q.shape[-1], q.shape[-2]).transpose(-1, -2).to(q.dtype)
