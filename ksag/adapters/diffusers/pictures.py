"""Pictures ↔ latents, through a pipeline's VAE."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ksag.adapters.diffusers.networks import execution_device, multiple_of


def _normalisation(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and factor: the network was trained on (latents - mean) * factor."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    factor = getattr(vae.config, "scaling_factor", 1.0)
    if mean is None or std is None:
        return getattr(vae.config, "shift_factor", None) or 0.0, factor
    mean, std = (latents.new_tensor(channels).view(1, -1, 1, 1) for channels in (mean, std))
    return mean, factor / std


def _finite(values: Tensor, vae: Any) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"The VAE returned values that are infinite or NaN, in {vae.dtype}. SDXL's overflows in float16: call "
            f"pipe.vae.to(torch.float32), or torch.bfloat16. In another dtype, the latents or the weights were not finite."
        )
    return values


@torch.no_grad()
def encode(pipe: Any, images: Tensor | Image.Image | Sequence[Image.Image], *, size: tuple[int, int] | None = None) -> Tensor:
    """Pictures → latents, the mode of the VAE's posterior, shifted and scaled as the network expects. No gradients.

        latents = encode(pipe, Image.open("cat.jpg"), size=(512, 768))

    Args:
        pipe: the pipeline; only its `vae` is used, in its dtype, where it computes.
        images: (b, 3, H, W) in [-1, 1], or a PIL picture, or several of one size.
        size: (height, width) in pixels that PIL pictures are resized to; by default theirs, rounded down to a
            multiple of 8, or of 16 for a transformer.

    Returns:
        (b, c, h, w), usually an eighth of H and W, of the dtype of `images`; float32 for PIL pictures, where the VAE computes.

    Raises:
        TypeError, ValueError: no pictures, or of another shape; a VAE that overflows.
    """
    vae, of_video = pipe.vae, hasattr(pipe.vae.config, "temperal_downsample")  # as Qwen-Image's: (b, c, frames, h, w)
    if not isinstance(images, Tensor):
        images = _from_pil(pipe, images, size).to(execution_device(vae))
    elif size is not None:
        raise ValueError("size= is for PIL pictures; resize a tensor with torch.nn.functional.interpolate.")
    elif images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Expected pictures of shape (b, 3, H, W) in [-1, 1], got {tuple(images.shape)}.")
    pixels = images.to(execution_device(vae), vae.dtype)
    latents = vae.encode(pixels.unsqueeze(2) if of_video else pixels).latent_dist.mode()
    latents = _finite(latents.squeeze(2) if of_video else latents, vae).to(images.dtype)
    mean, factor = _normalisation(vae, latents)
    return (latents - mean) * factor


def _from_pil(pipe: Any, images: Image.Image | Sequence[Image.Image], size: tuple[int, int] | None) -> Tensor:
    """(b, 3, H, W) in [-1, 1], float32, on the CPU."""
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise TypeError(f"Expected a tensor (b, 3, H, W) in [-1, 1], or PIL pictures, got {images!r}.")
    if size is None and len({picture.size for picture in pictures}) > 1:
        raise ValueError(f"PIL pictures of several sizes, {sorted({p.size for p in pictures})}: give size=(height, width).")
    step = multiple_of(pipe)
    height, width = size or (max(side // step, 1) * step for side in pictures[0].size[::-1])
    rows: Tensor = pipe.image_processor.preprocess([picture.convert("RGB") for picture in pictures], height, width)
    return rows


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, *, pil: bool = False) -> Any:
    """Latents → pictures. No gradients.

    Args:
        pipe: the pipeline; only its `vae` is used, in its dtype, where it computes.
        latents: (b, c, h, w), as a sampler returns them.
        pil: whether to return PIL pictures.

    Returns:
        (b, 3, H, W), about [-1, 1], of the dtype of `latents`; or a list of b PIL pictures.

    Raises:
        ValueError: the VAE overflows, as SDXL's does in float16.
    """
    vae, of_video = pipe.vae, hasattr(pipe.vae.config, "temperal_downsample")
    mean, factor = _normalisation(vae, latents)
    raw = (latents / factor + mean).to(execution_device(vae), vae.dtype)
    (images,) = vae.decode(raw.unsqueeze(2) if of_video else raw, return_dict=False)
    images = _finite(images.squeeze(2) if of_video else images, vae)
    return pipe.image_processor.postprocess(images, output_type="pil") if pil else images.to(latents.dtype)
