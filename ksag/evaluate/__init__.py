"""How close are pictures to a reference? Four measures of their features, and the features of folders.

The measures are short formulas in float64, computed on the features' device. Inception and DINOv2 come from torch-fidelity; its
measures are not used, because it cannot save the statistics of a folder and leaves the GPU for the Fréchet distance. The tests
compare the results with its own.
"""

from ksag.evaluate.folders import SUFFIXES, batches, default_cache, folder_features, load_picture, pictures_in
from ksag.evaluate.measures import (
    STATISTICS,
    Measures,
    Statistics,
    distances,
    frechet_distance,
    kernel_distance,
    load_statistics,
    manifold_radii,
    measure,
    share_inside,
    statistics,
)

__all__ = [
    "STATISTICS", "SUFFIXES", "Measures", "Statistics", "batches", "default_cache", "distances", "folder_features",
    "frechet_distance", "kernel_distance", "load_picture", "load_statistics", "manifold_radii", "measure", "pictures_in",
    "share_inside", "statistics",
]  # fmt: skip
