"""Perturbed-Attention Guidance: away from a prediction in which the tokens of some layers attend to themselves alone.

Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", ECCV 2024, arXiv:2403.17377.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ksag.attention.families import Attention
from ksag.guidance.direction import Ask, Call, Direction, Layers


def identity(attention: Attention) -> Tensor:
    """The perturbed attention: its map is the identity, so the output of each token is its own value (section 4.1)."""
    return attention.image_values


class PAG(Direction):
    """g − p, with p the conditional prediction with `identity` as the attention of the chosen layers: one more row per sample.

    Args:
        scale: strength s; diffusers' `pag_scale`. Per call: `pag_scale`.
        attention: one layer or a list of layers.
        sigma_range, every: see `ksag.Direction`.
    """

    name = "PAG"
    keywords: ClassVar = {"pag_scale": "scale"}

    def __init__(
        self, scale: float | Tensor = 3.0, attention: Layers = "middle", *,
        sigma_range: tuple[float, float] = (0.0, math.inf), every: int = 1,
    ):  # fmt: skip
        super().__init__(scale, attention, sigma_range=sigma_range, every=every)

    def ask(self, call: Call) -> Sequence[Ask]:
        return [Ask(call.x, call.cond, attention=identity)]

    def direction(self, call: Call, answers: Sequence[Tensor]) -> Tensor:
        [p] = answers
        call.keep(perturbed=p)
        return call.g - p
