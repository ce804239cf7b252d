"""Pictures ↔ latents, through a pipeline's VAE."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor

from ksag.adapters.diffusers.unets import execution_device


def _normalisation(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and factor: the UNet knows the VAE's latents as (latents - mean) * factor."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return 0.0, vae.config.scaling_factor
    mean, std = (latents.new_tensor(channels).view(1, -1, 1, 1) for channels in (mean, std))
    return mean, vae.config.scaling_factor / std


def _finite(values: Tensor, vae: Any) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"The VAE returned values that are infinite or NaN, in {vae.dtype}. SDXL's overflows in float16: call "
            f"pipe.vae.to(torch.float32), or torch.bfloat16."
        )
    return values


@torch.no_grad()
def encode(pipe: Any, images: Tensor | Image.Image | Sequence[Image.Image], *, size: tuple[int, int] | None = None) -> Tensor:
    """Pictures → latents, the mode of the VAE's posterior, scaled as the UNet expects (`scaling_factor`). No gradients.

        latents = encode(pipe, Image.open("cat.jpg"), size=(512, 768))

    Args:
        pipe: the pipeline; only its `vae` is used, in its dtype, where it computes.
        images: (b, 3, H, W) in [-1, 1], or a PIL picture, or several of one size.
        size: (height, width) in pixels that PIL pictures are resized to; by default theirs, down to a multiple of 8.

    Returns:
        (b, 4, h, w), as a rule an eighth of H and W, of the dtype of `images`; float32 for PIL pictures, where the VAE computes.

    Raises:
        TypeError: no pictures.
        ValueError: tensors of another shape, or a VAE that overflows.
    """
    vae = pipe.vae
    if not isinstance(images, Tensor):
        images = _from_pil(pipe, images, size).to(execution_device(vae))
    elif size is not None:
        raise ValueError("size= is for PIL pictures; resize a tensor with torch.nn.functional.interpolate.")
    elif images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Expected pictures of shape (b, 3, H, W) in [-1, 1], got {tuple(images.shape)}.")
    latents = vae.encode(images.to(execution_device(vae), vae.dtype)).latent_dist.mode()
    latents = _finite(latents, vae).to(images.dtype)
    mean, factor = _normalisation(vae, latents)
    return (latents - mean) * factor


def _from_pil(pipe: Any, images: Image.Image | Sequence[Image.Image], size: tuple[int, int] | None) -> Tensor:
    """(b, 3, H, W) in [-1, 1], float32, on the CPU."""
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise TypeError(f"Expected a tensor (b, 3, H, W) in [-1, 1], or PIL pictures, got {images!r}.")
    if size is None and len({picture.size for picture in pictures}) > 1:
        raise ValueError(f"PIL pictures of several sizes, {sorted({p.size for p in pictures})}: give size=(height, width).")
    return pipe.image_processor.preprocess([picture.convert("RGB") for picture in pictures], *(size or ()))


@overload
def decode(pipe: Any, latents: Tensor, *, pil: Literal[False] = False) -> Tensor: ...


@overload
def decode(pipe: Any, latents: Tensor, *, pil: Literal[True]) -> list[Image.Image]: ...


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, *, pil: bool = False) -> Tensor | list[Image.Image]:
    """Latents → pictures. No gradients. (SDXL's VAE overflows in float16, which is an error: give it float32.)

    Args:
        pipe: the pipeline; only its `vae` is used, in its dtype, where it computes.
        latents: (b, 4, h, w), as a sampler returns them.
        pil: whether to return PIL pictures.

    Returns:
        (b, 3, H, W), about [-1, 1], of the dtype of `latents`; or a list of b PIL pictures.

    Raises:
        ValueError: the VAE overflows.
    """
    vae = pipe.vae
    mean, factor = _normalisation(vae, latents)
    raw = latents / factor + mean
    images = _finite(vae.decode(raw.to(execution_device(vae), vae.dtype), return_dict=False)[0], vae)
    return pipe.image_processor.postprocess(images, output_type="pil") if pil else images.to(latents.dtype)
