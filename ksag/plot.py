"""Figures of samples, of what each direction computed, and of grids of settings; needs the extra `ksag[notebook]`.

plot.compare({"plain": plain, "with SAG": guided}, names=["cat", "dog"])
plot.trace(steps)
plot.xyz(sample, x=("sag_scale", [0, 1, 2]), y=("blur_sigma", [1, 2]))

Each returns a matplotlib figure, which a notebook shows and `savefig` writes to a file; pyplot is not involved. Samples are pixels
in [-1, 1], (b, 1 or 3, h, w), or anything that `decode` turns into pixels. A video, (b, c, t, h, w), is shown as a row of up to six
frames; a latent (b, c, n) as a strip with a line for each channel, from -1 (black) to 1 (white).
"""

import io
import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from ksag.guidance.trace import TraceStep

try:
    import matplotlib.figure
    from matplotlib.axes import Axes
    from matplotlib.colors import TwoSlopeNorm
except ImportError as error:
    raise ImportError("ksag.plot draws with matplotlib. In a clone of ksag: pip install '.[notebook]'") from error

Decode = Callable[[Tensor], Tensor]  # latents → pixels in [-1, 1], (b, 1 or 3, H, W), or (b, 1 or 3, T, H, W) for a video
Array = NDArray[Any]
Axis = tuple[str, Sequence[Any]]  # a parameter's name, and its values
Row = tuple[str, Array | Sequence[Array]]  # a label, and for each column (frames, h, w) or (frames, h, w, 3) in [0, 1]
Panel = tuple[str, Sequence[str], Sequence[Row]]  # a title, the titles of the columns, and the rows

FRAMES, STRIP, FONT = 6, 1024, 9  # frames of a video and pixels of a strip at most; points
WIDTH, NARROWEST, BAR, GAP = 7.0, 0.8, 1.5, 0.08  # inches: a row of pictures, a picture at least, a colour bar, between rows


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that a notebook shows, and whose files have no empty margins."""

    def savefig(self, fname: Any, **options: Any) -> None:
        super().savefig(fname, **{"bbox_inches": "tight", "pad_inches": 0.06, **options})

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def compare(
    pictures: Mapping[str, Tensor], *, names: Sequence[str] | None = None, decode: Decode | None = None, difference: bool = False
) -> Figure:
    """A row for each entry, a column for each sample.

    Args:
        pictures: label → samples, (b, c, *spatial), the same b in each entry.
        names: titles of the columns; "sample 0" and so on by default.
        decode: latents → pixels, called with one sample each time.
        difference: below each entry but the first, show its difference from the first, amplified as its label says; grey is none.

    Raises:
        ValueError, TypeError: no entry, entries of different shapes, or tensors that cannot be shown.

    >>> noise = torch.rand(2, 3, 32, 32) * 2 - 1
    >>> figure = compare({"plain": noise, "half": noise / 2}, names=["cat", "dog"], difference=True)
    >>> figure.savefig("compare.png")  # doctest: +SKIP
    """
    if len(pictures) < 1 + difference:
        raise ValueError(f"compare shows {1 + difference} or more entries, such as 'plain' and 'with SAG', got {len(pictures)}.")
    (first, reference), *others = [(label, _pixels(label, x, decode)) for label, x in pictures.items()]
    rows: list[Row] = [(first, reference)]
    for label, x in others:
        if len(x) != len(reference) or (difference and x.shape != reference.shape):
            raise ValueError(
                f"Every entry holds the same samples, got { ({label: tuple(x.shape) for label, x in pictures.items()}) }."
            )
        rows.append((label, x))
        if difference:
            rows.append(_amplified(f"{label} − {first}", x - reference))
    return _draw([("", _titles(names, len(reference)), rows)])[0]


def trace(steps: Sequence[TraceStep], *, sample: int = 0, decode: Decode | None = None, columns: int = 6) -> Figure:
    """The tensors that each direction computed for a sample; a column for each of some evenly spaced steps.

    SAG: the saliency over the prediction, with the mask's outline; the mask; u, the unconditional prediction; d, u blurred under
    the mask; r, the prediction from d; the direction. PAG and SEG: g, the conditional prediction; p, the prediction with perturbed
    attention; the direction. Other directions: the tensors that they keep. The direction is amplified as its label says.

    Args:
        steps: the list that `guided.trace()` yields.
        sample: which sample of the batch.
        decode: latents → pixels, called with one sample each time; the last row is then the change of the picture.
        columns: show at most this many steps, including the first and the last.

    Raises:
        IndexError, ValueError, TypeError: no such sample, no steps, or latents without `decode`.

    >>> from ksag import TraceStep
    >>> g, p = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    >>> figure = trace([TraceStep("PAG", torch.tensor([8.0]), g, g, g - p, {"perturbed": p})])
    """
    if not steps:
        raise ValueError("The trace holds no step: a direction leaves none at scale 0 or outside its sigma_range.")
    names, panels, overlays = list(dict.fromkeys(step.name for step in steps)), [], []
    for name in names:
        own = [step for step in steps if step.name == name]
        chosen = [own[round(i)] for i in np.linspace(0, len(own) - 1, min(columns, len(own)))]
        rows, overlay = _trace_rows(chosen, sample, decode)
        panels.append((name if len(names) > 1 else "", [f"σ {float(step.sigma[sample]):.3g}" for step in chosen], rows))
        overlays.append(overlay)
    figure, axes = _draw(panels, room=BAR if any(overlays) else 0)
    for grid, overlay in zip(axes, overlays, strict=True):
        if overlay:
            _overlay(grid[0], *overlay)
    return figure


LABELS = {
    "uncond": "u: prediction", "cond": "g: prediction", "degraded": "d: degraded", "reevaluated": "r: re-evaluated",
    "perturbed": "p: perturbed", "mask": "mask: blurred where white",
}  # fmt: skip


def _trace_rows(steps: list[TraceStep], sample: int, decode: Decode | None) -> tuple[list[Row], tuple[Any, ...] | None]:
    """The rows of one direction, and what `_overlay` draws on the first of them if there is a saliency."""

    def of_sample(name: str) -> Tensor:
        return torch.stack([getattr(step, name)[sample] for step in steps]).float()

    parts = {name: of_sample(name) for name in steps[0].parts}
    base = "uncond" if "saliency" in parts else "cond"  # what the direction starts from
    x, direction = of_sample(base), of_sample("direction")
    prediction = _pixels(base, x, decode)
    rows: list[Row] = [("saliency over u", prediction)] if "saliency" in parts else []
    if "mask" in parts:
        rows.append((LABELS["mask"], _frames(parts["mask"], prediction.shape[1])[:, 0].numpy()))
    rows.append((LABELS[base], prediction))
    pictures = {name: part for name, part in parts.items() if part.shape == x.shape and name != "mask"}
    rows += [(LABELS.get(name, name), _pixels(name, part, decode)) for name, part in pictures.items()]
    change = _rgb(direction) / 2 if decode is None else _pixels("direction", x + direction, decode) - prediction
    rows.append(_amplified("direction", change))
    return rows, (prediction, parts["saliency"], parts.get("mask")) if "saliency" in parts else None


def saliency(images: Tensor, saliency: Tensor, *, mask: Tensor | None = None, names: Sequence[str] | None = None) -> Figure:
    """How much attention each part of the pictures receives, over the pictures in grey; 1 is the average.

    Args:
        images: (b, c, *spatial), pixels.
        saliency: (b, *grid), as in a `TraceStep` of SAG.
        mask: (b, 1, *spatial), drawn as an outline.
        names: titles of the b pictures; "sample 0" and so on by default.

    Raises:
        ValueError, TypeError: shapes that do not fit together, or tensors that cannot be shown.

    >>> images, attended = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 8, 8) * 2
    >>> figure = saliency(images, attended, names=["cat", "dog"])
    """
    pixels, b = _pixels("images", images, None), len(images)
    if saliency.ndim != images.ndim - 1 or len(saliency) != b:
        raise ValueError(f"saliency must be (b, *grid) for images of {tuple(images.shape)}, got {tuple(saliency.shape)}.")
    if mask is not None and (mask.ndim != images.ndim or mask.shape[:2] != (b, 1)):
        raise ValueError(f"mask must be (b, 1, *spatial) for images of {tuple(images.shape)}, got {tuple(mask.shape)}.")
    figure, [axes] = _draw([("", _titles(names, b), [("", pixels)])], room=BAR)
    _overlay(axes[0], pixels, saliency, mask)
    return figure


def xyz(
    sample: Callable[..., Tensor], *, x: Axis, y: Axis | None = None, z: Axis | None = None, decode: Decode | None = None
) -> Figure:
    """A grid of settings: x across, y down, and a panel for each value of z.

    Args:
        sample: called once for each setting with a keyword for each axis, such as `sample(sag_scale=0.5, blur_sigma=2.0)`; returns
            (b, c, *spatial), which are tiled. Let it start from the same noise each time.
        x, y, z: ("parameter", [values]).
        decode: latents → pixels, called with one sample each time.

    Raises:
        ValueError, TypeError: an axis without values, a parameter on two axes, or results that cannot be shown.

    >>> def sample(sag_scale, blur_sigma):
    ...     return torch.full((1, 3, 32, 32), sag_scale / blur_sigma)
    >>> figure = xyz(sample, x=("sag_scale", [0, 1]), y=("blur_sigma", [1, 2]))
    """
    axes = [("", [""]) if axis is None else axis for axis in (z, y, x)]
    names = [name for name, _ in axes if name]
    if len(set(names)) < len(names) or not all(len(values) for _, values in axes):
        raise ValueError(f"Each axis needs a parameter of its own and values for it, such as ('blur_sigma', [1, 2]), got {axes}.")
    grid = itertools.product(*(values for _, values in axes))
    settings = [{name: value for (name, _), value in zip(axes, values, strict=True) if name} for values in grid]
    bar = tqdm(settings, desc=" × ".join(reversed(names)), unit="setting")
    results = [_pixels(f"sample(**{setting})", sample(**setting), decode) for setting in bar]
    sheets = (_sheet(pixels) for pixels in results)
    panels, rows, columns = ([f"{name} {v:g}" if isinstance(v, float) else f"{name} {v}".strip() for v in vs] for name, vs in axes)
    return _draw([(panel, columns, [(row, [next(sheets) for _ in columns]) for row in rows]) for panel in panels])[0]


@torch.no_grad()
def _pixels(label: str, x: Tensor, decode: Decode | None) -> Array:
    """(b, c, *spatial) → (b, frames, H, W, 3) in [0, 1]."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or not 3 <= x.ndim <= 5 or not len(x):
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{label} must be a floating point tensor (b, c, *spatial), such as (b, c, h, w); got {got}.")
    if decode is not None:
        return _pixels(f"decode({label})", torch.cat([decode(latent[None]) for latent in x]), None)
    if x.ndim > 3 and x.shape[1] not in (1, 3):
        raise ValueError(f"{label} has shape {tuple(x.shape)}, but pictures have 1 or 3 channels: give decode=, latents → pixels.")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{label} holds NaN or infinite values, so there is no picture to show: the sampling diverged.")
    return (_rgb(x.clamp(-1, 1)) + 1) / 2


def _frames(x: Tensor, count: int | None = None) -> Tensor:
    """(b, c, *spatial) → (b, c, frames, h, w): `count` evenly spaced frames of a video, or the one frame of anything else."""
    x = x.detach().float().cpu()
    if x.ndim == 3:
        x = F.adaptive_avg_pool1d(x, min(x.shape[2], STRIP))[:, None]
        channels, n = x.shape[2:]
        x = x.repeat_interleave(max(1, n // (4 * channels)), 2).repeat_interleave(max(1, channels // n), 3)
    if x.ndim == 4:
        x = x[:, :, None]
    return x[:, :, np.linspace(0, x.shape[2] - 1, count or min(FRAMES, x.shape[2])).round()]


def _rgb(x: Tensor) -> Array:
    """(b, c, *spatial) → (b, frames, h, w, 3)."""
    return np.asarray(_frames(x).expand(-1, 3, -1, -1, -1).permute(0, 2, 3, 4, 1))


def _amplified(label: str, difference: Array) -> Row:
    """A difference of pixels times a power of two that brings all but the largest hundredth near full contrast, 64 at most."""
    top = float(np.quantile(np.abs(difference), 0.99))
    gain = 2.0 ** max(0, math.floor(-math.log2(max(2 * top, 1 / 64))))
    return f"{label}, ×{gain:g}", np.clip(0.5 + difference * gain, 0, 1)


def _strip(frames: Array) -> Array:
    """(frames, h, w, ...) → (h, frames · w, ...)."""
    return np.concatenate(list(frames), axis=1)


def _sheet(pixels: Array) -> Array:
    """(b, frames, h, w, 3) → (1, H, W, 3): the b pictures in a square of rows, with white between them."""
    strips = torch.from_numpy(np.stack([_strip(frames) for frames in pixels])).permute(0, 3, 1, 2)
    across, gap = math.ceil(math.sqrt(len(strips))), max(1, strips.shape[2] // 32)
    return np.asarray(make_grid(strips, across, padding=gap, pad_value=1.0).permute(1, 2, 0)[None])


def _titles(names: Sequence[Any] | None, count: int) -> list[str]:
    titles = [f"sample {i}" for i in range(count)] if names is None else [str(name) for name in names]
    if len(titles) != count:
        raise ValueError(f"names must hold a name for each of the {count} samples, got {len(titles)}: {', '.join(titles)}.")
    return titles


def _draw(panels: Sequence[Panel], room: float = 0.0) -> tuple[Figure, list[Array]]:
    """Panels below each other, with `room` inches for a colour bar: the figure, and each panel's axes by row and column."""
    height, width = _strip(panels[0][2][0][1][0]).shape[:2]
    most, wide = max(len(columns) for _, columns, _ in panels), max(1.0, width / height / 2)
    side = min(max(NARROWEST * wide, WIDTH / most), 1 + width / 100, 3.2 * wide)
    heights = [len(rows) * (side * height / width + GAP) + 0.6 + 0.3 * bool(title) for title, _, rows in panels]
    figure = Figure((most * side + 1.3 + room, sum(heights)), dpi=100, layout="compressed")
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat if len(panels) > 1 else [figure]
    grids = []
    for part, (title, columns, rows) in zip(parts, panels, strict=True):
        part.suptitle(title, fontsize=FONT + 2)
        grids.append(part.subplots(len(rows), len(columns), squeeze=False))
        for ax, column in zip(grids[-1][0], columns, strict=True):
            ax.set_title(_wrapped(column, side), fontsize=FONT)
        for line, (label, images) in zip(grids[-1], rows, strict=True):
            line[0].set_ylabel(_wrapped(label, 1.25), fontsize=FONT, rotation=0, ha="right", va="center")
            for ax, image in zip(line, map(_strip, images), strict=True):
                # a small picture pixel by pixel, a large one smoothed
                ax.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="antialiased" if image.ndim == 3 else "nearest")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set(color="0.6", linewidth=0.5)
    return figure, grids


def _wrapped(text: str, inches: float) -> str:
    """At most four lines that fit."""
    return "\n".join(textwrap.wrap(text, int(inches * 120 / FONT), max_lines=4, placeholder=" …", break_on_hyphens=False))


def _overlay(axes: Sequence[Axes], pixels: Array, saliency: Tensor, mask: Tensor | None) -> None:
    """Redraws pictures in grey with their saliency over them, under one colour bar."""
    attended = _frames(saliency[:, None], pixels.shape[1])[:, 0].numpy()
    inside = None if mask is None else _frames(mask, pixels.shape[1])[:, 0].numpy()
    # the scale reaches at least 2, so that a nearly flat map looks flat
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(2.0, float(attended.max())))
    for i, ax in enumerate(axes):
        ax.images[0].set(data=_strip(pixels[i]).mean(-1), cmap="gray", extent=(extent := ax.images[0].get_extent()))
        drawn = ax.imshow(_strip(attended[i]), cmap="seismic", norm=norm, alpha=0.4, interpolation="nearest", extent=extent)
        if inside is not None and 0 < inside[i].mean() < 1:
            fine = np.kron(_strip(inside[i]), np.ones((8, 8)))  # or the contour would cut corners
            ax.contour(fine, [0.5], colors="black", linewidths=0.8, origin="upper", extent=extent)
    bar = axes[0].figure.colorbar(drawn, ax=list(axes), ticks=[0, 1, norm.vmax])
    bar.ax.set_yticklabels(["0", "1, the average", f"{norm.vmax:.2g}"], fontsize=FONT)
    bar.ax.set_title("saliency", fontsize=FONT, loc="left")
