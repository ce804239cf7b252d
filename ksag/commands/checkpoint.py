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
from torch import Tensor, nn

from ksag import images as picture
from ksag import zoo
from ksag.commands.model import for_seed
from ksag.commands.options import nearest

COND_SCALE = 1.0
"""Where the user gives none."""

Words = tuple[str | None, ...]
"""A sample's category and style, or its class; None is any."""


def chosen(option: str, wanted: str | None, known: Sequence[str]) -> list[str | None]:
    """The names in the user's list: each part is a name, a part of a name, a number, or any (None). No list means all names.

    >>> chosen("--category", "animals, 0, any", ["Food & Drink", "Animals & Nature"])
    ['Animals & Nature', 'Food & Drink', None]
    """
    if wanted is None:
        return list(known)
    words: list[str | None] = []
    for word in (part.strip() for part in wanted.split(",")):
        alike = [name for name in known if word and word.lower() in name.lower()]
        if word in known:
            words.append(word)
        elif word.isdigit() and int(word) < len(known):
            words.append(known[int(word)])
        elif word == "any":
            words.append(None)
        elif len(alike) == 1:
            words.append(alike[0])
        else:
            hint = f"Did you mean {nearest(word, alike or known)}?" if word else f"It has {', '.join(known)}."
            raise click.UsageError(f"{option}: the model has no {word!r}. {hint}")
    return words


class Checkpoint:
    """A `ksag.commands.model.Model`.

    Args:
        path: the file; None is the bundled one.
        device: where to put the model.
        dtype: of its computations.
        cond_scale: None is 1, which evaluates no uncond.
        category, style: for a model of emoji, such as the bundled one.
        classes: for a model that takes classes, one-hot (`mapping_cond`) or by number (`class_cond`).
    """

    negative_prompt = None
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
        sag_alone = zoo.SETTINGS["sag_scale"]
        self.recommended = [] if path else zoo.directions(sag_scale=sag_alone, pag_scale=0.0)
        path = path or zoo.EMOJI
        self.device, self.autocast = device, dtype
        self.denoiser, config = zoo.load(path, device), zoo.load_config(path)
        self.config, dataset = config["model"], config["dataset"]
        self.shape = (self.config["input_channels"], *self.config["input_size"])
        self.words = _words_of(path, dataset, category, style, classes)
        self.prompts = [", ".join(word for word in words if word) for words in self.words]
        self.known = [dataset["categories"], dataset["styles"]] if "categories" in dataset else [_classes_of(dataset)]
        self.cond_scale = COND_SCALE if cond_scale is None else cond_scale
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

    def around(self, guided: nn.Module) -> nn.Module:
        return guided

    def start(self) -> None:
        return None

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        return [picture.to_image(x) for x in latents]


def _classes_of(dataset: dict[str, Any]) -> list[str]:
    return dataset.get("classes") or [str(i) for i in range(dataset["num_classes"])]


def _words_of(path: Path, dataset: dict[str, Any], category: str | None, style: str | None, classes: str | None) -> list[Words]:
    """For `for_seed`."""
    if "categories" in dataset:
        if classes is not None:
            raise click.UsageError(f"--classes: {path.name} has categories and styles. Give --category and --style.")
        styles = chosen("--style", "any" if style is None else style, dataset["styles"])
        return [(c, s) for s, c in itertools.product(styles, chosen("--category", category, dataset["categories"]))]
    if category is not None or style is not None:
        raise click.UsageError(f"--category and --style are the bundled model's. {path.name} has classes: give --classes.")
    known = _classes_of(dataset)
    if classes is not None and not known:
        raise click.UsageError(f"--classes: {path.name} has no classes.")
    return [(word,) for word in chosen("--classes", classes, known) or [None]]
