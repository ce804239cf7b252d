"""What a guided call computed, step by step, and how that shows in a notebook."""

from typing import NamedTuple

from torch import Tensor

from ksag.attention import table


class TraceStep(NamedTuple):
    """What one guided call computed, on the CPU."""

    sigma: Tensor
    """(b,) noise levels."""
    saliency: Tensor
    """(b, h', w') attention that each token receives; its mean is 1."""
    mask: Tensor
    """(b, 1, h, w) float32 ones where the saliency is above `mask_threshold`, zeros elsewhere."""
    uncond: Tensor
    """(b, c, h, w) the unconditional prediction u (the only one, where there is no uncond)."""
    degraded: Tensor
    """(b, c, h, w) d: u, blurred under the mask; in one pass, u without what the call before took away."""
    reevaluated: Tensor
    """(b, c, h, w) r: what the model makes of the degraded latent. SAG adds (d − r) · sag_scale to the guided prediction, in one
    pass times `ksag.guidance.sag.overlap`."""

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in zip(COLUMNS, self._cells(), strict=True))
        return f"TraceStep({values}, latent={'×'.join(map(str, self.uncond.shape))})"

    def _cells(self) -> list[str]:
        low, high = float(self.sigma.min()), float(self.sigma.max())
        return [
            f"{low:.4g}" if low == high else f"{low:.4g}…{high:.4g}",
            f"{self.saliency.amax():.3g}",
            f"{self.mask.mean():.0%}",
            f"{_rms(self.degraded - self.uncond):.3g}",
            f"{_rms(self.degraded - self.reevaluated):.3g}",
        ]


COLUMNS = ("sigma", "peak_saliency", "masked", "blurred_away", "guidance")


class Trace(list[TraceStep]):
    """A list of steps that shows as a table: sigma, the highest saliency (1 is the average), the share of the latent under the
    mask, and the root mean squares of what the blur took away, d − u, and of the direction of guidance, d − r.
    """

    def __repr__(self) -> str:
        return table.as_text(self._rows(), str.rjust)

    def _repr_html_(self) -> str:
        return table.as_html(self._rows())

    def _rows(self) -> list[list[str]]:
        return [["step", *COLUMNS], *([str(i), *step._cells()] for i, step in enumerate(self))]


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())
