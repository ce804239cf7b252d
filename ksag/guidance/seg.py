"""Smoothed Energy Guidance: away from a prediction in which some layers attend with blurred queries.

Hong, "Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention", NeurIPS 2024,
arXiv:2408.00760.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ksag.attention.families import Attention
from ksag.guidance.blur import gaussian_blur
from ksag.guidance.direction import Ask, Call, Direction, Layers, Setting
from ksag.model import parameters


@dataclass(frozen=True)
class BlurredQueries:
    """softmax(blur(q) kᵀ · scale) v, with the queries blurred over the token grid (section 4.2).

    Args:
        sigma: standard deviation of the Gaussian in tokens; inf replaces the queries by their mean.
    """

    sigma: float = math.inf

    def __call__(self, attention: Attention) -> Tensor:
        q = attention.q
        if self.sigma == math.inf:
            q = q.mean(dim=2, keepdim=True).expand_as(q)
        elif attention.grid is not None:
            grid = q.transpose(2, 3).unflatten(3, attention.grid).flatten(1, 2)  # (b, heads dim, *grid)
            q = (
                gaussian_blur(grid, self.sigma, kernel_sizes(self.sigma, attention.grid))
                .flatten(2)
                .unflatten(1, (q.shape[1], -1))
                .mT
            )
        k, v = (x.to(q.dtype) for x in (attention.k, attention.v) if x is not None)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attention.mask, scale=attention.scale)


def kernel_sizes(sigma: float, grid: Sequence[int]) -> tuple[int, ...]:
    """Three standard deviations to each side, as in the paper's code, or as much as the grid can reflect.

    >>> kernel_sizes(1.0, (8, 8)), kernel_sizes(10.0, (8, 7))
    ((7, 7), (9, 7))
    """
    wanted = math.ceil(6 * sigma) // 2 * 2 + 1
    return tuple(min(wanted, side + 1 - side % 2) if side > 1 else 1 for side in grid)


class SEG(Direction):
    """g − p, with p the conditional prediction with `BlurredQueries` as the attention of the chosen layers: a row more per sample.

    Args:
        scale: strength. Per call: `seg_scale`.
        blur_sigma: standard deviation of the Gaussian in tokens; inf, the default, replaces the queries by their mean.
        attention: one layer or a list of layers.
        sigma_range, every: see `ksag.Direction`.
    """

    name = "SEG"
    keywords: ClassVar = {"seg_scale": "scale"}
    shown = ("scale", "blur_sigma", "attention", "sigma_range", "every")
    blur_sigma = Setting(parameters.seg_blur_sigma)

    def __init__(
        self, scale: float | Tensor = 3.0, blur_sigma: float = math.inf, attention: Layers = "middle", *,
        sigma_range: tuple[float, float] = (0.0, math.inf), every: int = 1,
    ):  # fmt: skip
        super().__init__(scale, attention, sigma_range=sigma_range, every=every)
        self.blur_sigma = blur_sigma

    def ask(self, call: Call) -> Sequence[Ask]:
        return [Ask(call.x, call.cond, attention=BlurredQueries(self.blur_sigma))]

    def direction(self, call: Call, answers: Sequence[Tensor]) -> Tensor:
        [p] = answers
        call.keep(perturbed=p)
        return call.g - p
