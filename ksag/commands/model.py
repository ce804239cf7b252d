"""What `ksag sample` asks of a model, of whatever kind."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn


class Model(Protocol):
    """A denoiser, what it is conditioned on for each seed, and how its latents become pictures.

    All follows from the seed, so that a seed's picture depends neither on the batch nor on what else is made.
    """

    @property
    def denoiser(self) -> nn.Module: ...

    @property
    def cond_key(self) -> str | None:
        """As `SAGDenoiser` takes it."""

    @property
    def recommended(self) -> Mapping[str, Any]:
        """Keywords of `SAGDenoiser`, where the user gives none."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w) of a latent."""

    @property
    def autocast(self) -> torch.dtype:
        """What to compute in under `torch.autocast`; float32 is without."""

    @property
    def prompts(self) -> Sequence[str]:
        """What the pictures show, in turn: see `in_turn`."""

    @property
    def negative_prompt(self) -> str | None:
        """None is what the model takes for none."""

    @property
    def cond_scale(self) -> float: ...

    @property
    def own_schedule(self) -> str:
        """What `sigmas(steps, "model")` gives, by A1111's name."""

    @property
    def fields(self) -> Mapping[str, str]:
        """What else makes the pictures, under the names of `infotext`."""

    def sigmas(self, steps: int, schedule: str) -> Tensor:
        """(steps + 1,) noise levels, or the last of them, down to 0; `schedule` is "model", "karras" or "exponential"."""

    def conditioning(self, seeds: Sequence[int]) -> dict[str, Any]:
        """cond, uncond and cond_scale, as far as the model takes them."""

    def around(self, guided: nn.Module) -> nn.Module:
        """The denoiser that the sampler gets: `guided`, or what has to stand between."""

    def start(self) -> Tensor | None:
        """(1, c, h, w), the latent that the noise is added to; None for none."""

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """What a person looks at."""


def in_turn(things: Sequence[Any], seed: int) -> Any:
    """
    >>> [in_turn(["cat", "dog"], seed) for seed in range(3)]
    ['cat', 'dog', 'cat']
    """
    return things[seed % len(things)]
