"""Rules for step 2, classifier-free guidance: what becomes of the unconditional prediction u and the conditional one g.

A rule is any function of (u, g, cond_scale, x, sigma) that returns the guided prediction. u, g and the noisy latent x are
(b, c, h, w), sigma is (b,). Self-Attention Guidance adds its direction to what the rule returns.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ksag.guidance.runs import Memory, per_sample
from ksag.model.parameters import finite, flag, number

Rule: TypeAlias = Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]
"""(u, g, cond_scale, x, sigma) → the guided prediction, (b, c, h, w)."""


def sample_dims(t: Tensor) -> tuple[int, ...]:
    """The dimensions of one sample of (b, c, *spatial)."""
    return tuple(range(1, t.ndim))


def shown(value: Any) -> str:
    """
    >>> shown(plain), shown(rescale(0.5)), shown("cond")
    ('plain', 'rescale(phi=0.5)', "'cond'")
    """
    return getattr(value, "__name__", None) or repr(value)


def plain(u: Tensor, g: Tensor, cond_scale: float, x: Tensor, sigma: Tensor) -> Tensor:
    """u + (g − u) · cond_scale (Ho and Salimans 2022, arXiv:2207.12598)."""
    return u + (g - u) * cond_scale


class rescale:
    """Plain guidance, with its standard deviation scaled towards the conditional prediction's, against overexposure.

    Lin et al. 2023, arXiv:2305.08891, section 3.4. As there, it is computed on the model's v-prediction, and for a model trained by
    flow matching on its velocity. For a model of another kind, v follows from the denoised latent and the noise, with data of
    standard deviation 1.

    Args:
        phi: φ, how much of the rescaled prediction to take, 0 to 1; the paper's 0.7 by default.
        flow: True for a model trained by flow matching (`ksag.FlowDenoiser`), for which the default is an error.

    Raises:
        ValueError: phi is no number from 0 to 1.
    """

    def __init__(self, phi: float = 0.7, *, flow: bool = False):
        if not 0 <= number("phi", phi) <= 1:
            raise ValueError(f"phi is the share of the rescaled prediction, 0 to 1, got {phi}.")
        self.phi, self.flow = phi, flag("flow")(flow)

    def __call__(self, u: Tensor, g: Tensor, cond_scale: float, x: Tensor, sigma: Tensor) -> Tensor:
        # v is x / (σ² + 1) − denoised, a velocity x / (σ + 1) − denoised, times a factor that depends on σ alone and cancels
        origin = (x / per_sample(sigma + 1 if self.flow else sigma.square() + 1, x)).to(g.dtype)
        v, v_cond = origin - plain(u, g, cond_scale, x, sigma), origin - g
        v_std, v_cond_std = (t.std(sample_dims(t), keepdim=True) for t in (v, v_cond))
        shrink = v_cond_std / v_std.clamp(min=torch.finfo(v.dtype).tiny)
        return origin - v * (self.phi * shrink + (1 - self.phi))

    def check_model(self, inner_model: Any) -> None:
        """Raises a ValueError if `flow` does not fit the model."""
        while not hasattr(inner_model, "is_flow") and hasattr(inner_model, "inner_model"):
            inner_model = inner_model.inner_model  # of a wrapper around a denoiser
        if getattr(inner_model, "is_flow", False) != self.flow:
            kind = "a flow matching model" if not self.flow else "no flow matching model"
            raise ValueError(f"inner_model is {kind}: use cfg_rule=ksag.cfg.rescale({self.phi}, flow={not self.flow}).")

    def __repr__(self) -> str:
        return f"rescale(phi={self.phi}, flow=True)" if self.flow else f"rescale(phi={self.phi})"


class apg:
    """Adaptive projected guidance: large scales without oversaturation (Sadat et al. 2024, arXiv:2410.02416).

    The difference g − u gets a (negative) momentum along the run, is limited in length, and loses some of its part parallel to g,
    which causes oversaturation.

    A wrapper gives each run a copy of the rule, which holds the momentum.

    Args:
        eta: η, the share of the parallel part that stays; 0 is none, 1 is everything.
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
        self._run = Memory()

    def __call__(self, u: Tensor, g: Tensor, cond_scale: float, x: Tensor, sigma: Tensor) -> Tensor:
        dtype = g.dtype
        u, g = (t.to(torch.promote_types(dtype, torch.float32)) for t in (u, g))  # a half's squares would overflow
        difference = g - u
        if self.momentum:
            difference = difference + self.momentum * self._run.last(sigma, difference)
            self._run.keep(sigma, difference)
        if self.norm_threshold < math.inf:
            length = torch.linalg.vector_norm(difference, dim=sample_dims(difference), keepdim=True)
            difference = difference * (self.norm_threshold / length.clamp(min=self.norm_threshold))
        along = F.normalize(g.flatten(1), dim=1).view_as(g)
        parallel = (difference * along).sum(sample_dims(along), keepdim=True) * along
        return (g + (cond_scale - 1) * (difference - parallel + self.eta * parallel)).to(dtype)

    def reset(self) -> None:
        """Drops the momentum: the next call begins a run."""
        self._run.clear()

    def __repr__(self) -> str:
        limit = None if self.norm_threshold == math.inf else self.norm_threshold
        return f"apg(eta={self.eta}, norm_threshold={limit}, momentum={self.momentum})"
