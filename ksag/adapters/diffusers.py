"""A diffusers UNet and its scheduler, or a whole Stable Diffusion pipeline, as a k-diffusion denoiser.

denoiser = ksag.adapters.diffusers.denoiser(pipe)
guided = ksag.SAGDenoiser(denoiser, cond_key=None)
cond, uncond = ksag.adapters.diffusers.conditioning(pipe, "a photograph of a cat", size=(512, 512))
"""

from typing import Any

import k_diffusion as K
import torch
from torch import Tensor, nn


def call_unet(unet: nn.Module, x: Tensor, t: Tensor, concat: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The UNet's prediction in the latent's dtype, computed in the UNet's own.

    Args:
        unet: a diffusers UNet.
        x: (b, c, h, w), scaled as the UNet expects it.
        t: (b,) timesteps, whole or between two.
        concat: (b, c', h, w), the further channels of an inpainting UNet.
        **kwargs: the UNet's own, such as `encoder_hidden_states`.

    Returns:
        (b, c, h, w); a learned variance is left out.

    Raises:
        TypeError: the UNet has an IP-Adapter, or takes its guidance scale as an input, and the keyword for it is missing.
    """
    _check_keywords(_config_of(unet), kwargs)
    both = x if concat is None else torch.cat([x, concat.to(x.dtype)], dim=1)
    # Copies, because diffusers takes a T2I-Adapter's residuals out of the list that it is given.
    kwargs = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
    prediction = unet(both.to(_computing_dtype(unet)), t, return_dict=False, **kwargs)[0]
    return prediction[:, : x.shape[1]].to(x.dtype)


def _config_of(model: nn.Module) -> Any:
    """The UNet's, also if the model is a module around it."""
    for module in model.modules():
        if hasattr(module, "config"):
            return module.config
    return None


def _check_keywords(config: Any, kwargs: dict[str, Any]) -> None:
    size = getattr(config, "time_cond_proj_dim", None)
    if size and kwargs.get("timestep_cond") is None:
        raise TypeError(
            f"This UNet takes its guidance scale as an input, which is missing. Give cond and uncond a timestep_cond, (b, {size}): "
            f"pipe.get_guidance_scale_embedding(torch.full((b,), guidance_scale - 1), {size})."
        )
    ip_adapter = getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj"
    if ip_adapter and "image_embeds" not in (kwargs.get("added_cond_kwargs") or {}):
        raise TypeError(
            "This UNet has an IP-Adapter, whose picture is missing. Give cond and uncond its embeddings, one tensor for each "
            "IP-Adapter, as added_cond_kwargs={'image_embeds': [...]}: pipe.prepare_ip_adapter_image_embeds(picture, None, device, "
            "n, True) gives them, uncond's rows before cond's. Or call pipe.unload_ip_adapter()."
        )


def _computing_dtype(model: nn.Module) -> torch.dtype:
    """Of the layer that takes the latent: its weights', or what layerwise casting casts them to."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        casting = registry and registry.get_hook("layerwise_casting")
        if casting:
            return casting.compute_dtype
        for parameter in module.parameters(recurse=False):
            return parameter.dtype
    raise TypeError(f"{type(model).__name__} has no weights: expected a diffusers UNet.")


def _execution_device(model: nn.Module) -> torch.device:
    """Where the model computes: not where its weights wait, if accelerate or diffusers offloads them."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device


class EpsDenoiser(K.external.DiscreteEpsDDPMDenoiser):
    """A diffusers UNet that predicts the noise (`prediction_type` "epsilon"): denoised = x − σ · ε(x / √(σ² + 1), t)."""

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The predicted noise, (b, c, h, w): what k-diffusion's wrapper asks for."""
        return call_unet(self.inner_model, *args, **kwargs)


class VDenoiser(K.external.DiscreteVDDPMDenoiser):
    """A diffusers UNet that predicts v ("v_prediction"): denoised = x / (σ² + 1) − σ / √(σ² + 1) · v(x / √(σ² + 1), t)."""

    def get_v(self, *args: Any, **kwargs: Any) -> Tensor:
        """The predicted v, (b, c, h, w): what k-diffusion's wrapper asks for."""
        return call_unet(self.inner_model, *args, **kwargs)


class SampleDenoiser(K.external.DiscreteEpsDDPMDenoiser):
    """A diffusers UNet that predicts the denoised latent itself ("sample")."""

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The denoised latent, (b, c, h, w), of `input` (b, c, h, w) at `sigma` (b,)."""
        c_in = K.utils.append_dims(self.get_scalings(sigma)[1], input.ndim)
        return call_unet(self.inner_model, input * c_in, self.sigma_to_t(sigma), **kwargs)


PREDICTIONS = {"epsilon": EpsDenoiser, "v_prediction": VDenoiser, "sample": SampleDenoiser}
"""A scheduler's `prediction_type` → the denoiser for it."""


def denoiser(model: Any, scheduler: Any = None, *, quantize: bool = False) -> K.external.DiscreteSchedule:
    """A k-diffusion denoiser with `sigmas`, `get_sigmas`, `sigma_min`, `sigma_max` and `sigma_to_t`, all k-diffusion's own.

    Its conditioning is a dict of the UNet's keywords: wrap it with `ksag.SAGDenoiser(denoiser, cond_key=None)`.
    Its schedule lies where the UNet computes, offloaded or not: so must `x` and `sigma`.

    A T2I-Adapter's residuals go into cond and uncond, as `down_intrablock_additional_residuals`. A ControlNet, which looks at
    every step's latent, needs a module that runs it and the UNet; its picture goes into cond and uncond, as `controlnet_cond`:

        class Controlled(torch.nn.Module):
            def __init__(self, unet, controlnet):
                super().__init__()
                self.unet, self.controlnet = unet, controlnet

            def forward(self, x, t, encoder_hidden_states, controlnet_cond, added_cond_kwargs=None, **kwargs):
                inputs = {"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": added_cond_kwargs}
                down, middle = self.controlnet(x, t, controlnet_cond=controlnet_cond, return_dict=False, **inputs)
                residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
                return self.unet(x, t, **inputs, **residuals, **kwargs)

        denoiser(Controlled(pipe.unet, pipe.controlnet), pipe.scheduler)

    Args:
        model: a diffusers pipeline with `unet` and `scheduler`, or a UNet.
        scheduler: the diffusers scheduler of a UNet; only its noise levels and its `prediction_type` are used.
        quantize: round sigma to the nearest timestep the model was trained at, rather than interpolate.

    Raises:
        TypeError: a UNet without a scheduler, or neither a UNet nor a pipeline with one.
        ValueError: a scheduler whose sigmas k-diffusion cannot represent (flow matching, EDM, or a zero terminal SNR),
            an unknown `prediction_type`, or a pipeline with a ControlNet or a T2I-Adapter.

    >>> import ksag
    >>> from diffusers import DDIMScheduler, UNet2DModel
    >>> unet = UNet2DModel(
    ...     sample_size=8, block_out_channels=(32, 32), norm_num_groups=8, layers_per_block=1,
    ...     down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ... )
    >>> guided = ksag.SAGDenoiser(denoiser(unet, DDIMScheduler()), cond_key=None)
    >>> guided(torch.randn(1, 3, 16, 16), torch.ones(1)).shape
    torch.Size([1, 3, 16, 16])
    """
    unet, scheduler = (model, scheduler) if isinstance(model, nn.Module) else _parts_of(model, scheduler)
    if scheduler is None:
        raise TypeError(f"A {type(unet).__name__} alone has no noise levels: give its scheduler too, denoiser(unet, scheduler).")
    name = type(scheduler).__name__
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        raise ValueError(
            f"{name} has no alphas_cumprod, so its noise levels are not those of a discrete DDPM, which k-diffusion's denoisers "
            f"are made for. Give the scheduler that the model was trained with, such as DDIMScheduler."
        )
    if not bool(((alphas_cumprod > 0) & (alphas_cumprod < 1)).all()):
        raise ValueError(
            f"{name} has alphas_cumprod from {alphas_cumprod.min():g} to {alphas_cumprod.max():g}, so that a sigma is zero or "
            f"infinite, which k-diffusion cannot represent. Load it with rescale_betas_zero_snr=False."
        )
    prediction = scheduler.config.prediction_type
    if prediction not in PREDICTIONS:
        raise ValueError(f"{name} has prediction_type={prediction!r}; ksag knows {', '.join(PREDICTIONS)}.")
    schedule = alphas_cumprod.to(_execution_device(unet), torch.float32)
    return PREDICTIONS[prediction](unet, schedule, quantize=quantize)


def _parts_of(pipe: Any, scheduler: Any) -> tuple[nn.Module, Any]:
    """A pipeline's UNet and scheduler, if these are all that makes its predictions."""
    name = type(pipe).__name__
    if not isinstance(getattr(pipe, "unet", None), nn.Module):
        raise TypeError(f"Expected a diffusers pipeline with a UNet (`unet`), or a UNet and its scheduler; got a {name}.")
    if getattr(pipe, "controlnet", None) is not None:
        raise ValueError(
            f"A {name} has a ControlNet, which a denoiser of its UNet would leave out. Give a module that runs both, as "
            f"help(ksag.adapters.diffusers.denoiser) shows it: denoiser(Controlled(pipe.unet, pipe.controlnet), pipe.scheduler). "
            f"To go without the ControlNet, denoiser(pipe.unet, pipe.scheduler)."
        )
    if getattr(pipe, "adapter", None) is not None:
        raise ValueError(
            f"A {name} has a T2I-Adapter, which a denoiser of its UNet would leave out. Call denoiser(pipe.unet, pipe.scheduler), "
            f"and give cond and uncond its residuals: down_intrablock_additional_residuals=pipe.adapter(picture)."
        )
    return pipe.unet, scheduler or pipe.scheduler


def conditioning(
    pipe: Any,
    prompt: str | list[str],
    negative_prompt: str | list[str] | None = None,
    *,
    n: int = 1,
    size: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """cond and uncond of a Stable Diffusion 1.x, 2.x or XL pipeline, `n` rows for each prompt.

        cond, uncond = conditioning(pipe, ["a cat", "a dog"], "blurry", n=2)   # four rows each

    Args:
        pipe: the pipeline.
        prompt: one, or a list of them.
        negative_prompt: what uncond is made of: one, or one for each prompt; by default what the pipeline takes for none,
            an empty one, or zeros (as a rule SDXL's).
        n: pictures for each prompt.
        size: (height, width) in pixels, which SDXL is told; by default what it was trained at.

    Returns:
        Two dicts of the UNet's keywords, for a `SAGDenoiser` with `cond_key=None`: `encoder_hidden_states`
            (rows, tokens, channels), and for SDXL `added_cond_kwargs`.
    """
    count = 1 if isinstance(prompt, str) else len(prompt)
    if isinstance(negative_prompt, str) and not isinstance(prompt, str):
        negative_prompt = [negative_prompt] * count
    cond, uncond, *pooled = pipe.encode_prompt(
        prompt,
        device=_execution_device(pipe.unet),
        num_images_per_prompt=n,
        do_classifier_free_guidance=True,
        negative_prompt=negative_prompt,
    )
    results = {"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond}
    if pooled:
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        height, width = size or (side, side)
        time_ids = cond.new_tensor([height, width, 0, 0, height, width]).expand(count * n, 6)
        for result, text_embeds in zip(results, pooled, strict=True):
            result["added_cond_kwargs"] = {"text_embeds": text_embeds, "time_ids": time_ids}
    return results


def _normalisation(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and factor: the UNet knows the VAE's latents as (latents - mean) * factor."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return 0.0, vae.config.scaling_factor
    mean, std = (latents.new_tensor(channels).view(1, -1, 1, 1) for channels in (mean, std))
    return mean, vae.config.scaling_factor / std


@torch.no_grad()
def encode(pipe: Any, images: Tensor) -> Tensor:
    """Pictures → latents, the mode of the VAE's posterior, scaled as the UNet expects (`scaling_factor`). No gradients.

    Args:
        pipe: the pipeline; only its `vae` is used, in its dtype, where it computes.
        images: (b, 3, H, W) in [-1, 1].

    Returns:
        (b, 4, h, w), as a rule an eighth of H and W, of the dtype of `images`.
    """
    vae = pipe.vae
    latents = vae.encode(images.to(_execution_device(vae), vae.dtype)).latent_dist.mode().to(images.dtype)
    mean, factor = _normalisation(vae, latents)
    return (latents - mean) * factor


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Latents → pictures. No gradients. (SDXL's VAE overflows in float16: give it float32.)

    Args:
        pipe: the pipeline; only its `vae` is used, in its dtype, where it computes.
        latents: (b, 4, h, w), as a sampler returns them.

    Returns:
        (b, 3, H, W), about [-1, 1], of the dtype of `latents`.
    """
    vae = pipe.vae
    mean, factor = _normalisation(vae, latents)
    raw = latents / factor + mean
    return vae.decode(raw.to(_execution_device(vae), vae.dtype), return_dict=False)[0].to(latents.dtype)
