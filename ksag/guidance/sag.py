"""Self-Attention Guidance: away from a prediction that is blurred where the model attends, and re-evaluated.

Hong et al., "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance", ICCV 2023, arXiv:2210.00939, section 4.3.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ksag.guidance.blur import attention_mask, degrade
from ksag.guidance.direction import Ask, Call, Direction, Setting
from ksag.model import parameters


@dataclass(frozen=True)
class Guidance:
    """The result of Self-Attention Guidance for a prediction."""

    mask: Tensor
    """(b, 1, *spatial) float32 ones where the saliency is above the threshold, zeros elsewhere."""
    degraded: Tensor
    """(b, c, *spatial) d: u, blurred under the mask."""
    reevaluated: Tensor
    """(b, c, *spatial) r: the model's prediction from the degraded latent."""

    @property
    def direction(self) -> Tensor:
        """(b, c, *spatial) d − r: away from the degraded prediction. Add it to the guided prediction, times sag_scale."""
        return self.degraded - self.reevaluated


def self_attention_guidance(
    u: Tensor,
    x: Tensor,
    saliency: Tensor,
    denoise: Callable[[Tensor], Tensor],
    *,
    blur_sigma: float = 2.0,
    blur_kernel_size: int | Sequence[int] = 9,
    mask_threshold: float = 1.0,
) -> Guidance:
    """Blurs a prediction where the model attends, and asks the model again under the same noise.

    An application that computes its own predictions calls this at each step:

        direction = self_attention_guidance(u, x, saliency, lambda x: denoise(x, sigma, uncond)).direction
        guided = cfg + direction * sag_scale

    Args:
        u: the unconditional prediction, or the only one, (b, c, *spatial).
        x: the noisy latent that it was computed from, (b, c, *spatial).
        saliency: how much attention each token received meanwhile, (b, *grid); its mean is 1.
        denoise: the model at the same noise level and conditioning as for u: noisy latent → denoised latent.
        blur_sigma: standard deviation of the blur, in latent pixels; 0 is no blur.
        blur_kernel_size: odd number of latent pixels that the blur spans; each side of u must be longer than half of it. A
            sequence has one for each side.
        mask_threshold: tokens that received more than this many times the average attention are blurred.
    """
    mask = attention_mask(saliency, mask_threshold, u.shape[2:])
    d = degrade(u, mask, blur_sigma, blur_kernel_size)
    r = denoise((d + (x - u)).to(x.dtype))
    return Guidance(mask.float(), d, r)


def overlap(before: Tensor, now: Tensor) -> Tensor:
    """The share of an earlier δ′ that is still part of δ: ⟨δ′, δ⟩ / ⟨δ′, δ′⟩ between 0 and 1, (b, 1, ...); 0 where δ′ is 0.

    Args:
        before: δ′ = u − d of an earlier call, (b, c, *spatial).
        now: δ = u − d of this call, (b, c, *spatial).

    >>> overlap(torch.tensor([[[[2.0, 2.0]]], [[[0.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]], [[[1.0, 1.0]]]])).flatten()
    tensor([0.5000, 0.0000])
    """
    dtype = torch.promote_types(now.dtype, torch.float32)  # half precision cannot hold such sums
    before, now = before.to(dtype), now.to(dtype)
    dims = tuple(range(1, now.ndim))
    common, whole = ((before * other).sum(dim=dims, keepdim=True) for other in (now, before))
    return (common / whole.clamp(min=torch.finfo(dtype).tiny)).clamp(0, 1)


class SAG(Direction):
    """Self-Attention Guidance: d − r, with d the prediction u blurred where the model attends, and r its re-evaluation.

    Args:
        scale: strength s; the paper's `guide_scale` is 1 + s. A tensor (b,), on the latent's device, is a strength for each sample.
            Per call: `sag_scale`.
        blur_sigma: standard deviation of the Gaussian blur, in latent pixels. Per call: `blur_sigma`.
        blur_kernel_size: odd number of latent pixels that the blur spans. Each side of the latent must be longer than half of it.
        mask_threshold: tokens that receive more than this many times the average attention are blurred. Per call: `mask_threshold`.
        attention: the layer to read: "middle", a dotted path in `inner_model` or in the UNet it holds, or the module.
        sigma_range, every: see `ksag.Direction`.
        one_pass: blur what the model attended to one call earlier, so that u, g and r share one batch instead of two calls. This
            saves time where the larger batch costs less than a second call, as on a GPU with small batches; on a CPU, `every`
            saves time. A run's first call is not guided.
        blur_time: for a latent of (b, c, t, h, w), whether the blur spans time too. Off by default: neighbouring frames show
            different moments, and blending them degrades the motion rather than the detail.

    Raises:
        ValueError: a setting out of its range.
    """

    name = "SAG"
    keywords: ClassVar = {"sag_scale": "scale", "blur_sigma": "blur_sigma", "mask_threshold": "mask_threshold"}
    shown = ("scale", "blur_sigma", "blur_kernel_size", "mask_threshold", "attention", "sigma_range", "one_pass", "every")
    reads_attention = True
    scale = Setting(parameters.sag_scale)
    blur_sigma = Setting(parameters.blur_sigma)
    blur_kernel_size = Setting(parameters.blur_kernel_size)
    mask_threshold = Setting(parameters.mask_threshold)
    one_pass = Setting(parameters.flag("one_pass"))
    blur_time = Setting(parameters.flag("blur_time"))

    def __init__(
        self,
        scale: float | Tensor = 0.5,
        blur_sigma: float = 2.0,
        *,
        blur_kernel_size: int = 9,
        mask_threshold: float = 1.0,
        attention: str | nn.Module = "middle",
        sigma_range: tuple[float, float] = (0.0, math.inf),
        one_pass: bool = False,
        every: int = 1,
        blur_time: bool = False,
    ):
        super().__init__(scale, attention, sigma_range=sigma_range, every=every)
        self.blur_sigma, self.blur_kernel_size, self.mask_threshold = blur_sigma, blur_kernel_size, mask_threshold
        self.one_pass, self.blur_time = one_pass, blur_time

    @property
    def lag(self) -> int:
        return int(self.one_pass)

    def kernel(self, x: Tensor) -> int | tuple[int, ...]:
        """The blur's size along each spatial side of a latent (b, c, *spatial)."""
        k = self.blur_kernel_size
        return (1, k, k) if x.ndim == 5 and not self.blur_time else k

    def check_latent(self, x: Tensor) -> str | None:
        sides = x.shape[3:] if x.ndim == 5 and not self.blur_time else x.shape[2:]
        shown = " × ".join(map(str, x.shape[2:]))
        if min(sides) <= self.blur_kernel_size // 2:
            advice = f"Set blur_kernel_size to at most {2 * min(sides) - 1}" if min(sides) > 1 else "Sample a larger latent"
            raise ValueError(
                f"A latent of {shown} is too small for blur_kernel_size={self.blur_kernel_size}: the blur reflects at the borders, "
                f"so each side must be longer than {self.blur_kernel_size // 2}. {advice}, or switch SAG off with sag_scale=0."
            )
        if self.blur_kernel_size == 1 or self.blur_sigma == 0:
            setting = "blur_kernel_size=1" if self.blur_kernel_size == 1 else "blur_sigma=0"
            return f"{setting} blurs nothing, so SAG changes nothing. Set a larger value, or sag_scale=0 to save its cost."
        return None

    def ask(self, call: Call) -> Sequence[Ask]:
        return [Ask(call.x - call.last(like=call.x), call.uncond)] if self.one_pass else []

    def look(self, call: Call) -> None:
        call.remember(self._delta(call, self._mask(call)).to(call.x.dtype))

    def direction(self, call: Call, answers: Sequence[Tensor]) -> Tensor:
        if not self.one_pass:
            blur = {name: call.options[name] for name in ("blur_sigma", "mask_threshold")}
            guidance = self_attention_guidance(
                call.u, call.x, call.saliency, call.denoise, blur_kernel_size=self.kernel(call.x), **blur
            )
            call.keep(saliency=call.saliency, mask=guidance.mask, degraded=guidance.degraded, reevaluated=guidance.reevaluated)
            return guidance.direction
        [r], before, mask = answers, call.last(like=call.x), self._mask(call)
        d, delta = call.u - before.to(call.u.dtype), self._delta(call, mask)
        call.remember(delta.to(call.x.dtype))
        call.keep(saliency=call.saliency, mask=mask, degraded=d, reevaluated=r)
        return (d - r) * overlap(before, delta).to(d.dtype)

    def _mask(self, call: Call) -> Tensor:
        return attention_mask(call.saliency, call.options["mask_threshold"], call.u.shape[2:])

    def _delta(self, call: Call, mask: Tensor) -> Tensor:
        """δ = u − d: the part that the blur removes from this call's prediction."""
        return call.u - degrade(call.u, mask, call.options["blur_sigma"], self.kernel(call.x))
