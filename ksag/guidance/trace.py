"""What the guided calls computed, step by step, and how that shows in a notebook."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ksag.attention import table


@dataclass(frozen=True, repr=False)
class TraceStep:
    """What one direction computed in one call, on the CPU.

    Each of `parts` is an attribute too. SAG keeps `saliency`, (b, *grid) with mean 1; `mask`, (b, 1, *spatial) of ones where the
    saliency is above `mask_threshold`; `degraded`, u blurred under the mask (in one pass, u without what the blur took away at the
    call before); and `reevaluated`, the model's prediction from it. PAG and SEG keep `perturbed`, their prediction.
    """

    name: str
    """The direction's."""
    sigma: Tensor
    """(b,) noise levels."""
    uncond: Tensor
    """(b, c, *spatial) the unconditional prediction u (the only one, if there is no uncond)."""
    cond: Tensor
    """(b, c, *spatial) the conditional prediction g."""
    direction: Tensor
    """(b, c, *spatial) the guided prediction is the `cfg_rule`'s plus scale · direction of each direction."""
    parts: Mapping[str, Tensor]
    """What else the direction computed, by name."""

    def __getattr__(self, name: str) -> Tensor:
        parts: Mapping[str, Tensor] = self.__dict__.get("parts", {})
        if name not in parts:
            raise AttributeError(f"a step of {self.__dict__.get('name')} has no {name!r}; it has {', '.join(parts)}.")
        return parts[name]

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in zip(COLUMNS, self._cells(), strict=True) if value)
        return f"TraceStep({values}, latent={'×'.join(map(str, self.uncond.shape))})"

    def _cells(self) -> list[str]:
        low, high = float(self.sigma.min()), float(self.sigma.max())
        saliency, mask = self.parts.get("saliency"), self.parts.get("mask")
        return [
            self.name,
            f"{low:.4g}" if low == high else f"{low:.4g}…{high:.4g}",
            "" if saliency is None else f"{saliency.amax():.3g}",
            "" if mask is None else f"{mask.mean():.0%}",
            f"{_rms(self.direction):.3g}",
        ]


COLUMNS = ("direction", "sigma", "peak_saliency", "masked", "guidance")


class Trace(list[TraceStep]):
    """A list of steps that shows as a table: the direction, sigma, the highest saliency (1 is the average), the share of the latent
    under the mask, and the root mean square of the direction.
    """

    def __repr__(self) -> str:
        return table.as_text(self._rows(), str.rjust)

    def _repr_html_(self) -> str:
        return table.as_html(self._rows())

    def _rows(self) -> list[list[str]]:
        return [["step", *COLUMNS], *([str(i), *step._cells()] for i, step in enumerate(self))]


def on_cpu(t: Tensor) -> Tensor:
    """A separate copy, with numbers instead of truth values."""
    copy = t.detach().to("cpu", copy=True)
    return copy if copy.is_floating_point() else copy.float()


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())
