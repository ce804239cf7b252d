"""Saliency → mask → the degraded latent: blurred where the model looks, untouched elsewhere."""

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST_SIGMA = 0.02
"""In latent pixels. A Gaussian as narrow as this is 1 at its centre and 0 beside it, even in float64."""


def attention_mask(saliency: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """The tokens that receive more than `threshold` of attention, nearest-neighbour upsampled to the latent's size.

    Args:
        saliency: (b, h', w').
        threshold: 1.0 is the attention that the average token receives.
        size: (h, w) of the latent.

    Returns:
        (b, 1, h, w) bool (the mask M of Hong et al. 2023, arXiv:2210.00939, section 4.3).
    """
    return F.interpolate(saliency.unsqueeze(1), size, mode="nearest") > threshold


def gaussian_blur(x: Tensor, sigma: float, kernel_size: int) -> Tensor:
    """Blurs each channel with a normalised Gaussian, reflecting at the borders; `sigma` 0 returns `x` as it is.

    Args:
        x: (b, c, h, w), both sides longer than kernel_size // 2.
        sigma: standard deviation in latent pixels.
        kernel_size: odd number of samples along each axis.

    Returns:
        (b, c, h, w), the dtype of `x`.
    """
    if sigma == 0:
        return x
    c, half = x.shape[1], kernel_size // 2
    with torch.autocast(x.device.type, enabled=False):
        # in half precision the rounded weights of a Gaussian would no longer sum to 1
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        end = half / max(sigma, SMALLEST_SIGMA)
        t = torch.linspace(-end, end, kernel_size, device=y.device, dtype=y.dtype)
        g = torch.softmax(t.square() * -0.5, dim=0).expand(c, -1)
        y = F.pad(y, (half, half, half, half), mode="reflect")
        y = F.conv2d(y, g[:, None, None], groups=c)
        return F.conv2d(y, g[:, None, :, None], groups=c).to(x.dtype)


def degrade(u: Tensor, mask: Tensor, blur_sigma: float, kernel_size: int) -> Tensor:
    """mask · blur(u) + (1 − mask) · u, (b, c, h, w): what the model attended to, taken away (section 4.3 of the paper)."""
    return torch.where(mask, gaussian_blur(u, blur_sigma, kernel_size), u)
