"""A diffusers UNet or transformer and its scheduler as a k-diffusion denoiser."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import k_diffusion as K
import torch
from torch import Tensor, nn

from ksag.adapters.diffusers.controlnet import ControlledUNet
from ksag.adapters.diffusers.flow import ScheduledFlowDenoiser, shift_of, tokens_of
from ksag.adapters.diffusers.networks import call_network, execution_device, network_of
from ksag.adapters.diffusers.transformers import spatial
from ksag.flow import FlowDenoiser

Scalings: TypeAlias = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""(sigma, sigma_data) → (c_skip, c_out): denoised = c_skip · x + c_out · F(c_in · x), with c_in = 1 / √(σ² + σ_data²)."""


def epsilon(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """For a UNet that predicts the noise: denoised = x − σ · ε."""
    return torch.ones_like(sigma), -sigma


def v_prediction(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """For a UNet that predicts v (Salimans and Ho, arXiv:2202.00512): denoised = x · c_skip − σ · σ_data / √(σ² + σ_data²) · v."""
    c_skip, c_out = edm(sigma, sigma_data)
    return c_skip, -c_out


def sample(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """For a UNet that predicts the denoised latent itself."""
    return torch.zeros_like(sigma), torch.ones_like(sigma)


def edm(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """For a UNet that is trained with the preconditioning of Karras et al. (arXiv:2206.00364), table 1."""
    variance = sigma**2 + sigma_data**2
    return sigma_data**2 / variance, sigma * sigma_data / variance**0.5


PREDICTIONS: dict[str, Scalings] = {"epsilon": epsilon, "v_prediction": v_prediction, "sample": sample}
"""A discrete scheduler's `prediction_type` → its scalings."""

EDM_PREDICTIONS: dict[str, Scalings] = {"epsilon": edm, "v_prediction": v_prediction}
"""An EDM scheduler's, which calls its own preconditioning "epsilon"."""

LOWEST_ALPHA = 4.8973451890853435e-08
"""alphas_cumprod where it would be 0, at a zero terminal SNR: the sigma there is 4518.77, as in ComfyUI and A1111."""


class _Preconditioned(K.external.DiscreteSchedule):  # type: ignore[misc]
    """c_skip · x + c_out · F(c_in · x), with the scalings for F's prediction."""

    def __init__(self, unet: nn.Module, sigmas: Tensor, scalings: Scalings, sigma_data: float, quantize: bool):
        super().__init__(sigmas, quantize)
        self.inner_model, self.scalings, self.sigma_data = unet, scalings, sigma_data

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The denoised latent, (b, c, h, w), of `input` (b, c, h, w) at `sigma` (b,); `kwargs` are the UNet's."""
        # in float32 at least: from 256 on, the square of sigma is infinite in float16
        dtype = torch.promote_types(input.dtype, torch.float32)
        x, sigma = input.to(dtype), sigma.to(dtype)
        c_in = (sigma**2 + self.sigma_data**2) ** -0.5
        c_skip, c_out, c_in = (K.utils.append_dims(c, x.ndim) for c in (*self.scalings(sigma, self.sigma_data), c_in))
        denoised: Tensor = x * c_skip + call_network(self.inner_model, x * c_in, self.sigma_to_t(sigma), **kwargs) * c_out
        return denoised.to(input.dtype)


class DiscreteDenoiser(_Preconditioned):
    """A diffusers UNet trained at discrete timesteps, with k-diffusion's own schedule between them.

    Args:
        unet: the UNet.
        alphas_cumprod: (timesteps,) from the lowest noise to the highest.
        scalings: what its prediction means.
        quantize: round sigma to the nearest timestep the model was trained at, rather than interpolate.
    """

    def __init__(self, unet: nn.Module, alphas_cumprod: Tensor, scalings: Scalings, quantize: bool = False):
        super().__init__(unet, ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5, scalings, 1.0, quantize)


class EDMDenoiser(_Preconditioned):
    """A diffusers UNet trained at any noise level, whose timestep is log(σ) / 4.

    Args:
        unet: the UNet.
        sigmas: (timesteps,) from the lowest to the highest.
        schedule: (n, sigma_min, sigma_max, device=...) → n noise levels and a zero, such as `K.sampling.get_sigmas_karras`.
        scalings: what its prediction means.
        sigma_data: the standard deviation of the latents it was trained on.
    """

    def __init__(self, unet: nn.Module, sigmas: Tensor, schedule: Callable[..., Tensor], scalings: Scalings, sigma_data: float):
        super().__init__(unet, sigmas, scalings, sigma_data, quantize=False)
        self.schedule = schedule

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """(n + 1,) noise levels from the highest to 0, spaced as the scheduler spaces them; without n, all of them."""
        if n is None:
            return torch.cat([self.sigmas.flip(0), self.sigmas.new_zeros(1)])
        return self.schedule(n, float(self.sigma_min), float(self.sigma_max), device=self.sigmas.device)

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """(b,) noise levels → (b,) timesteps of the UNet."""
        return sigma.log() / 4

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """(b,) timesteps of the UNet → (b,) noise levels."""
        return (t * 4).exp()


def denoiser(
    model: Any,
    scheduler: Any = None,
    *,
    quantize: bool = False,
    size: tuple[int, int] | None = None,
    shift: float | None = None,
) -> DiscreteDenoiser | EDMDenoiser | FlowDenoiser:
    """A k-diffusion denoiser with `sigmas`, `get_sigmas`, `sigma_min`, `sigma_max`, `sigma_to_t` and `t_to_sigma`.

    Its conditioning is a dict of the network's keywords: wrap it with `ksag.SAGDenoiser(denoiser, cond_key=None)`.
    Its noise levels are on the device where the network computes; put `x` and `sigma` there as well.

    A network trained by flow matching becomes a `ksag.FlowDenoiser`. Latents are (b, c, h, w) for every model, Flux included. At a
    zero terminal SNR, the last sigma is 4518.77 instead of infinite, as in ComfyUI and A1111. A pipeline's ControlNet is included;
    `conditioning(pipe, prompt, control=picture)` passes it the picture.

    Args:
        model: a diffusers pipeline with `unet` or `transformer`, and `scheduler`; or a UNet or a transformer.
        scheduler: the diffusers scheduler of a network; only its noise levels and its `prediction_type` are used.
        quantize: round sigma to the nearest timestep the model was trained at instead of interpolating. Discrete schedules only.
        size: (height, width) of the picture in pixels, on which some schedulers' shift depends (Flux's); by default the size that
            the model was trained on.
        shift: the shift of sigma; by default the scheduler's. Flow matching only.

    Raises:
        TypeError: no scheduler, no network, or a transformer that was not trained by flow matching.
        ValueError: noise levels, a prediction, a transformer or a part of a pipeline that ksag does not support.
    """
    network, scheduler = (model, scheduler) if isinstance(model, nn.Module) else _parts_of(model, scheduler)
    name = type(scheduler).__name__
    if scheduler is None:
        raise TypeError(f"A {type(network).__name__} alone has no noise levels: call denoiser(network, scheduler).")
    flow = "FlowMatch" in name or getattr(scheduler.config, "use_flow_sigmas", False)
    if not flow and shift is not None:
        raise ValueError(f"shift= (--shift) is for flow matching, and {name} has other noise levels: leave it out.")
    if quantize and (flow or hasattr(scheduler, "precondition_outputs")):
        raise ValueError(f"quantize=True rounds to a timestep, and a model for {name} has none: leave it out.")
    if getattr(scheduler.config, "timestep_type", "discrete") != "discrete":
        kind = scheduler.config.timestep_type
        raise ValueError(f"{name} has timestep_type={kind!r}; for such a model give an EDMEulerScheduler.")
    if not flow:
        if network is not model and not _is_unet(network):
            raise TypeError(f"A {type(model).__name__} has a transformer that was not trained by flow matching.")
        return _edm(network, scheduler) if hasattr(scheduler, "precondition_outputs") else _discrete(network, scheduler, quantize)
    if scheduler.config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise ValueError(
            f"{name} has flow sigmas, but prediction_type={scheduler.config.prediction_type!r}: expected flow_prediction."
        )
    if shift is None:
        shift = shift_of(scheduler, None if network is model else tokens_of(model, size))
    return ScheduledFlowDenoiser(network if _is_unet(network) else spatial(network), scheduler, shift)


def _discrete(unet: nn.Module, scheduler: Any, quantize: bool) -> DiscreteDenoiser:
    name = type(scheduler).__name__
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        raise ValueError(
            f"{name} has no alphas_cumprod, from which the noise levels follow. Give the scheduler that the model was trained "
            f"with, such as DDIMScheduler."
        )
    scalings = _of_prediction(scheduler, PREDICTIONS)
    lowest, highest = float(alphas_cumprod.min()), float(alphas_cumprod.max())
    if not 0 <= lowest <= highest < 1:
        raise ValueError(f"{name} has alphas_cumprod from {lowest:g} to {highest:g}, so that a sigma is zero or undefined.")
    if lowest < 1e-6 and scalings is epsilon:
        raise ValueError(
            f"{name} ends at a zero terminal SNR, where a prediction of the noise says nothing about the picture. Load it with "
            f"rescale_betas_zero_snr=False, or prediction_type='v_prediction' if the model predicts v."
        )
    schedule = alphas_cumprod.float().clamp(min=LOWEST_ALPHA).to(execution_device(unet))
    return DiscreteDenoiser(unet, schedule, scalings, quantize)


def _edm(unet: nn.Module, scheduler: Any) -> EDMDenoiser:
    config = scheduler.config
    spacings = {
        "karras": functools.partial(K.sampling.get_sigmas_karras, rho=config.rho),
        "exponential": K.sampling.get_sigmas_exponential,
    }
    schedule = spacings[config.sigma_schedule]
    sigmas = schedule(config.num_train_timesteps, config.sigma_min, config.sigma_max, device=execution_device(unet))[:-1].flip(0)
    return EDMDenoiser(unet, sigmas, schedule, _of_prediction(scheduler, EDM_PREDICTIONS), config.sigma_data)


def _of_prediction(scheduler: Any, known: dict[str, Scalings]) -> Scalings:
    prediction = scheduler.config.prediction_type
    if prediction not in known:
        raise ValueError(f"{type(scheduler).__name__} has prediction_type={prediction!r}; ksag knows {', '.join(known)}.")
    return known[prediction]


def _is_unet(network: nn.Module) -> bool:
    return isinstance(network, ControlledUNet) or "UNet" in type(network).__name__


def _parts_of(pipe: Any, scheduler: Any) -> tuple[nn.Module, Any]:
    """What makes a pipeline's predictions, and its scheduler."""
    name, network = type(pipe).__name__, network_of(pipe)
    if network is None or not hasattr(pipe, "scheduler"):
        raise TypeError(f"Expected a diffusers pipeline, or a UNet or transformer and its scheduler; got a {name}.")
    if getattr(pipe, "adapter", None) is not None:
        raise ValueError(
            f"A {name} has a T2I-Adapter. Call denoiser(pipe.unet, pipe.scheduler), and give cond and uncond its residuals: "
            f"down_intrablock_additional_residuals=pipe.adapter(picture)."
        )
    controlnet = getattr(pipe, "controlnet", None)
    if controlnet is not None and type(controlnet).__name__ not in ("ControlNetModel", "MultiControlNetModel"):
        raise ValueError(
            f"A {name} has a {type(controlnet).__name__}, which ksag does not support, only a ControlNetModel. Without it: "
            f"denoiser(network, pipe.scheduler)."
        )
    return network if controlnet is None else ControlledUNet(network, controlnet), scheduler or pipe.scheduler
