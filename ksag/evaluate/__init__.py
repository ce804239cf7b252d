"""How near are pictures to those of a reference, and what does guidance change?  The measures, and folders side by side.

The measures are four short formulas of features, in float64 on the features' device. They are written here and not taken from
torch-fidelity, because that takes pictures by its own data sets alone and cannot save the statistics of a folder; because its
Fréchet distance leaves the GPU for SciPy's square root of a matrix that is not symmetric; and because its kernel distance is the
mean over random subsets of what is computed here over all. What is the same in both is tested to be equal, and Inception and
DINOv2 are torch-fidelity's (`ksag.evaluate.features`).

- Fréchet distance (FD; FID where the features are Inception's): Heusel et al., arXiv:1706.08500.
- Kernel distance (KID): the unbiased squared maximum mean discrepancy with a cubic kernel, Bińkowski et al., arXiv:1801.01401.
- Precision, the share of samples inside the reference's manifold, and recall, the share of the reference inside the samples':
  Kynkäänniemi et al., arXiv:1904.06991, with 3 nearest neighbours.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ksag.evaluate import features as extractors
from ksag.evaluate.features import Extractor

STATISTICS = Path(__file__).parents[1] / "zoo/statistics.safetensors"
"""The bundled classifier's features of the pictures that the bundled model was trained on."""
SUFFIXES = {".png", ".webp", ".jpg", ".jpeg", ".bmp"}
BLOCK = 4096
"""Rows of a matrix of all pairs that are held at a time."""


class Measures(NamedTuple):
    """How near pictures are to those of a reference."""

    fd: float
    """Fréchet distance of their features, 0 or more."""
    kid: float
    """Kernel distance of their features; about 0 for the same distribution."""
    precision: float
    """The share of the pictures that look like the reference's."""
    recall: float
    """The share of the reference's pictures that look like these."""


@dataclass(frozen=True)
class Statistics:
    """What is kept of the features of a set of pictures.

    Attributes:
        extractor: the name of the features.
        n: how many pictures there were.
        mean: (d,) of all of them, float64.
        cov: (d, d) of all of them, float64.
        features: (m, d) of some or all of them, float32, which the kernel distance, precision and recall need.
    """

    extractor: str
    n: int
    mean: Tensor
    cov: Tensor
    features: Tensor

    def to(self, device: str | torch.device) -> "Statistics":
        """The same on `device`, where the measures are then computed."""
        return Statistics(self.extractor, self.n, self.mean.to(device), self.cov.to(device), self.features.to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """A safetensors file; the features go to float16."""
        tensors = {"mean": self.mean, "cov": self.cov, "features": self.features.half()}
        extractors.write(path, tensors, extractor=self.extractor, n=self.n)


def statistics(features: Tensor, extractor: str, keep: int | None = None) -> Statistics:
    """The statistics of features (n, d).

    Args:
        features: of n pictures, 2 at least.
        extractor: the name of the features.
        keep: how many of them to keep, drawn by a fixed seed; all where it is None.

    Raises:
        ValueError: fewer than two pictures, or features that are not finite.
    """
    if len(features) < 2:
        raise ValueError(f"A covariance takes 2 pictures or more, got {len(features)}.")
    if not features.isfinite().all():
        raise ValueError("There are features that are not finite.")
    exact = features.double()
    mean = exact.mean(dim=0)
    centred = exact - mean
    kept = features
    if keep is not None and keep < len(features):
        drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:keep].sort().values
        kept = features[drawn.to(features.device)]
    return Statistics(extractor, len(features), mean, centred.T @ centred / (len(features) - 1), kept.float())


def load_statistics(path: str | os.PathLike[str] = STATISTICS) -> Statistics:
    """What `Statistics.save` wrote.

    Raises:
        OSError: no such file.
        ValueError: the file is damaged or something else.
    """
    tensors, metadata = extractors.read(path)
    if not {"mean", "cov", "features"} <= tensors.keys():
        raise ValueError(f"{path} holds no statistics: `ksag evaluate --save-statistics` writes them.")
    return Statistics(metadata["extractor"], metadata["n"], tensors["mean"], tensors["cov"], tensors["features"].float())


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """|m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½), the squared 2-Wasserstein distance of two normal distributions.

    The trace of the root is the sum of the roots of the eigenvalues of C₁^½ C₂ C₁^½, which is symmetric.
    """
    values, vectors = torch.linalg.eigh(one.cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other.cov @ root).clamp(min=0).sqrt().sum()
    return float((one.mean - other.mean).square().sum() + one.cov.trace() + other.cov.trace() - 2 * shared)


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy between features (n, d) and (m, d), k(x, y) = (x·y/d + 1)³."""
    one, other = one.double(), other.double()

    def total(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(rows @ b.T / b.shape[1] + 1).pow(3).sum() for rows in a.split(BLOCK)]).sum()

    def within(a: Tensor) -> Tensor:
        diagonal = (a.square().sum(dim=1) / a.shape[1] + 1).pow(3).sum()
        return (total(a, a) - diagonal) / (len(a) * (len(a) - 1))

    return float(within(one) + within(other) - 2 * total(one, other) / (len(one) * len(other)))


def distances(one: Tensor, other: Tensor) -> Tensor:
    """(n, m), Euclidean, between features (n, d) and (m, d)."""
    # by differences: by products, near neighbours would be lost to rounding
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def manifold_radii(features: Tensor, neighbours: int = 3) -> Tensor:
    """(n,), the distance of each of the features (n, d) from its nearest neighbour of that rank."""
    near = [distances(rows, features).kthvalue(neighbours + 1, dim=1).values for rows in features.split(BLOCK)]
    return torch.cat(near)  # the first neighbour is the point itself


def share_inside(features: Tensor, manifold: Tensor, radii: Tensor) -> float:
    """How many of the features (n, d) lie within the radius of one point at least of the manifold (m, d)."""
    inside = [(distances(rows, manifold) <= radii).any(dim=1) for rows in features.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def measure(samples: Statistics, reference: Statistics) -> Measures:
    """The four measures of samples.

    Raises:
        ValueError: the two are statistics of different features, or too few are kept.
    """
    if samples.extractor != reference.extractor:
        raise ValueError(
            f"The samples' features are {samples.extractor}, the reference's {reference.extractor}: they cannot be compared."
        )
    fewest = min(len(samples.features), len(reference.features))
    if fewest < 4:
        raise ValueError(f"Precision and recall go by the third neighbour, so they take 4 pictures or more, got {fewest}.")
    own, real = samples.features.float(), reference.features.float()
    return Measures(
        frechet_distance(samples, reference), kernel_distance(own, real),
        share_inside(own, real, manifold_radii(real)), share_inside(real, own, manifold_radii(own)),
    )  # fmt: skip


# Folders


def pictures_in(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures in a folder and the folders in it, but for hidden ones.

    Raises:
        OSError: no such folder.
        ValueError: it holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file, not a folder." if folder.exists() else f"There is no folder {folder}.")
    found = [p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    return found


def load_picture(path: Path) -> Tensor:
    """(3, h, w), uint8."""
    try:
        with Image.open(path) as image:
            w, h = image.size
            if "A" in image.getbands() or "transparency" in image.info or image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"{path} is transparent, or has more than 8 bits a channel ({image.mode}): save it as 8-bit RGB, on the "
                    f"background that it is to be judged on."
                )
            pixels = image.convert("RGB").tobytes()
    except (OSError, SyntaxError) as error:  # Pillow's for a damaged PNG is a SyntaxError
        raise OSError(f"{path} is damaged, or no picture: {error}") from error
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(h, w, 3).permute(2, 0, 1)


def batches(paths: Sequence[Path], batch_size: int) -> Iterator[Tensor]:
    """Pictures of one size at a time, (at most batch_size, 3, h, w), uint8."""
    batch: list[Tensor] = []
    for path in paths:
        picture = load_picture(path)
        if batch and (len(batch) == batch_size or picture.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(picture)
    yield torch.stack(batch)


def default_cache() -> Path:
    """`~/.cache/ksag/features`, or where `XDG_CACHE_HOME` says that caches lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ksag/features"


def folder_features(
    folder: str | os.PathLike[str],
    extractor: Extractor,
    device: str | torch.device = "cpu",
    batch_size: int = 100,
    cache: Path | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """The features (n, d) of the pictures in a folder, on `device`, in an order that depends on what they show, not on their names.

    Args:
        folder: the pictures; their names do not matter.
        extractor: which features, on `device`.
        device: where to compute.
        batch_size: pictures at a time.
        cache: a folder where the features of the same pictures are found the next time; None keeps nothing.
        progress: called with the number of pictures after each batch.

    Raises:
        OSError: no such folder, or a damaged picture.
        ValueError: no picture in it, or one that the extractor does not take.
    """
    by_content = sorted((hashlib.sha256(path.read_bytes()).hexdigest(), path) for path in pictures_in(folder))
    content = hashlib.sha256("".join(digest for digest, _ in by_content).encode()).hexdigest()
    cached = None if cache is None else cache / extractor.name / f"{content}.safetensors"
    if cached is not None and cached.exists():
        with contextlib.suppress(ValueError):  # damaged: then anew
            features = extractors.read(cached)[0]["features"].to(device)
            progress(len(features))
            return features
    found = []
    for batch in batches([path for _, path in by_content], batch_size):
        found.append(extractor(batch.to(device)))
        progress(len(batch))
    features = torch.cat(found)
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_name(f".{cached.name}.{os.getpid()}.part")
        extractors.write(part, {"features": features})
        os.replace(part, cached)
    return features
