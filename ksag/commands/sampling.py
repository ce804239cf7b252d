"""Seeds → latents → pictures, for one model and one way of sampling it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch
from PIL import Image
from torch import Tensor

from ksag import SAGDenoiser
from ksag import images as picture
from ksag.commands.model import Model
from ksag.samplers import sample


@dataclass(frozen=True)
class Sampling:
    """
    Args:
        model: what is sampled.
        guided: a wrapper of its denoiser.
        sampler: one of `ksag.samplers.SAMPLERS`.
        sigmas: (steps + 1,) noise levels, on the model's device.
        zoom: how many times the pictures are enlarged.
        on_step: is told the number of each step, from 0.
    """

    model: Model
    guided: SAGDenoiser
    sampler: str
    sigmas: Tensor
    zoom: int = 1
    on_step: Callable[[int], Any] = lambda i: None

    def latents(self, seeds: Sequence[int], **args: Any) -> Tensor:
        """(len(seeds), c, h, w); `args` go to every call of `guided`."""
        model, device = self.model, self.sigmas.device
        # outside, because PyTorch compiles and captures the model under the autocast that its call is under
        with torch.no_grad(), torch.autocast(device.type, model.autocast, enabled=model.autocast != torch.float32):
            return sample(
                self.sampler, model.around(self.guided), model.shape, self.sigmas, seeds, {**model.conditioning(seeds), **args},
                lambda info: self.on_step(info["i"]), model.start(),
            )  # fmt: skip

    def pictures(self, seeds: Sequence[int], **args: Any) -> list[Image.Image]:
        return [picture.enlarge(image, self.zoom) for image in self.model.pictures(self.latents(seeds, **args))]

    def compared(self, seeds: Sequence[int]) -> list[Image.Image]:
        """Plain beside SAG, from the same noise."""
        both = zip(self.pictures(seeds, sag_scale=0.0), self.pictures(seeds), strict=True)
        return [picture.compare(plain, with_sag) for plain, with_sag in both]


def warn_if_idle(sigmas: Tensor, sag: dict[str, Any]) -> None:
    """Says so on the terminal where no step begins at a noise level at which SAG acts: few steps can step over them."""
    low, high = sag["sigma_range"]
    levels = sigmas[:-1].tolist()
    if sag["sag_scale"] != 0 and not any(low <= level <= high for level in levels):
        shown = ", ".join(f"{level:.3g}" for level in levels)
        click.echo(
            f"No step begins where SAG acts: sigma_range is {low:g} to {high:g}, and the steps begin at {shown}. Take more "
            f"--steps, or another --sigma-range.",
            err=True,
        )


def batches(seeds: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """The seeds in batches, and what to sample for each: where there are several, the last is filled up to the others' size.

    A model that is compiled or captured is so for one size, and one GPU rounds the same way only in batches of one size.

    >>> list(batches([1, 2, 3], 2))
    [([1, 2], [1, 2]), ([3], [3, 3])]
    >>> list(batches([1], 2))
    [([1], [1])]
    """
    for first in range(0, len(seeds), size):
        batch = seeds[first : first + size]
        filler = [batch[-1]] * (size - len(batch)) if len(seeds) > size else []
        yield batch, [*batch, *filler]
