"""A pipeline of diffusers: prompts, pictures to start from, masks."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import k_diffusion as K
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from ksag.adapters import diffusers
from ksag.adapters.diffusers.networks import network_of
from ksag.adapters.diffusers.transformer_prompts import DISTILLED, GUIDANCE
from ksag.commands import inputs
from ksag.commands.model import Model, for_seed
from ksag.flow import FlowDenoiser
from ksag.model.conditioning import join

COND_SCALES = {"UNet2DConditionModel": 7.5, "SD3Transformer2DModel": 4.5}
STRENGTH = 0.75
SPACINGS = {"karras": K.sampling.get_sigmas_karras, "exponential": K.sampling.get_sigmas_exponential}


class Pipeline(Model):
    """A pipeline of diffusers.

    Args:
        path_or_id: a folder, hub id or file, as `ksag.adapters.diffusers.load` takes it.
        device: the device that it computes on.
        dtype: the dtype that it computes in.
        cond_scale: by default 7.5 for a UNet and 4.5 for Stable Diffusion 3. For Flux dev, the guidance that it takes as an input.
        prompt, prompts: what to show; a file with a prompt on each line.
        negative_prompt: what not to show.
        size: (height, width) in pixels.
        shift: of the noise levels, for flow matching; by default the scheduler's.
        image: the picture to start from, which is scaled and cropped to the size.
        strength: how much of it to change.
        mask: where to change it: white.
        clip_skip: as A1111 counts: 1 is the last layer. The default of XL and 3 is 2.
        config: for a single file, as `load` takes it.
        offload: whether to keep only the active part of the pipeline on the device.
    """

    cond_key = None

    def __init__(
        self,
        path_or_id: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        cond_scale: float | None = None,
        prompt: Sequence[str] = (),
        prompts: Path | None = None,
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
        shift: float | None = None,
        image: Path | None = None,
        strength: float | None = None,
        mask: Path | None = None,
        clip_skip: int = 1,
        config: str | None = None,
        offload: bool = False,
    ):
        self.prompts = inputs.prompts(prompt, prompts)
        if image is None and (mask is not None or strength is not None):
            raise click.UsageError("--mask and --strength are for a picture to start from: give --image.")
        if offload and device.type == "cpu":
            raise click.UsageError("--offload moves the parts that are not active from the GPU to the CPU: leave it out on a CPU.")
        picture, covers = inputs.picture_and_mask(image, mask)
        self.pipe = diffusers.load(path_or_id, config=config, dtype=dtype, device=None if offload else device)
        network = network_of(self.pipe)
        self.distilled = type(network).__name__ in DISTILLED
        _check(self.pipe, path_or_id, mask, negative_prompt, cond_scale)
        self.skipped = _skipped(self.pipe, clip_skip)
        fingerprint = inputs.fingerprint(network)
        if offload:
            self.pipe.enable_model_cpu_offload(device=device)

        self.size = inputs.size(self.pipe, size, picture)
        self.picture = inputs.fitted(picture, self.size) if picture else None
        self.mask = inputs.fitted(covers, self.size) if covers else None
        self.strength = STRENGTH if image and strength is None else strength or 1.0
        scale = self.pipe.vae_scale_factor
        self.shape = (self.pipe.vae.config.latent_channels, self.size[0] // scale, self.size[1] // scale)

        self.denoiser = diffusers.denoiser(self.pipe, size=self.size, shift=shift)
        self.own_schedule = _own_schedule(self.pipe.scheduler, self.denoiser)
        self.negative_prompt = negative_prompt
        self.cond_scale = COND_SCALES.get(type(network).__name__, 1.0) if cond_scale is None or self.distilled else cond_scale
        zeros = negative_prompt is None and self.pipe.config.get("force_zeros_for_empty_prompt")
        self.guidance = None
        if getattr(network.config, "guidance_embeds", False):
            self.guidance = GUIDANCE if cond_scale is None else cond_scale
        self.fields = {
            "Size": f"{self.size[1]}x{self.size[0]}",
            "Model": inputs.name(path_or_id),
            "Model fingerprint": fingerprint,
            **({} if self.guidance is None else {"Distilled CFG Scale": f"{self.guidance:g}"}),
            **({"Shift": f"{self.denoiser.shift:.6g}"} if isinstance(self.denoiser, FlowDenoiser) else {}),
            **({"Clip skip": str(clip_skip)} if self.skipped else {}),
            **({"Uncond": "zeros"} if zeros else {}),
            **({"Denoising strength": str(self.strength), "Init image hash": inputs.file_hash(image)} if image else {}),
            **({"Mask hash": inputs.file_hash(mask)} if mask else {}),
        }
        self._encoded = functools.lru_cache(maxsize=64)(self._encode)

    def sigmas(self, steps: int, schedule: str) -> Tensor:
        model, device = self.denoiser, self.denoiser.sigmas.device
        if schedule == "model":
            sigmas: Tensor = model.get_sigmas(steps)
        elif isinstance(model, FlowDenoiser):  # in t, as diffusers' schedulers do it
            t = model.sigma_to_t(model.get_sigmas(steps))
            sigmas = model.t_to_sigma(SPACINGS[schedule](steps, float(t[-2]), float(t[0]), device=device))
        else:
            sigmas = SPACINGS[schedule](steps, float(model.sigma_min), float(model.sigma_max), device=device)
        left = round(steps * self.strength)
        if left < 2:
            raise click.UsageError(
                f"--strength {self.strength:g} leaves {left} of {steps} steps, and it takes 2: give more --steps."
            )
        return sigmas[-left - 1 :]

    def conditioning(self, seeds: Sequence[int]) -> dict[str, Any]:
        conds, unconds = zip(*(self._encoded(for_seed(self.prompts, seed)) for seed in seeds), strict=True)
        if unconds[0] is None:
            return {"cond": join(*conds)}
        tokens = math.lcm(*(side["encoder_hidden_states"].shape[1] for side in conds))
        cond, uncond = (join(*(_of_length(side, tokens) for side in sides)) for sides in (conds, unconds))
        return {"cond": cond, "uncond": uncond, "cond_scale": self.cond_scale}

    def _encode(self, prompt: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Alone, because in a list its tokens would depend on the other prompts'."""
        cond, uncond = diffusers.conditioning(
            self.pipe, prompt, self.negative_prompt, clip_skip=self.skipped, size=self.size, guidance=self.guidance
        )
        if self._concat is not None:
            cond, uncond = cond | {"concat": self._concat}, uncond | {"concat": self._concat}
        return cond, uncond

    @functools.cached_property
    def _concat(self) -> Tensor | None:
        """(1, 5, h, w), for an inpainting UNet: the mask, and the latent of the picture without what it covers."""
        if network_of(self.pipe).config.in_channels != 9 or self.picture is None or self.mask is None:
            return None
        covered = to_tensor(self.mask)[None] >= 0.5
        visible = (to_tensor(self.picture)[None] * 2 - 1) * ~covered
        latent = self._encoded_by_vae(visible.to(self.denoiser.sigmas.device))
        covers = (self._latent_mask > 0).to(latent.dtype)  # everything that is hidden, even in part, gets painted
        return torch.cat([covers, latent], dim=1)

    @functools.cached_property
    def _latent_mask(self) -> Tensor:
        """(1, 1, h, w), from 0, which stays, to 1."""
        assert self.mask is not None
        small: Tensor = to_tensor(self.mask.resize((self.shape[2], self.shape[1]), Image.Resampling.BOX))
        return small[None].to(self.denoiser.sigmas.device)

    def around(self, guided: nn.Module) -> nn.Module:
        start = self.start()
        if self.mask is None or start is None or self._concat is not None:
            return guided
        return Masked(guided, start, self._latent_mask)

    def start(self) -> Tensor | None:
        return self._latent

    @functools.cached_property
    def _latent(self) -> Tensor | None:
        return None if self.picture is None else self._encoded_by_vae(self.picture).to(self.denoiser.sigmas.device)

    def _encoded_by_vae(self, picture: Tensor | Image.Image) -> Tensor:
        latent = diffusers.encode(self.pipe, picture)
        self.pipe.maybe_free_model_hooks()  # --offload would keep the VAE on the GPU during sampling
        return latent

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        # one by one, because a VAE takes more memory than the UNet
        made = [diffusers.decode(self.pipe, latent[None], pil=True)[0] for latent in latents]
        self.pipe.maybe_free_model_hooks()
        if self.picture is None or self.mask is None:
            return made
        return [Image.composite(picture, self.picture, self.mask) for picture in made]


class Masked(nn.Module):
    """A denoiser that paints where the mask is 1, and returns the original latent elsewhere."""

    def __init__(self, inner_model: nn.Module, latent: Tensor, mask: Tensor):
        super().__init__()
        self.inner_model, self.latent, self.mask = inner_model, latent, mask

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        return torch.lerp(self.latent, self.inner_model(x, sigma, **kwargs), self.mask)


def _check(pipe: Any, path_or_id: str, mask: Path | None, negative_prompt: str | None, cond_scale: float | None) -> None:
    """That the pipeline and the options fit each other."""
    name, config = f"{path_or_id} is a {type(pipe).__name__}", network_of(pipe).config
    if getattr(pipe, "controlnet", None) is not None:
        raise click.UsageError(
            f"{name}, whose ControlNet needs a picture. The command has no option for it: use Python, see docs/diffusers.md."
        )
    if config.in_channels == 9 and mask is None:
        raise click.UsageError(f"{name}, which is for inpainting: give --image and --mask.")
    if getattr(config, "time_cond_proj_dim", None):
        raise click.UsageError(
            f"{name}, whose UNet takes its guidance scale as an input (LCM). The command has no option for it: use Python."
        )
    if type(network_of(pipe)).__name__ in DISTILLED:
        if negative_prompt is not None:
            raise click.UsageError(f"{name}, which is sampled without a negative prompt: leave --negative-prompt out.")
        if cond_scale is not None and not config.guidance_embeds:
            raise click.UsageError(f"{name} without a guidance scale: leave --cond-scale out.")


def _skipped(pipe: Any, clip_skip: int) -> int | None:
    """`--clip-skip` → the argument of `conditioning`. XL's and 3's default is the last layer but one, A1111's and ComfyUI's 2."""
    if type(network_of(pipe)).__name__ in DISTILLED:
        if clip_skip > 1:
            raise click.UsageError(f"--clip-skip: a {type(pipe).__name__} does not use the layers of its CLIP text encoder.")
        return None
    encoders = [encoder for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if encoder is not None]
    layers = min((encoder.config.num_hidden_layers for encoder in encoders), default=clip_skip)
    if clip_skip > layers:
        raise click.UsageError(f"--clip-skip {clip_skip}: the text encoder has {layers} layers.")
    return max(0, clip_skip - (2 if hasattr(pipe, "text_encoder_2") else 1)) or None


def _own_schedule(scheduler: Any, denoiser: nn.Module) -> str:
    """A1111's name of the schedule."""
    if isinstance(denoiser, diffusers.EDMDenoiser):
        return str(scheduler.config.sigma_schedule).capitalize()
    if not isinstance(denoiser, FlowDenoiser):
        return "Uniform"
    spacings = ("karras", "exponential", "beta") if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" else ()
    return next((name.capitalize() for name in spacings if scheduler.config.get(f"use_{name}_sigmas")), "Simple")


def _of_length(side: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The tokens of a prompt, repeated up to `tokens`; a UNet attends to them as before."""
    text = side["encoder_hidden_states"]
    return side | {"encoder_hidden_states": text.repeat(1, tokens // text.shape[1], 1)}
