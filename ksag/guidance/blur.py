"""Saliency → mask → the degraded latent: blurred where the model attends, untouched elsewhere. One to three spatial dimensions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST_SIGMA = 0.02
"""In latent pixels. A Gaussian as narrow as this is 1 at its centre and 0 next to it, even in float64."""
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def attention_mask(saliency: Tensor, threshold: float, size: Sequence[int]) -> Tensor:
    """The tokens that receive more than `threshold` of attention, nearest-neighbour upsampled to the latent's size.

    Args:
        saliency: (b, *grid).
        threshold: 1.0 is the attention that the average token receives.
        size: the latent's sides.

    Returns:
        (b, 1, *size) bool (the mask M of Hong et al. 2023, arXiv:2210.00939, section 4.3).
    """
    return F.interpolate(saliency.unsqueeze(1), tuple(size), mode="nearest") > threshold


def gaussian_blur(x: Tensor, sigma: float, kernel_size: int | Sequence[int]) -> Tensor:
    """Blurs each channel with a normalised Gaussian, reflecting at the borders; `sigma` 0 returns `x` as it is.

    Args:
        x: (b, c, *spatial), each side longer than half of its kernel.
        sigma: standard deviation in latent pixels.
        kernel_size: odd number of samples along each axis; a sequence has one for each axis, and 1 leaves an axis out.

    Returns:
        (b, c, *spatial), the dtype of `x`.
    """
    if sigma == 0:
        return x
    dims, c = x.ndim - 2, x.shape[1]
    sizes = [kernel_size] * dims if isinstance(kernel_size, int) else list(kernel_size)
    with torch.autocast(x.device.type, enabled=False):
        # in half precision the rounded weights of a Gaussian would no longer sum to 1
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = F.pad(y, [size // 2 for size in reversed(sizes) for _ in range(2)], mode="reflect")
        weights = {size: _gaussian(sigma, size, c, y) for size in dict.fromkeys(sizes) if size > 1}
        for axis in reversed(range(dims)):
            if sizes[axis] > 1:
                kernel = weights[sizes[axis]]
                for _ in range(axis):
                    kernel = kernel.unsqueeze(2)
                for _ in range(dims - 1 - axis):
                    kernel = kernel.unsqueeze(-1)
                y = CONVOLUTIONS[dims](y, kernel, groups=c)
        return y.to(x.dtype)


def _gaussian(sigma: float, size: int, channels: int, like: Tensor) -> Tensor:
    """(channels, 1, size), contiguous: a convolution would copy expanded weights at each call."""
    end = size // 2 / max(sigma, SMALLEST_SIGMA)
    t = torch.linspace(-end, end, size, device=like.device, dtype=like.dtype).expand(channels, 1, -1)
    return torch.softmax(t.square() * -0.5, dim=-1)


def degrade(u: Tensor, mask: Tensor, blur_sigma: float, kernel_size: int | Sequence[int]) -> Tensor:
    """mask · blur(u) + (1 − mask) · u: u, blurred where the model attends (section 4.3 of the paper)."""
    return torch.where(mask, gaussian_blur(u, blur_sigma, kernel_size), u)
