"""Bad input → an error that says what came, what was expected and what to do."""

import math
from typing import Any

from torch import Tensor, nn

from ksag import conditioning


def finite(name: str, value: float) -> float:
    if not -math.inf < value < math.inf:  # math.isfinite cannot be compiled for a value that varies
        raise ValueError(f"{name} must be a finite number, got {value}.")
    return value


def blur_sigma(value: float) -> float:
    if finite("blur_sigma", value) < 0:
        raise ValueError(f"blur_sigma is a standard deviation in latent pixels, 0 (no blur) or more, got {value}.")
    return value


def blur_kernel_size(value: int) -> int:
    if not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise ValueError(f"blur_kernel_size must be an odd number of latent pixels, such as 9, got {value!r}.")
    return value


def sigma_range(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if not low <= high:
        raise ValueError(f"sigma_range is (lowest, highest) sigma, got {value}: give ({high}, {low})?")
    return low, high


def inner_model(value: Any) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"inner_model must be an nn.Module that maps (x, sigma) to the denoised latent, such as K.external.CompVisDenoiser "
            f"or K.layers.Denoiser, got {type(value).__name__}: a plain function has no layers to hook."
        )
    return value


def call(x: Tensor, sigma: Tensor, cond: Any, uncond: Any, cond_scale: float, cond_key: str | None) -> None:
    """Checks what a sampler passes to `SAGDenoiser.forward`; reads shapes only, never a tensor's values."""
    if x.ndim != 4:
        raise ValueError(f"x must be a latent of shape (b, c, h, w), got {tuple(x.shape)}.")
    batch = x.shape[0]
    if sigma.shape != (batch,):
        raise ValueError(
            f"sigma must have one noise level for each of the {batch} samples, shape ({batch},), got {tuple(sigma.shape)}: "
            f"pass sigma * x.new_ones([x.shape[0]])."
        )
    if cond is None and uncond is not None:
        raise ValueError("uncond came without cond. For an unconditional model give neither; else give both, or cond alone.")
    if uncond is None and cond_scale != 1:
        raise ValueError(
            f"cond_scale={cond_scale} guides cond away from uncond, and uncond is missing: pass uncond=..., or cond_scale=1."
        )
    if cond_key is None and cond is not None and not isinstance(cond, dict):
        raise TypeError(f"With cond_key=None, cond must be a dict of inner_model's keywords, got {type(cond).__name__}.")
    if cond is not None:
        conditioning.check(cond if uncond is None else uncond, cond, batch)


def denoised(value: Any, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"inner_model must return the denoised latent, shape {tuple(x.shape)}, got {got}. A UNet that predicts noise or v "
            f"needs a k-diffusion wrapper (K.external) around it first."
        )
    return value
