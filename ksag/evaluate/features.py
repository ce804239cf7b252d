"""Networks that turn a picture into a vector of features.

The bundled one is a small classifier of emoji of 64 × 64, trained independently of the denoiser. Inception and DINOv2 come from
torch-fidelity (the extra `ksag[evaluate]`), which downloads their weights.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ksag.zoo.files import read, write

CLASSIFIER = Path(__file__).parents[1] / "zoo/classifier.safetensors"
"""The bundled classifier of emoji."""
EXTRACTORS = {"emoji": "bundled", "inception": "inception-v3-compat", "dinov2": "dinov2-vit-b-14"}
"""The names that `load_extractor` takes, and those of torch-fidelity."""


@dataclass(frozen=True)
class Extractor:
    """Pictures (n, 3, h, w), uint8, to their features (n, d), float32."""

    name: str
    """Which features these are, with the checksum of the weights where it is known."""
    network: nn.Module
    size: tuple[int, int] | None = None
    """(h, w) that the pictures must have, or None for any."""

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"Pictures are uint8 of (n, 3, h, w), got {pictures.dtype} of {tuple(pictures.shape)}: see to_bytes.")
        if self.size is not None and tuple(pictures.shape[2:]) != self.size:
            needs, got = (f"{w} × {h}" for h, w in (self.size, pictures.shape[2:]))
            raise ValueError(f"The features {self.name} need pictures of {needs}, got {got}. Inception and DINOv2 take any size.")
        features: Tensor = self.network(pictures).float()
        return features


class Classifier(nn.Module):
    """A small convolutional classifier of emoji, with `widths` channels at 64², 32², 16² and 8². The last are the features."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256), categories: int = 8, styles: int = 7):
        super().__init__()
        first, second, third, last = widths
        self.body = nn.Sequential(
            convolution(3, first), nn.AvgPool2d(2),
            convolution(first, second), Residual(second), nn.AvgPool2d(2),
            convolution(second, third), Residual(third), nn.AvgPool2d(2),
            convolution(third, last),
        )  # fmt: skip
        self.category = nn.Linear(last, categories)
        self.style = nn.Linear(last, styles)

    def features(self, reals: Tensor) -> Tensor:
        """(n, 3, 64, 64) in [-1, 1] to (n, d)."""
        pooled: Tensor = self.body(reals).mean(dim=(2, 3))
        return pooled

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, 3, 64, 64), uint8, to (n, d)."""
        return self.features(to_reals(pictures))


def convolution(before: int, after: int) -> nn.Sequential:
    """(n, before, h, w) to (n, after, h, w)."""
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.SiLU())


class Residual(nn.Module):
    """Two convolutions, added to their input (n, width, h, w)."""

    def __init__(self, width: int):
        super().__init__()
        self.main = nn.Sequential(convolution(width, width), convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.main(x)
        return x + added


def to_reals(pictures: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_bytes(reals: Tensor) -> Tensor:
    """Values in [-1, 1] rounded as in a picture file, so that pictures in memory are judged as files are."""
    return ((reals.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_classifier(classifier: Classifier, path: str | os.PathLike[str], widths: Sequence[int], record: dict[str, Any]) -> None:
    """Writes its weights as float16, with a record of its training."""
    halves = {name: t.half() if t.is_floating_point() else t for name, t in classifier.state_dict().items()}
    write(path, halves, widths=list(widths), training=record)


def load_classifier(path: str | os.PathLike[str] = CLASSIFIER, device: str | torch.device = "cpu") -> Extractor:
    """The features of a classifier trained by `scripts/train_classifier.py`; a ValueError for a damaged file or another kind."""
    tensors, metadata = read(path)
    if "widths" not in metadata or "sha256" not in metadata:
        raise ValueError(f"{path} is not a classifier written by scripts/train_classifier.py.")
    classifier = Classifier(metadata["widths"], len(tensors["category.bias"]), len(tensors["style.bias"]))
    classifier.load_state_dict(tensors)
    return Extractor(f"emoji-{metadata['sha256'][:12]}", classifier.eval().requires_grad_(False).to(device), (64, 64))


def load_extractor(name: str, device: str | torch.device = "cpu") -> Extractor:
    """Features by name.

    Args:
        name: "emoji", the bundled classifier; "inception", the Inception-v3 of the usual FID; or "dinov2", DINOv2 ViT-B/14.
        device: where to put the network.

    Raises:
        ImportError, OSError, ValueError: torch-fidelity or a file is missing, a file is damaged, or there is no such name.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"There are no features called {name!r}: give one of {', '.join(EXTRACTORS)}.")
    if name == "emoji":
        return load_classifier(device=device)
    try:
        from torch_fidelity.utils import create_feature_extractor
    except ImportError as error:
        raise ImportError(f"{name}'s features come from torch-fidelity. In a clone of ksag: pip install '.[evaluate]'") from error
    layer = {"inception": "2048", "dinov2": "dinov2"}[name]
    try:
        network = create_feature_extractor(EXTRACTORS[name], [layer], cuda=False, verbose=False)
    except OSError as error:
        raise OSError(f"The weights of {name} could not be loaded or downloaded: {error}") from error
    network.register_forward_hook(lambda _, args, layers: layers[0])
    return Extractor(EXTRACTORS[name], network.eval().requires_grad_(False).to(device))
