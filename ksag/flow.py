"""A model trained by flow matching as a k-diffusion denoiser."""

import math
from typing import Any

import torch
from torch import Tensor, nn

SIGMA_MAX = 9999.0
"""The largest sigma, that of t = 0.9999; at t = 1 it is infinite."""


class FlowDenoiser(nn.Module):
    """Wraps a flow matching model for k-diffusion's samplers.

        denoiser = ksag.FlowDenoiser(model, shift=3.0)
        guided = ksag.SAGDenoiser(denoiser)
        sigmas = denoiser.get_sigmas(28)
        K.sampling.sample_dpmpp_2m(guided, noise * sigmas[0], sigmas, extra_args={"cond": c, "uncond": uc, "cond_scale": 4.5})

    The model was trained on x_t = (1 − t) x_0 + t ε and predicts the velocity v = ε − x_0. With x = x_t / (1 − t) and
    sigma = t / (1 − t), x is x_0 + sigma · ε, as k-diffusion's samplers expect it. The change of coordinates is exact:
    Euler takes the same steps in both, and the ancestral and SDE samplers need no changes.

    Sampling starts at t = 0.9999 instead of 1, because sigma is infinite there. The first sigma is 9999. Compared with Euler
    steps from t = 1, this changed the images of small random models by 0.01 % to 0.1 % of their norm. Only
    `K.sampling.sample_heun` needs a shorter first step: set `sigmas[0] = 10 * sigmas[1]`. On normally distributed data, with 24
    steps, this reduces its error from 40 to 1.3 % without a shift, and from 1.2 to 0.13 % with a shift of 3.

    A shift s multiplies every sigma by s (Esser et al. 2024, arXiv:2403.03206, section 5.3.2).

    Keep x and the sigmas in float32, even if the model is in half precision: x is up to 10,000 times as large as the image.
    The model gets x_t in its own dtype.

    Args:
        inner_model: maps (x_t, t, **kwargs) to v. x_t and v are (b, c, *spatial); t is (b,), from 0 to 1, in float32 or
            float64. If a model expects timesteps up to 1000, wrap it in a module that multiplies t by 1000.
        shift: the shift of the noise levels that `sigmas` and `get_sigmas` return; more than 1 means more steps at high noise.

    Raises:
        ValueError: the shift is not a finite number above 0.
        TypeError: from a call, if the model returns anything but one tensor shaped like x.

    >>> class Pull(nn.Module):  # towards 0, the only image that it was trained on
    ...     def forward(self, x, t):
    ...         return x / t[:, None, None, None]
    >>> denoiser = FlowDenoiser(Pull(), shift=2.0)
    >>> denoiser(torch.randn(1, 3, 8, 8) * 5, torch.tensor([5.0])).abs().max() < 1e-6
    tensor(True)
    >>> [round(sigma, 2) for sigma in denoiser.get_sigmas(4).tolist()]
    [9999.0, 6.0, 2.0, 0.67, 0.0]
    """

    is_flow = True
    """For rules that depend on the kind of model, such as `ksag.cfg.rescale`."""
    sigmas: Tensor
    """(1000,) noise levels from the lowest to the highest, at t = 0.001 to 1 before the shift."""

    def __init__(self, inner_model: nn.Module, shift: float = 1.0):
        super().__init__()
        if not 0 < shift < math.inf:
            raise ValueError(f"shift multiplies sigma: it is a finite number above 0, got {shift}.")
        self.inner_model, self.shift = inner_model, float(shift)
        self.register_buffer("sigmas", self._shifted(torch.arange(1, 1001) / 1000), persistent=False)

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """(n + 1,) noise levels from the highest to 0, uniform in t before the shift; without n, all 1,000 and a 0."""
        n = len(self.sigmas) if n is None else n
        return self._shifted(torch.arange(n, -1, -1, device=self.sigmas.device) / n)

    def _shifted(self, t: Tensor) -> Tensor:
        return (self.shift * t / (1 - t)).clamp(max=SIGMA_MAX)

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Noise levels of any shape → the t that the model gets."""
        return sigma / (1 + sigma)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The inverse of `sigma_to_t`; 9999 from t = 0.9999 on."""
        return (t / (1 - t)).clamp(max=SIGMA_MAX)

    def velocity(self, x: Tensor, t: Tensor, **kwargs: object) -> Any:
        """What the model predicts at x (b, c, *spatial) and t (b,)."""
        return self.inner_model(x.to(_dtype_of(self.inner_model, x.dtype)), t, **kwargs)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: object) -> Tensor:
        """The denoised latent, shaped like `input` (b, c, *spatial) and of its dtype; `kwargs` are passed to the model."""
        wide = torch.promote_types(input.dtype, torch.float32)
        t = self.sigma_to_t(sigma.to(wide))
        each = (-1, *[1] * (input.ndim - 1))
        x = input.to(wide) / (1 + sigma.to(wide)).view(each)
        v = self.velocity(x, t, **kwargs)
        if not isinstance(v, Tensor) or v.shape != x.shape:
            got = f"a tensor of shape {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
            raise TypeError(
                f"The model must return the velocity, a tensor of shape {tuple(x.shape)} as x_t has, got {got}. "
                f"If it takes patches, each side of x must be a multiple of theirs."
            )
        return (x - t.view(each) * v).to(input.dtype)


def _dtype_of(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of the model's weights; `default` without weights, or with weights in a storage format such as float8."""
    dtypes = (parameter.dtype for parameter in model.parameters())
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), default)
