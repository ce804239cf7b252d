"""Seeds → latents → pictures, with one model and one sampler."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ksag import Direction, GuidedDenoiser
from ksag import images as picture
from ksag.commands.model import Model
from ksag.samplers import sample


@dataclass(frozen=True)
class Sampling:
    """
    Args:
        model: the model.
        guided: a wrapper of its denoiser.
        sampler: one of `ksag.samplers.SAMPLERS`.
        sigmas: (steps + 1,) noise levels, on the model's device.
        zoom: enlarges the pictures this many times.
        on_step: called with the number of each step, from 0.
    """

    model: Model
    guided: GuidedDenoiser
    sampler: str
    sigmas: Tensor
    zoom: int = 1
    on_step: Callable[[int], Any] = lambda i: None

    def latents(self, seeds: Sequence[int], **args: Any) -> Tensor:
        """(len(seeds), c, h, w); `args` go to every call of `guided`. Values that are infinite or NaN are a ValueError."""
        model, device = self.model, self.sigmas.device
        # outside, because PyTorch compiles and captures the model under the autocast that its call is under
        with torch.no_grad(), torch.autocast(device.type, model.autocast, enabled=model.autocast != torch.float32):
            latents = sample(
                self.sampler, model.around(self.guided.run()), model.shape, self.sigmas, seeds,
                {**model.conditioning(seeds), **args}, lambda info: self.on_step(info["i"]), model.start(),
            )  # fmt: skip
        whole = latents.isfinite().flatten(1).all(dim=1).tolist()
        if bad := dict.fromkeys(str(seed) for seed, is_finite in zip(seeds, whole, strict=True) if not is_finite):
            raise ValueError(f"The samples of seeds {', '.join(bad)} are infinite or NaN. Give lower scales, or --dtype float32.")
        return latents

    def pictures(self, seeds: Sequence[int], **args: Any) -> list[Image.Image]:
        images = self.model.pictures(self.latents(seeds, **args))
        return [ImageOps.scale(image, self.zoom, Image.Resampling.LANCZOS) for image in images]

    def compared(self, seeds: Sequence[int]) -> list[Image.Image]:
        """Plain next to guided, from the same noise."""
        label = " + ".join(direction.name for direction in self.guided.directions)
        both = zip(self.pictures(seeds, **off(self.guided.directions)), self.pictures(seeds), strict=True)
        return [picture.compare(plain, guided, label) for plain, guided in both]


def off(directions: Sequence[Direction]) -> dict[str, float]:
    """Keywords of a call that switch the directions off.

    >>> from ksag import PAG, SAG
    >>> off([SAG(), PAG()])
    {'sag_scale': 0.0, 'pag_scale': 0.0}
    """
    return {word: 0.0 for direction in directions for word, setting in direction.keywords.items() if setting == "scale"}


def warn_if_idle(sigmas: Tensor, directions: Sequence[Direction]) -> None:
    """Warns on the terminal of directions that act at no step: with few steps, none may fall into the sigma range."""
    levels = sigmas[:-1].tolist()
    for direction in directions:
        low, high = direction.sigma_range
        if not any(low <= level <= high for level in levels):
            shown = ", ".join(f"{level:.3g}" for level in levels)
            flag = "--sigma-range" if direction.name == "SAG" else f"--{direction.name.lower()}-sigma-range"
            click.echo(
                f"Warning: {direction.name} acts at no step. Its sigma range is {low:g} to {high:g}, and the steps begin at "
                f"{shown}. Give more --steps, or `ksag sample` another {flag}.",
                err=True,
            )


def batches(seeds: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """The seeds in batches, each with the seeds to sample: if there are several, the last one is filled up to the same size.

    Models are compiled and captured for one size, and a GPU rounds the same way only in batches of one size.

    >>> list(batches([1, 2, 3], 2))
    [([1, 2], [1, 2]), ([3], [3, 3])]
    >>> list(batches([1], 2))
    [([1], [1])]
    """
    for first in range(0, len(seeds), size):
        batch = seeds[first : first + size]
        filler = [batch[-1]] * (size - len(batch)) if len(seeds) > size else []
        yield batch, [*batch, *filler]
