"""Measures of two sets of features (n, d): how close are the distributions that they were drawn from?

- Fréchet distance (FD; called FID with Inception's features): Heusel et al., arXiv:1706.08500.
- Kernel distance (KID): the unbiased squared maximum mean discrepancy with a cubic kernel, Bińkowski et al., arXiv:1801.01401.
- Precision, the share of samples inside the reference's manifold, and recall, the share of the reference inside the samples'
  manifold: Kynkäänniemi et al., arXiv:1904.06991, with 3 nearest neighbours.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ksag.zoo import files

STATISTICS = Path(__file__).parents[1] / "zoo/statistics.safetensors"
"""The bundled classifier's features of the pictures that the bundled model was trained on."""
BLOCK = 4096
"""Rows of a matrix of all pairs that are held at a time."""


class Measures(NamedTuple):
    """How close pictures are to a reference."""

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
    """The features of a set of pictures, summarised."""

    extractor: str
    """The name of the features."""
    n: int
    mean: Tensor
    """(d,) of all n pictures, float64."""
    cov: Tensor
    """(d, d) of all of them, float64."""
    features: Tensor
    """(m, d) of some or all of them, float32, which the kernel distance, precision and recall need."""

    # Computed once, since a reference serves many comparisons

    @cached_property
    def _root(self) -> Tensor:
        """(d, d), the square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.cov)
        root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
        return root

    @cached_property
    def _radii(self) -> Tensor:
        """(m,), the `manifold_radii` of the features."""
        return manifold_radii(self.features.float())

    def to(self, device: str | torch.device) -> "Statistics":
        """The same on `device`, where the measures are then computed."""
        return Statistics(self.extractor, self.n, self.mean.to(device), self.cov.to(device), self.features.to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, with the features as float16."""
        tensors = {"mean": self.mean, "cov": self.cov, "features": self.features.half()}
        files.write(path, tensors, extractor=self.extractor, n=self.n)


def statistics(features: Tensor, extractor: str, keep: int | None = None) -> Statistics:
    """The statistics of features (n, d).

    Args:
        features: of n pictures, 2 or more.
        extractor: the name of the features.
        keep: the number of features to keep, drawn with a fixed seed; by default all.
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
    """The statistics in a file written by `Statistics.save`; a ValueError for a damaged file or another kind."""
    tensors, metadata = files.read(path)
    if not ({"mean", "cov", "features"} <= tensors.keys() and {"extractor", "n", "sha256"} <= metadata.keys()):
        raise ValueError(f"{path} holds no statistics: `ksag evaluate --save-statistics` writes them.")
    return Statistics(metadata["extractor"], metadata["n"], tensors["mean"], tensors["cov"], tensors["features"].float())


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """|m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½), the squared 2-Wasserstein distance of two normal distributions."""
    # The trace of the last root is the sum of the singular values of C₁^½ C₂^½
    shared = torch.linalg.svdvals(one._root @ other._root).sum()  # eigenvalues of C₁ C₂ would lose half the digits
    size = one.cov.trace() + other.cov.trace()
    distance = float((one.mean - other.mean).square().sum() + size - 2 * shared)
    rounding = 10 * torch.finfo(one.cov.dtype).eps * len(one.cov) * float(size)
    return 0.0 if -rounding <= distance < 0 else distance


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy between features (n, d) and (m, d), k(x, y) = (x·y/d + 1)³."""
    one, other = one.double(), other.double()

    def total(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(rows @ b.T / b.shape[1] + 1).pow(3).sum() for rows in a.split(BLOCK)]).sum()

    def within(a: Tensor) -> Tensor:
        diagonal = (a.square().sum(dim=1) / a.shape[1] + 1).pow(3).sum()
        return (total(a, a) - diagonal) / (len(a) * (len(a) - 1))

    return float(within(one) + within(other) - 2 * total(one, other) / (len(one) * len(other)))


def _distances(one: Tensor, other: Tensor) -> Tensor:
    # by differences: by products, close neighbours would be lost to rounding
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def manifold_radii(features: Tensor, neighbours: int = 3) -> Tensor:
    """(n,), the distance of each of the features (n, d) from its nearest neighbour of that rank."""
    near = [_distances(rows, features).kthvalue(neighbours + 1, dim=1).values for rows in features.split(BLOCK)]
    return torch.cat(near)  # the first neighbour is the point itself


def share_inside(features: Tensor, manifold: Tensor, radii: Tensor) -> float:
    """The share of the features (n, d) within the radius of at least one point of the manifold (m, d)."""
    inside = [(_distances(rows, manifold) <= radii).any(dim=1) for rows in features.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def measure(samples: Statistics, reference: Statistics) -> Measures:
    """The four measures of samples. A ValueError if the features are different ones, or fewer than 4."""
    if samples.extractor != reference.extractor:
        raise ValueError(
            f"The samples' features are {samples.extractor}, the reference's {reference.extractor}: they cannot be compared."
        )
    fewest = min(len(samples.features), len(reference.features))
    if fewest < 4:
        raise ValueError(f"Precision and recall use the third neighbour, so they need 4 pictures or more, got {fewest}.")
    own, real = samples.features.float(), reference.features.float()
    return Measures(
        frechet_distance(samples, reference), kernel_distance(own, real),
        share_inside(own, real, reference._radii), share_inside(real, own, samples._radii),
    )  # fmt: skip
