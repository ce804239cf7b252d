"""A k-diffusion model in a safetensors file: the bundled one, or the user's."""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import k_diffusion as K
import torch
from PIL import Image
from torch import Tensor

from ksag import images as picture
from ksag import zoo
from ksag.commands.model import Model, for_seed

Words = tuple[str | None, ...]
"""A sample's category and style, or its class; None is any."""


def chosen(option: str, wanted: str | None, known: Sequence[str]) -> list[str | None]:
    """The names in the user's list, each in full or in part; "any" is None. No list means all names.

    >>> chosen("--category", "animals, any", ["Food & Drink", "Animals & Nature"])
    ['Animals & Nature', None]
    """
    if wanted is None:
        return list(known)
    return [None if word == "any" else _named(option, word, known) for word in map(str.strip, wanted.split(","))]


def _named(option: str, word: str, known: Sequence[str]) -> str:
    if word in known:
        return word
    alike = [name for name in known if word.lower() in name.lower()]
    if len(alike) != 1:
        raise click.UsageError(f"{option}: {word!r} is {'several' if alike else 'none'} of {', '.join(alike or known)}.")
    return alike[0]


class Checkpoint(Model):
    """A k-diffusion model.

    Args:
        path: the file; None is the bundled one.
        device: where to put the model.
        dtype: of its computations.
        cond_scale: None is 1, which evaluates no uncond.
        category, style: for a model of emoji, such as the bundled one.
        classes: for a model that takes classes, one-hot (`mapping_cond`) or by number (`class_cond`).
    """

    own_schedule = "Karras"

    def __init__(
        self,
        path: Path | None,
        device: torch.device,
        dtype: torch.dtype,
        *,
        cond_scale: float | None = None,
        category: str | None = None,
        style: str | None = None,
        classes: str | None = None,
    ):
        path = path or zoo.EMOJI
        self.device, self.autocast = device, dtype
        self.denoiser, config = zoo.load(path, device), zoo.load_config(path)
        self.config, dataset = config["model"], config["dataset"]
        self.shape = (self.config["input_channels"], *self.config["input_size"])
        if "categories" in dataset:
            if classes is not None:
                raise click.UsageError(f"--classes: {path.name} has categories and styles. Give --category and --style.")
            self.known = [dataset["categories"], dataset["styles"]]
            styles = chosen("--style", "any" if style is None else style, dataset["styles"])
            both = itertools.product(styles, chosen("--category", category, dataset["categories"]))
            self.words: list[Words] = [(c, s) for s, c in both]
        else:
            if category is not None or style is not None:
                raise click.UsageError(f"--category and --style: {path.name} has classes. Give --classes.")
            self.known = [dataset.get("classes") or [str(i) for i in range(dataset["num_classes"])]]
            if classes is not None and not self.known[0]:
                raise click.UsageError(f"--classes: {path.name} has no classes.")
            self.words = [(word,) for word in chosen("--classes", classes, self.known[0]) or [None]]
        self.prompts = [", ".join(word for word in words if word) for words in self.words]
        self.cond_scale = 1.0 if cond_scale is None else cond_scale
        width = self.config.get("mapping_cond_dim", 0)
        by_number = self.config["type"].startswith("image_transformer") and dataset["num_classes"]
        self.cond_key = "mapping_cond" if width else "class_cond" if by_number else None
        if width and width != sum(map(len, self.known)):
            raise click.UsageError(
                f"{path.name} takes {width} numbers as mapping_cond, which are not its classes: use Python to sample it."
            )
        if self.cond_scale != 1 and self.cond_key is None:
            raise click.UsageError(f"--cond-scale: {path.name} takes no classes, so there is nothing to scale.")
        self.fields = {
            "Size": f"{self.shape[2]}x{self.shape[1]}",
            "Model": path.stem,
            "Model hash": hashlib.sha256(path.read_bytes()).hexdigest()[:10],
        }

    def sigmas(self, steps: int, schedule: str) -> Tensor:
        levels = K.sampling.get_sigmas_exponential if schedule == "exponential" else K.sampling.get_sigmas_karras
        sigmas: Tensor = levels(steps, self.config["sigma_min"], self.config["sigma_max"], device=self.device)
        return sigmas

    def conditioning(self, seeds: Sequence[int]) -> dict[str, Any]:
        if self.cond_key is None:
            return {}
        words = [for_seed(self.words, seed) for seed in seeds]
        if self.cond_scale == 1:
            return {"cond": self._cond(words)}
        uncond = self._cond([(None,) * len(self.known)] * len(words))
        return {"cond": self._cond(words), "uncond": uncond, "cond_scale": self.cond_scale}

    def _cond(self, words: Sequence[Words]) -> Tensor:
        parts = []
        for column, known in zip(zip(*words, strict=True), self.known, strict=True):
            indices = [None if word is None else known.index(word) for word in column]
            if self.cond_key == "class_cond":  # any is the number after the last class
                return torch.tensor([len(known) if index is None else index for index in indices], device=self.device)
            parts.append(zoo.one_hot(indices, len(known), self.device))
        return torch.cat(parts, dim=1)

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        return [picture.to_image(x) for x in latents]
