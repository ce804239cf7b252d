"""Saliency → mask → the degraded latent: blurred where the model looks, untouched elsewhere."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_mask(saliency: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """The tokens that receive more than `threshold` of attention, nearest-neighbour upsampled to the latent's size.

    Args:
        saliency: (b, h', w').
        threshold: 1.0 is the attention that the average token receives.
        size: (h, w) of the latent.

    Returns:
        (b, 1, h, w) of zeros and ones, float32 (the mask M of Hong et al. 2023, arXiv:2210.00939, section 4.3).
    """
    return F.interpolate((saliency > threshold).float().unsqueeze(1), size, mode="nearest")


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
    t = torch.arange(-half, half + 1, device=x.device, dtype=torch.float32)
    g = torch.softmax(-0.5 * (t / sigma) ** 2, dim=0).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        x = F.pad(x, (half, half, half, half), mode="reflect")
        x = F.conv2d(x, g.expand(c, 1, 1, kernel_size), groups=c)
        return F.conv2d(x, g[:, None].expand(c, 1, kernel_size, 1), groups=c)


def degrade(u: Tensor, mask: Tensor, blur_sigma: float, kernel_size: int) -> Tensor:
    """mask · blur(u) + (1 − mask) · u, (b, c, h, w): what the model attended to, taken away (eq. 9 of the paper)."""
    mask = mask.to(u.dtype)
    return mask * gaussian_blur(u, blur_sigma, kernel_size) + (1 - mask) * u
