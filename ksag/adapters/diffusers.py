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
    """
    both = x if concat is None else torch.cat([x, concat.to(x.dtype)], dim=1)
    prediction = unet(both.to(next(unet.parameters()).dtype), t, return_dict=False, **kwargs)[0]
    return prediction[:, : x.shape[1]].to(x.dtype)


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

    Args:
        model: a diffusers pipeline with `unet` and `scheduler`, or a UNet.
        scheduler: the diffusers scheduler of a UNet; only its noise levels and its `prediction_type` are used.
        quantize: round sigma to the nearest timestep the model was trained at, rather than interpolate.

    Raises:
        TypeError: a UNet without a scheduler.
        ValueError: a scheduler whose sigmas k-diffusion cannot represent (flow matching, EDM, or a zero terminal SNR),
            or an unknown `prediction_type`.

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
    unet, scheduler = (model.unet, scheduler or model.scheduler) if hasattr(model, "unet") else (model, scheduler)
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
    device = next(unet.parameters()).device
    return PREDICTIONS[prediction](unet, alphas_cumprod.to(device, torch.float32), quantize=quantize)


def conditioning(
    pipe: Any, prompt: str | list[str], negative_prompt: str | list[str] = "", *, n: int = 1, size: tuple[int, int] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """cond and uncond of a Stable Diffusion 1.x, 2.x or XL pipeline, `n` rows for each prompt.

        cond, uncond = conditioning(pipe, ["a cat", "a dog"], "blurry", n=2)   # four rows each

    Args:
        pipe: the pipeline.
        prompt: one, or a list of them.
        negative_prompt: what uncond is made of: one, or one for each prompt.
        n: pictures for each prompt.
        size: (height, width) in pixels, which SDXL is told; by default what it was trained at.

    Returns:
        Two dicts of the UNet's keywords, for a `SAGDenoiser` with `cond_key=None`: `encoder_hidden_states`
            (rows, tokens, channels), and for SDXL `added_cond_kwargs`.
    """
    count = 1 if isinstance(prompt, str) else len(prompt)
    if isinstance(negative_prompt, str) and not isinstance(prompt, str):
        negative_prompt = [negative_prompt] * count
    device = next(pipe.unet.parameters()).device
    cond, uncond, *pooled = pipe.encode_prompt(
        prompt, device=device, num_images_per_prompt=n, do_classifier_free_guidance=True, negative_prompt=negative_prompt
    )
    results = {"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond}
    if pooled:
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        height, width = size or (side, side)
        time_ids = cond.new_tensor([height, width, 0, 0, height, width]).expand(count * n, 6)
        for result, text_embeds in zip(results, pooled, strict=True):
            result["added_cond_kwargs"] = {"text_embeds": text_embeds, "time_ids": time_ids}
    return results


@torch.no_grad()
def encode(pipe: Any, images: Tensor) -> Tensor:
    """Pictures → latents, the mode of the VAE's posterior, scaled as the UNet expects (`scaling_factor`). No gradients.

    Args:
        pipe: the pipeline; only its `vae` is used, on its device and in its dtype.
        images: (b, 3, H, W) in [-1, 1].

    Returns:
        (b, 4, h, w), as a rule an eighth of H and W, of the dtype of `images`.
    """
    vae = pipe.vae
    return vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode().to(images.dtype) * vae.config.scaling_factor


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Latents → pictures. No gradients. (SDXL's VAE overflows in float16: give it float32.)

    Args:
        pipe: the pipeline; only its `vae` is used, in its dtype.
        latents: (b, 4, h, w), as a sampler returns them, on the VAE's device.

    Returns:
        (b, 3, H, W), about [-1, 1], of the dtype of `latents`.
    """
    vae = pipe.vae
    return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].to(latents.dtype)
