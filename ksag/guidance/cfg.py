"""Rules for step 2, classifier-free guidance: what becomes of the unconditional prediction u and the conditional one g.

A rule is any function of (u, g, cond_scale, x, sigma) that returns the guided prediction. u, g and the noisy latent x are
(b, c, h, w), sigma is (b,). Self-Attention Guidance adds its direction to what the rule returns.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ksag.guidance.runs import Run
from ksag.model.parameters import finite, number

Rule: TypeAlias = Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]
"""(u, g, cond_scale, x, sigma) → the guided prediction, (b, c, h, w)."""

SAMPLE = (1, 2, 3)
"""The dimensions of one sample."""


def name_of(rule: Rule) -> str:
    """
    >>> name_of(plain), name_of(rescale(0.5))
    ('plain', 'rescale(phi=0.5)')
    """
    return getattr(rule, "__name__", None) or repr(rule)


def plain(u: Tensor, g: Tensor, cond_scale: float, x: Tensor, sigma: Tensor) -> Tensor:
    """u + (g − u) · cond_scale (Ho and Salimans 2022, arXiv:2207.12598)."""
    return u + (g - u) * cond_scale


def rescale(phi: float = 0.7) -> Rule:
    """Plain guidance, with its standard deviation drawn back to that of the conditional prediction, against overexposure.

    Lin et al. 2023, arXiv:2305.08891, section 3.4, on the model's v-prediction, as there. For a model of another kind, v is what
    the denoised latent and the noise say that it is, with data of standard deviation 1.

    Args:
        phi: φ, how much of the rescaled prediction to take, 0 to 1; the paper's 0.7 by default.

    Returns:
        A rule for `SAGDenoiser(cfg_rule=...)`.

    Raises:
        ValueError: phi is no number from 0 to 1.
    """
    if not 0 <= number("phi", phi) <= 1:
        raise ValueError(f"phi is the share of the rescaled prediction, 0 to 1, got {phi}.")

    def rule(u: Tensor, g: Tensor, cond_scale: float, x: Tensor, sigma: Tensor) -> Tensor:
        # v is x / (sigma² + 1) − denoised, times a factor that depends on sigma alone and cancels
        origin = (x / (sigma.square() + 1)[:, None, None, None]).to(g.dtype)
        v, v_cond = origin - plain(u, g, cond_scale, x, sigma), origin - g
        v_std, v_cond_std = (t.std(SAMPLE, keepdim=True) for t in (v, v_cond))
        shrink = v_cond_std / v_std.clamp(min=torch.finfo(v.dtype).tiny)
        return origin - v * (phi * shrink + (1 - phi))

    rule.__name__ = f"rescale(phi={phi})"
    return rule


class apg:
    """Adaptive projected guidance: large scales without oversaturation (Sadat et al. 2024, arXiv:2410.02416).

    The difference g − u gets a (negative) momentum along the run, is limited in length, and loses some of its part parallel to g,
    which is what oversaturates.

    Give each wrapper a rule of its own: the momentum lives in it, for each thread, and ends with the run.

    Args:
        eta: η, the share of the parallel part that stays; 0 is none, 1 all of it.
        norm_threshold: r, the longest that a sample's difference may be, in the latent's units; None is no limit. The paper has
            15 for Stable Diffusion XL, 7.5 for 2.1, 2.5 for EDM2.
        momentum: β, the part of the last call's difference that is added, −1 to 1; negative pushes away from it.

    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, eta: float = 0.0, norm_threshold: float | None = None, momentum: float = -0.5):
        self.eta = finite("eta", eta)
        self.norm_threshold = math.inf if norm_threshold is None else number("norm_threshold", norm_threshold)
        if not self.norm_threshold > 0:
            raise ValueError(f"norm_threshold is a length greater than 0, or None for no limit, got {norm_threshold}.")
        self.momentum = finite("momentum", momentum)
        if not -1 < self.momentum < 1:
            raise ValueError(
                f"momentum is more than -1 and less than 1, got {momentum}: at 1 the differences would add up for ever."
            )
        self._run = Run()

    def __call__(self, u: Tensor, g: Tensor, cond_scale: float, x: Tensor, sigma: Tensor) -> Tensor:
        dtype = g.dtype
        u, g = (t.to(torch.promote_types(dtype, torch.float32)) for t in (u, g))  # a half's squares would overflow
        difference = g - u
        if self.momentum:
            difference = difference + self.momentum * self._run.last(sigma, difference)
            self._run.keep(sigma, difference)
        if self.norm_threshold < math.inf:
            length = torch.linalg.vector_norm(difference, dim=SAMPLE, keepdim=True)
            difference = difference * (self.norm_threshold / length.clamp(min=self.norm_threshold))
        along = F.normalize(g.flatten(1), dim=1).view_as(g)
        parallel = (difference * along).sum(SAMPLE, keepdim=True) * along
        return (g + (cond_scale - 1) * (difference - parallel + self.eta * parallel)).to(dtype)

    def reset(self) -> None:
        """Forgets the momentum of this thread's run."""
        self._run.reset()

    def __repr__(self) -> str:
        limit = None if self.norm_threshold == math.inf else self.norm_threshold
        return f"apg(eta={self.eta}, norm_threshold={limit}, momentum={self.momentum})"
