"""A Stable Diffusion pipeline of diffusers: prompts, pictures to start from, masks."""

import functools
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import k_diffusion as K
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from ksag.adapters import diffusers
from ksag.commands.model import for_seed
from ksag.model.conditioning import join

COND_SCALE, STRENGTH = 7.5, 0.75
"""Where the user gives none."""


class Pipeline:
    """A `ksag.commands.model.Model`.

    Args:
        path_or_id: what `ksag.adapters.diffusers.load` takes.
        device: where it computes.
        dtype: what it computes in.
        cond_scale: None is 7.5.
        prompt, prompts: what to show; a file with a prompt on each line.
        negative_prompt: what not to show.
        size: (height, width) in pixels.
        image: the picture to start from, which is scaled and cropped to the size.
        strength: how much of it to change.
        mask: where to change it: white.
        clip_skip: as A1111 counts: 1 is the last layer, and XL's default is 2.
        config: for a single file, as `load` takes it.
        offload: whether only the part that works is on the device.
    """

    cond_key = None
    recommended: Mapping[str, Any] = MappingProxyType({})
    autocast = torch.float32  # the weights have the dtype

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
        image: Path | None = None,
        strength: float | None = None,
        mask: Path | None = None,
        clip_skip: int = 1,
        config: str | None = None,
        offload: bool = False,
    ):
        self.prompts = _prompts(prompt, prompts)
        if image is None and (mask is not None or strength is not None):
            raise click.UsageError("--mask and --strength are for a picture to start from: give --image.")
        if offload and device.type == "cpu":
            raise click.UsageError(
                "--offload keeps on the GPU what works and all else on the CPU; on a CPU there is nothing to gain."
            )
        self.pipe = diffusers.load(path_or_id, config=config, dtype=dtype, device=None if offload else device)
        _check(self.pipe, path_or_id, mask)
        fingerprint = _fingerprint(self.pipe.unet)
        self.skipped = _skipped(self.pipe, clip_skip)
        if offload:
            self.pipe.enable_model_cpu_offload(device=device)
        self.denoiser = diffusers.denoiser(self.pipe)
        self.own_schedule = "Uniform"
        if isinstance(self.denoiser, diffusers.EDMDenoiser):
            self.own_schedule = self.pipe.scheduler.config.sigma_schedule.capitalize()
        self.negative_prompt = negative_prompt
        self.cond_scale = COND_SCALE if cond_scale is None else cond_scale
        self.strength = STRENGTH if image and strength is None else strength or 1.0

        picture = _open(image).convert("RGB") if image else None
        self.size = _size(self.pipe, size, picture)
        self.picture = _fitted(picture, self.size) if picture else None
        self.mask = _fitted(_open(mask).convert("L").resize(picture.size), self.size) if mask and picture else None
        scale = self.pipe.vae_scale_factor
        self.shape = (self.pipe.vae.config.latent_channels, self.size[0] // scale, self.size[1] // scale)
        self.fields = {
            "Size": f"{self.size[1]}x{self.size[0]}",
            "Model": _name(path_or_id),
            "UNet fingerprint": fingerprint,
            **({"Clip skip": str(clip_skip)} if self.skipped else {}),
            **({"Denoising strength": str(self.strength), "Init image hash": _hash(image)} if image else {}),
            **({"Mask hash": _hash(mask)} if mask else {}),
        }
        self._encoded = functools.lru_cache(maxsize=64)(self._encode)

    def sigmas(self, steps: int, schedule: str) -> Tensor:
        model, device = self.denoiser, self.denoiser.sigmas.device
        ends = float(model.sigma_min), float(model.sigma_max)
        if schedule == "karras":
            sigmas = K.sampling.get_sigmas_karras(steps, *ends, device=device)
        elif schedule == "exponential":
            sigmas = K.sampling.get_sigmas_exponential(steps, *ends, device=device)
        else:
            sigmas = model.get_sigmas(steps)
        left = round(steps * self.strength)
        if left < 2:
            raise click.UsageError(
                f"--strength {self.strength:g} leaves {left} of {steps} steps, and it takes 2: give more --steps."
            )
        return sigmas[-left - 1 :]

    def conditioning(self, seeds: Sequence[int]) -> dict[str, Any]:
        conds, unconds = zip(*(self._encoded(for_seed(self.prompts, seed)) for seed in seeds), strict=True)
        tokens = math.lcm(*(side["encoder_hidden_states"].shape[1] for side in conds))
        cond, uncond = (join(*(_of_length(side, tokens) for side in sides)) for sides in (conds, unconds))
        return {"cond": cond, "uncond": uncond, "cond_scale": self.cond_scale}

    def _encode(self, prompt: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Alone, because in a list its tokens would depend on the other prompts'."""
        cond, uncond = diffusers.conditioning(self.pipe, prompt, self.negative_prompt, clip_skip=self.skipped, size=self.size)
        if self._concat is not None:
            cond, uncond = cond | {"concat": self._concat}, uncond | {"concat": self._concat}
        return cond, uncond

    @functools.cached_property
    def _concat(self) -> Tensor | None:
        """(1, 5, h, w), for an inpainting UNet: the mask, and the latent of the picture without what it covers."""
        if self.pipe.unet.config.in_channels != 9 or self.picture is None or self.mask is None:
            return None
        covered = to_tensor(self.mask)[None] >= 0.5
        visible = (to_tensor(self.picture)[None] * 2 - 1) * ~covered
        latent = self._encoded_by_vae(visible.to(self.denoiser.sigmas.device))
        covers = (self._latent_mask > 0).to(latent.dtype)  # also a little: what is hidden is to be painted
        return torch.cat([covers, latent], dim=1)

    @functools.cached_property
    def _latent_mask(self) -> Tensor:
        """(1, 1, h, w), from 0, which stays, to 1."""
        assert self.mask is not None
        small = self.mask.resize((self.shape[2], self.shape[1]), Image.Resampling.BOX)
        return to_tensor(small)[None].to(self.denoiser.sigmas.device)

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
        self.pipe.maybe_free_model_hooks()  # --offload would keep the VAE on the GPU while the UNet works
        return latent

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        # one by one, because a VAE takes more memory than the UNet
        made = [diffusers.decode(self.pipe, latent[None], pil=True)[0] for latent in latents]
        self.pipe.maybe_free_model_hooks()
        if self.picture is None or self.mask is None:
            return made
        return [Image.composite(picture, self.picture, self.mask) for picture in made]


class Masked(nn.Module):
    """A denoiser that paints where the mask is 1, and elsewhere answers with the latent that is to stay."""

    def __init__(self, inner_model: nn.Module, latent: Tensor, mask: Tensor):
        super().__init__()
        self.inner_model, self.latent, self.mask = inner_model, latent, mask

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        return torch.lerp(self.latent, self.inner_model(x, sigma, **kwargs), self.mask)


def _prompts(prompt: Sequence[str], file: Path | None) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()] if file else []
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--prompts {file}: the file is not UTF-8 text. Save it in that encoding.") from error
    if not (found := [*prompt, *filter(None, lines)]):
        raise click.UsageError(f"{file} holds no prompt." if file else "--pipeline needs a --prompt, or a file of --prompts.")
    return found


def _check(pipe: Any, path_or_id: str, mask: Path | None) -> None:
    """That the command has options for all that the pipeline needs."""
    name = f"{path_or_id} is a {type(pipe).__name__}"
    if getattr(pipe, "controlnet", None) is not None:
        raise click.UsageError(
            f"{name}, whose ControlNet needs a picture. The command has no option for it: use Python, see docs/diffusers.md."
        )
    if pipe.unet.config.in_channels == 9 and mask is None:
        raise click.UsageError(f"{name}, which is for inpainting: give --image and --mask.")
    if getattr(pipe.unet.config, "time_cond_proj_dim", None):
        raise click.UsageError(
            f"{name}, whose UNet takes its guidance scale as an input (LCM). The command has no option for it: use Python."
        )


def _skipped(pipe: Any, clip_skip: int) -> int | None:
    """`--clip-skip` → that of `conditioning`. XL's default is the last layer but one, which A1111 and ComfyUI call 2."""
    encoders = [encoder for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if encoder is not None]
    layers = min((encoder.config.num_hidden_layers for encoder in encoders), default=clip_skip)
    if clip_skip > layers:
        raise click.UsageError(f"--clip-skip {clip_skip}: the text encoder has {layers} layers.")
    return max(0, clip_skip - (2 if hasattr(pipe, "text_encoder_2") else 1)) or None


def _name(path_or_id: str) -> str:
    """The hub id, or what the folder or the file is called, wherever it lies."""
    if not os.path.exists(path_or_id):
        return path_or_id
    path = Path(os.path.abspath(path_or_id))  # a link keeps its name, because the hub's cache links to files named by their hash
    return path.stem if path.is_file() else path.name


def _open(path: Path) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(path))


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled to (height, width); what another aspect leaves over at two sides is cut off."""
    return ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)


def _size(pipe: Any, size: tuple[int, int] | None, picture: Image.Image | None) -> tuple[int, int]:
    """(height, width) in pixels; by default the area that the model was trained at, in the aspect of the picture."""
    scale = pipe.vae_scale_factor
    if size is None:
        aspect = picture.width / picture.height if picture else 1.0
        height, width = (max(1, round(pipe.unet.config.sample_size * side)) for side in (aspect**-0.5, aspect**0.5))
        return height * scale, width * scale
    if size[0] % scale or size[1] % scale:
        nearest = "x".join(str(max(1, round(side / scale)) * scale) for side in size[::-1])
        raise click.UsageError(f"--size {size[1]}x{size[0]}: both must be multiples of {scale}, such as {nearest}.")
    return size


def _of_length(side: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A prompt's tokens, repeated up to so many: their shares of the attention to them are as before."""
    text = side["encoder_hidden_states"]
    return side | {"encoder_hidden_states": text.repeat(1, tokens // text.shape[1], 1)}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]


def _fingerprint(model: nn.Module) -> str:
    """Tells models apart that go by the same name, by the beginning of every tensor: gigabytes need not be read."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:16].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:10]
