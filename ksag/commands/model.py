"""The interface of a model that `ksag sample` can sample."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ksag import Direction


class Model(Protocol):
    """A denoiser, its conditioning for each seed, and its decoder from latents to pictures.

    Everything follows from the seed, so that a picture does not depend on the batch or on the other pictures.
    """

    @property
    def denoiser(self) -> nn.Module: ...

    @property
    def cond_key(self) -> str | None:
        """As for `GuidedDenoiser`."""

    @property
    def recommended(self) -> Iterable[Direction]:
        """Settings to use where the user gives none. A scale of 0 is for a direction that is off by default."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w) of a latent."""

    @property
    def autocast(self) -> torch.dtype:
        """The dtype for `torch.autocast`; float32 is without autocast."""

    @property
    def prompts(self) -> Sequence[str]:
        """What the pictures show, by `for_seed`."""

    @property
    def negative_prompt(self) -> str | None:
        """None is the model's default."""

    @property
    def cond_scale(self) -> float: ...

    @property
    def own_schedule(self) -> str:
        """A1111's name for the schedule of `sigmas(steps, "model")`."""

    @property
    def fields(self) -> Mapping[str, str]:
        """The model's other settings, under the names of `infotext`."""

    def sigmas(self, steps: int, schedule: str) -> Tensor:
        """(at most steps + 1,) noise levels, the last one 0; `schedule` is "model", "karras" or "exponential"."""

    def conditioning(self, seeds: Sequence[int]) -> dict[str, Any]:
        """cond, uncond and cond_scale, where the model takes them."""

    def around(self, guided: nn.Module) -> nn.Module:
        """The denoiser for the sampler: `guided`, or a wrapper of it."""

    def start(self) -> Tensor | None:
        """(1, c, h, w), the latent that the noise is added to; None for zeros."""

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """A picture of each latent."""


def for_seed(items: Sequence[Any], seed: int) -> Any:
    """The seed's item, where consecutive seeds take the items one after the other.

    >>> [for_seed(["cat", "dog"], seed) for seed in range(3)]
    ['cat', 'dog', 'cat']
    """
    return items[seed % len(items)]
