"""The interface of a model that the commands sample."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn


class Model(abc.ABC):
    """A denoiser, its conditioning for each seed, and its decoder from latents to pictures.

    Everything follows from the seed, so that a picture does not depend on the batch or on the other pictures.
    """

    denoiser: Any
    """The `nn.Module`."""
    cond_key: str | None
    """As for `GuidedDenoiser`."""
    shape: tuple[int, ...]
    """(c, h, w) of a latent."""
    autocast: torch.dtype = torch.float32
    """The dtype for `torch.autocast`; float32 is without autocast."""
    prompts: Sequence[str]
    """What the pictures show, by `for_seed`."""
    negative_prompt: str | None = None
    """None is the model's default."""
    cond_scale: float
    own_schedule: str
    """A1111's name for the schedule of `sigmas(steps, "model")`."""
    fields: Mapping[str, str]
    """The model's other settings, under the names of `infotext`."""

    @abc.abstractmethod
    def sigmas(self, steps: int, schedule: str) -> Tensor:
        """(at most steps + 1,) noise levels, the last one 0; `schedule` is "model", "karras" or "exponential"."""

    @abc.abstractmethod
    def conditioning(self, seeds: Sequence[int]) -> dict[str, Any]:
        """cond, uncond and cond_scale, where the model takes them."""

    @abc.abstractmethod
    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """A picture of each latent."""

    def around(self, guided: nn.Module) -> nn.Module:
        """The denoiser for the sampler: `guided`, or a wrapper of it."""
        return guided

    def start(self) -> Tensor | None:
        """(1, c, h, w), the latent that the noise is added to; None for zeros."""
        return None


def for_seed(items: Sequence[Any], seed: int) -> Any:
    """The seed's item, where consecutive seeds take the items one after the other.

    >>> [for_seed(["cat", "dog"], seed) for seed in range(3)]
    ['cat', 'dog', 'cat']
    """
    return items[seed % len(items)]
