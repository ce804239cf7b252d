"""Self-Attention Guidance itself, steps 3 to 6: from a prediction and what the model attended to in it, to a direction.

Hong et al., "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance", ICCV 2023, arXiv:2210.00939, section 4.3.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ksag.guidance.blur import attention_mask, degrade


def take_away(
    u: Tensor, saliency: Tensor, *, blur_sigma: float = 2.0, blur_kernel_size: int = 9, mask_threshold: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Steps 4 and 5, with the arguments of `self_attention_guidance`: the mask, (b, 1, h, w) bool, and d: u, blurred under it."""
    mask = attention_mask(saliency, mask_threshold, (u.shape[2], u.shape[3]))
    return mask, degrade(u, mask, blur_sigma, blur_kernel_size)


def overlap(before: Tensor, now: Tensor) -> Tensor:
    """How much of what was taken away before is so now: ⟨δ′, δ⟩ / ⟨δ′, δ′⟩ between 0 and 1, (b, 1, 1, 1); 0 where δ′ is 0.

    Args:
        before: δ′, what an earlier call took away from its prediction, (b, c, h, w).
        now: δ, what this call takes away, (b, c, h, w).

    >>> overlap(torch.tensor([[[[2.0, 2.0]]], [[[0.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]], [[[1.0, 1.0]]]])).flatten()
    tensor([0.5000, 0.0000])
    """
    dtype = torch.promote_types(now.dtype, torch.float32)  # half precision cannot hold such sums
    before, now = before.to(dtype), now.to(dtype)
    common, whole = ((before * other).sum(dim=(1, 2, 3), keepdim=True) for other in (now, before))
    return (common / whole.clamp(min=torch.finfo(dtype).tiny)).clamp(0, 1)


class Guidance(NamedTuple):
    """What Self-Attention Guidance makes of one prediction."""

    mask: Tensor
    """(b, 1, h, w) float32 ones where the saliency is above the threshold, zeros elsewhere."""
    degraded: Tensor
    """(b, c, h, w) d: u, blurred under the mask."""
    reevaluated: Tensor
    """(b, c, h, w) r: what the model makes of the degraded latent."""

    @property
    def direction(self) -> Tensor:
        """(b, c, h, w) d − r: away from the degraded prediction. Add it to the guided prediction, times sag_scale."""
        return self.degraded - self.reevaluated


def self_attention_guidance(
    u: Tensor,
    x: Tensor,
    saliency: Tensor,
    denoise: Callable[[Tensor], Tensor],
    *,
    blur_sigma: float = 2.0,
    blur_kernel_size: int = 9,
    mask_threshold: float = 1.0,
) -> Guidance:
    """Takes away from a prediction what the model attended to in it, and asks the model again under the same noise.

    `SAGDenoiser` calls this at each step. A host that computes its predictions itself can call it too:

        direction = self_attention_guidance(u, x, saliency, lambda x: denoise(x, sigma, uncond)).direction
        guided = cfg + direction * sag_scale

    Args:
        u: the unconditional prediction, (b, c, h, w), or the only one.
        x: the noisy latent that it was made from, (b, c, h, w).
        saliency: how much attention each token received meanwhile, (b, h', w'); its mean is 1.
        denoise: the model at the same noise level and conditioning as for u: noisy latent → denoised latent.
        blur_sigma: standard deviation of the blur, in latent pixels; 0 is no blur.
        blur_kernel_size: odd number of latent pixels that the blur spans; both sides of u are longer than half of it.
        mask_threshold: tokens that received more than this many times the average attention are blurred.
    """
    mask, d = take_away(u, saliency, blur_sigma=blur_sigma, blur_kernel_size=blur_kernel_size, mask_threshold=mask_threshold)
    r = denoise(d + (x - u))
    return Guidance(mask.float(), d, r)
