"""How close are pictures to a reference? Four measures of their features, and the features of folders.

The measures are short formulas in float64, computed on the features' device. torch-fidelity's are not used, because it cannot save
the statistics of a folder and leaves the GPU for the Fréchet distance.
"""

from ksag.evaluate.folders import folder_features, load_picture, pictures_in
from ksag.evaluate.measures import (
    STATISTICS,
    Measures,
    Statistics,
    frechet_distance,
    kernel_distance,
    load_statistics,
    measure,
    statistics,
)  # fmt: skip

__all__ = [
    "STATISTICS", "Measures", "Statistics", "folder_features", "frechet_distance", "kernel_distance",
    "load_picture", "load_statistics", "measure", "pictures_in", "statistics",
]  # fmt: skip
