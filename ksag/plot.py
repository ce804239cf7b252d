"""Figures of samples, of what SAG looked at, and of grids of settings; needs the extra `ksag[notebook]`.

plot.compare({"plain": plain, "with SAG": guided}, names=["cat", "dog"])
plot.trace(steps)
plot.xyz(sample, x=("sag_scale", [0, 1, 2]), y=("blur_sigma", [1, 2]))

Each returns a matplotlib figure of its own, which shows itself in a notebook and has `savefig`; pyplot is not touched.
"""

import io
import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from tqdm.auto import tqdm

from ksag.guidance.trace import TraceStep

try:
    import matplotlib.figure
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.colors import TwoSlopeNorm
except ImportError as error:
    raise ImportError("ksag.plot draws with matplotlib. In a clone of ksag: pip install '.[notebook]'") from error

Decode = Callable[[Tensor], Tensor]
"""Latents (b, c, h, w) → pixels (b, 3, H, W) in [-1, 1]."""

WIDTH = 7.0
"""Inches that the pictures of a row share, at 100 dpi about what a code host shows of a notebook."""

NARROWEST = 0.8
"""Inches that a picture has, however many share a row."""

BAR = 1.5
"""Inches that a colour bar and its labels take."""

GAP = 0.08
MARGIN = 0.06
FONT = 9


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that a notebook shows where a cell returns it, and nowhere else."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def compare(
    pictures: Mapping[str, Tensor], *, names: Sequence[str] | None = None, decode: Decode | None = None, difference: bool = False
) -> Figure:
    """A labelled row for each entry, a column for each sample.

    Args:
        pictures: label → what a sampler returned, (b, c, h, w): pixels in [-1, 1], or latents with `decode`; the same
            samples in each entry.
        names: the b columns' titles; "sample 0" and so on by default.
        decode: latents → pixels, called for one sample at a time.
        difference: under each entry but the first, what changed from the first: amplified by the factor that its label
            gives, grey where nothing did.

    Raises:
        ValueError, TypeError: no entry, entries of different batches, or no pixels; the message says which.

    >>> noise = torch.rand(2, 3, 32, 32) * 2 - 1
    >>> figure = compare({"plain": noise, "half": noise / 2}, names=["cat", "dog"], difference=True)
    >>> figure.savefig("compare.png")  # doctest: +SKIP
    """
    if len(pictures) < 1 + difference:
        raise ValueError(
            f"compare shows {1 + difference} or more entries, such as {{'plain': x0, 'with SAG': x1}}, got {len(pictures)}."
        )
    pixels = {label: _pixels(label, x, decode) for label, x in pictures.items()}
    (first, reference), *others = pixels.items()
    titles = _titles(names, len(reference))
    rows = {first: reference}
    for label, x in others:
        if len(x) != len(reference) or (difference and x.shape != reference.shape):
            raise ValueError(
                f"Every entry holds the same samples: {first!r} has shape {tuple(pictures[first].shape)}, "
                f"{label!r} has {tuple(pictures[label].shape)}."
            )
        rows[label] = x
        if difference:
            gain = _gain(x - reference)
            rows[f"{label} − {first}, ×{gain:g}"] = _amplified(x - reference, gain)
    return _trim(_draw([("", list(rows.items()))], titles))


def trace(steps: Sequence[TraceStep], *, sample: int = 0, decode: Decode | None = None, columns: int = 6) -> Figure:
    """What SAG computed for one sample along sigma: a column for each of some evenly spaced steps.

    From top to bottom: the saliency over the prediction, with the mask's outline; the mask; the unconditional prediction
    u; d, that is u blurred under the mask; r, what the model makes of d; and the direction of guidance, d − r, amplified
    by the factor that its label gives, the same in all columns, and grey where it is zero.

    Args:
        steps: what `guided.trace()` yields.
        sample: which sample of the batch.
        decode: latents → pixels, called for one sample at a time; the direction is then that of the decoded pictures.
        columns: at most so many steps, the first and the last among them.

    Raises:
        ValueError, TypeError: no steps, no such sample, or latents without `decode`.

    >>> from ksag import TraceStep
    >>> u, d, r = torch.rand(3, 1, 3, 32, 32) * 2 - 1
    >>> steps = [TraceStep(torch.tensor([8.0]), torch.rand(1, 8, 8) * 2, torch.ones(1, 1, 32, 32), u, d, r)]
    >>> figure = trace(steps)
    """
    if not steps:
        raise ValueError("The trace holds no step: a call at sag_scale 0, or outside sigma_range, is not guided and leaves none.")
    if columns < 1:
        raise ValueError(f"columns is how many steps to show, 1 or more, got {columns}.")
    batch = len(steps[0].uncond)
    if not 0 <= sample < batch:
        raise ValueError(f"sample={sample}, and the trace holds {batch}: give 0 to {batch - 1}.")
    chosen = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(columns, len(steps)))]

    def of_sample(field: str) -> Tensor:
        return torch.stack([getattr(step, field)[sample] for step in chosen]).float()

    u, d, r = (_pixels(field, of_sample(field), decode) for field in ("uncond", "degraded", "reevaluated"))
    mask, gain = of_sample("mask"), _gain(d - r)
    rows = {
        "saliency over u": u,
        "mask: blurred where white": mask[:, 0].numpy(),
        "u: prediction": u,
        "d: degraded": d,
        "r: re-evaluated": r,
        f"direction d\N{NO-BREAK SPACE}−\N{NO-BREAK SPACE}r,\N{NO-BREAK SPACE}×{gain:g}": _amplified(d - r, gain),
    }
    figure = _draw([("", list(rows.items()))], [f"σ {float(step.sigma[sample]):.3g}" for step in chosen], BAR)
    _overlay(figure, figure.axes[: len(chosen)], u, of_sample("saliency"), mask)
    return _trim(figure)


def saliency(
    images: Tensor,
    saliency: Tensor,
    *,
    mask: Tensor | None = None,
    names: Sequence[str] | None = None,
    decode: Decode | None = None,
) -> Figure:
    """How much attention each part of the pictures receives, over the pictures in grey; 1 is the average.

    Args:
        images: (b, c, h, w), pixels in [-1, 1], or latents with `decode`.
        saliency: (b, h', w'), as a `TraceStep` holds it, on the layer's own grid.
        mask: (b, 1, h, w), drawn as an outline.
        names: the b pictures' titles; "sample 0" and so on by default.
        decode: latents → pixels, called for one sample at a time.

    Raises:
        ValueError, TypeError: shapes that do not fit together, or latents without `decode`.

    >>> images, attended = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 8, 8) * 2
    >>> figure = saliency(images, attended, names=["cat", "dog"])
    """
    pixels = _pixels("images", images, decode)
    if saliency.ndim != 3 or len(saliency) != len(pixels):
        raise ValueError(f"saliency must be of shape ({len(pixels)}, h', w') for these images, got {tuple(saliency.shape)}.")
    if mask is not None and (mask.ndim != 4 or mask.shape[:2] != (len(pixels), 1)):
        raise ValueError(f"mask must be of shape ({len(pixels)}, 1, h, w) for these images, got {tuple(mask.shape)}.")
    figure = _draw([("", [("", pixels)])], _titles(names, len(pixels)), BAR)
    _overlay(figure, figure.axes, pixels, saliency, mask)
    return _trim(figure)


Axis = tuple[str, Sequence[Any]]
"""A parameter's name and the values that it takes along an axis."""


def xyz(
    sample: Callable[..., Tensor],
    *,
    x: Axis = ("sag_scale", (0, 1, 2)),
    y: Axis | None = None,
    z: Axis | None = None,
    decode: Decode | None = None,
) -> Figure:
    """A grid of settings: x across, y down, and a panel for each value of z.

    `sample` runs once for each setting, under a progress bar; nothing but the setting should change from call to call, so
    let it start from the same noise.

    Args:
        sample: called with a keyword for each axis, such as `sample(sag_scale=0.5, blur_sigma=2.0)`; returns what a sampler
            returns, (b, c, h, w). The b samples of a setting are tiled.
        x, y, z: ("parameter", [values]).
        decode: latents → pixels, called for one sample at a time.

    Raises:
        ValueError, TypeError: an axis without values, a parameter on two axes, or results that are no pixels.

    >>> def sample(sag_scale, blur_sigma):
    ...     return torch.full((1, 3, 32, 32), sag_scale / blur_sigma)
    >>> figure = xyz(sample, x=("sag_scale", [0, 1]), y=("blur_sigma", [1, 2]))
    """
    axes = [_axis(letter, axis) for letter, axis in (("z", z), ("y", y), ("x", x)) if axis is not None]
    names = [name for name, _ in axes]
    if len(set(names)) < len(names):
        raise ValueError(f"Each axis needs a parameter of its own, got {', '.join(names)}.")
    settings = [dict(zip(names, values, strict=True)) for values in itertools.product(*(values for _, values in axes))]
    results = [
        _pixels(f"sample(**{setting})", sample(**setting), decode)
        for setting in tqdm(settings, desc=" × ".join(reversed(names)), unit="setting")
    ]
    across = math.ceil(math.sqrt(len(results[0])))
    sheets = (_sheet(pixels, across) for pixels in results)
    panels, rows, columns = (_labels(axis) for axis in (z, y, x))
    drawn = [(panel, [(row, [next(sheets) for _ in columns]) for row in rows]) for panel in panels]
    return _trim(_draw(drawn, columns, across=across))


# Samples → pictures


@torch.no_grad()
def _pixels(label: str, x: Tensor, decode: Decode | None) -> np.ndarray:
    """(b, c, h, w) pixels in [-1, 1], or latents with `decode` → (b, H, W, 3) in [0, 1]."""
    what = label
    if decode is not None:
        _check_batch(label, x)
        what = f"decode({label})"
        decoded = [decode(latent[None]) for latent in x]
        for picture in decoded:
            _check_batch(what, picture)
        x = torch.cat(decoded)
    _check_batch(what, x)
    if x.shape[1] not in (1, 3):
        raise ValueError(
            f"{what} has shape {tuple(x.shape)}, and pictures have 1 or 3 channels. For latents pass decode=, latents → pixels, "
            f"such as lambda latents: ksag.adapters.diffusers.decode(pipe, latents)."
        )
    x = x.detach().float().cpu()
    if not bool(x.isfinite().all()):
        raise ValueError(f"{what} holds NaN or infinite values, so there is no picture to show: the sampling diverged.")
    return ((x.clamp(-1, 1) + 1) / 2).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _check_batch(label: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4 or not len(x):
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{label} must be a floating point tensor (b, c, h, w), as samplers return it, in [-1, 1]; got {got}.")


def _gain(difference: np.ndarray) -> float:
    """The power of two that brings the largest differences but for one in a hundred near full contrast, 1 to 64.

    More than 64 would make a picture of rounding.
    """
    top = float(np.quantile(np.abs(difference), 0.99))
    return 2.0 ** max(0, math.floor(-math.log2(max(2 * top, 1 / 64))))


def _amplified(difference: np.ndarray, gain: float) -> np.ndarray:
    return np.clip(0.5 + difference * gain, 0, 1)


def _sheet(pixels: np.ndarray, across: int) -> np.ndarray:
    """(b, H, W, 3) → the b pictures as one, `across` in a row, with white between them."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return torchvision.utils.make_grid(images, across, max(1, images.shape[-1] // 16), pad_value=1.0).permute(1, 2, 0).numpy()


# Labels


def _titles(names: Sequence[Any] | None, count: int) -> list[str]:
    titles = [f"sample {i}" for i in range(count)] if names is None else [str(name) for name in names]
    if len(titles) != count:
        raise ValueError(f"names must hold a name for each of the {count} samples, got {len(titles)}: {', '.join(titles)}.")
    return titles


def _axis(letter: str, axis: Axis) -> Axis:
    try:
        name, values = axis
        values = list(values)
    except (TypeError, ValueError):
        name, values = None, []
    if not isinstance(name, str) or not values:
        raise ValueError(f"{letter} must be a parameter's name and its values, such as ('blur_sigma', [1, 2]), got {axis!r}.")
    return name, values


def _labels(axis: Axis | None) -> list[str]:
    if axis is None:
        return [""]
    name, values = axis
    return [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for value in values]


def _wrapped(text: str, inches: float) -> str:
    """In lines that fit, at most four."""
    characters = int(inches * 72 / (0.6 * FONT))
    return "\n".join(textwrap.wrap(text, characters, max_lines=4, placeholder=" …", break_on_hyphens=False))


# Drawing

Row = tuple[str, np.ndarray | list[np.ndarray]]
"""A label, and for each column an array (H, W) or (H, W, 3) in [0, 1]."""


def _draw(panels: Sequence[tuple[str, Sequence[Row]]], titles: Sequence[str], room: float = 0.0, across: int = 1) -> Figure:
    """Panels, each titled and of the same rows and columns, side by side as far as they fit.

    `room` inches are for a colour bar. Each array shows so many pictures `across`.
    """
    rows, columns = len(panels[0][1]), len(titles)
    height, width = panels[0][1][0][1][0].shape[:2]
    abreast = min(len(panels), max(1, int((WIDTH + 1) / (columns * across * NARROWEST + 1))))
    panel_rows = math.ceil(len(panels) / abreast)
    side = min(max(NARROWEST, (WIDTH / abreast - 0.9 * (abreast > 1)) / columns), 1 + width / 100, 3.2)
    titles = [_wrapped(title, side) for title in titles]
    heading = 0.3 + 0.17 * max(title.count("\n") + 1 for title in titles)
    size = (abreast * (columns * side + 1.3) + room, panel_rows * (rows * (side * height / width + GAP) + heading))
    figure = Figure(size, dpi=100, layout="compressed")
    parts = figure.subfigures(panel_rows, abreast, squeeze=False).flat if len(panels) > 1 else [figure]
    for part, (title, panel) in zip(parts, panels, strict=False):
        part.suptitle(title, fontsize=FONT + 2)
        axes = part.subplots(rows, columns, squeeze=False)
        for ax, column in zip(axes[0], titles, strict=True):
            ax.set_title(column, fontsize=FONT)
        for line, (label, images) in zip(axes, panel, strict=True):
            line[0].set_ylabel(_wrapped(label, 1.25), fontsize=FONT, rotation=0, ha="right", va="center")
            for ax, image in zip(line, images, strict=True):
                _show(ax, image)
    return figure


def _show(ax: Axes, image: np.ndarray) -> None:
    """A small picture pixel by pixel, a large one smoothed down to its size."""
    ax.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="antialiased" if image.ndim == 3 else "nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(color="0.6", linewidth=0.5)


def _overlay(figure: Figure, axes: Sequence[Axes], pixels: np.ndarray, saliency: Tensor, mask: Tensor | None) -> None:
    """Redraws pictures in grey, their saliency over them, under one colour bar."""
    attended = saliency.detach().float().cpu().numpy()
    # A map that is nearly flat shall look so, hence the floor of the scale's end.
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(2.0, float(attended.max())))
    height, width = pixels.shape[1:3]
    for i, ax in enumerate(axes):
        ax.images[0].set(data=pixels[i].mean(-1), cmap="gray")
        drawn = ax.imshow(
            attended[i],
            cmap="seismic",
            norm=norm,
            alpha=0.4,
            interpolation="nearest",
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )
        if mask is not None:
            ax.add_collection(LineCollection(_outline(mask[i, 0].cpu().numpy(), height, width), colors="black", linewidths=0.8))
    bar = figure.colorbar(drawn, ax=list(axes), ticks=[0, 1, norm.vmax])
    bar.ax.set_yticklabels(["0", "1, the average", f"{norm.vmax:.2g}"], fontsize=FONT)
    bar.ax.set_title("saliency", fontsize=FONT, loc="left")


def _outline(mask: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """The borders of a mask (h, w), as line segments (2 ends, xy) on a picture of height × width pixels."""
    inside = np.pad(mask > 0.5, 1)
    y, x = np.nonzero(np.diff(inside[:, 1:-1], axis=0))
    across = np.stack([[x, y], [x + 1, y]])
    y, x = np.nonzero(np.diff(inside[1:-1], axis=1))
    down = np.stack([[x, y], [x, y + 1]])
    segments = np.concatenate([across, down], axis=-1).transpose(2, 0, 1)
    return list(segments * (width / mask.shape[1], height / mask.shape[0]) - 0.5)


def _trim(figure: Figure) -> Figure:
    """Cuts the figure's size down to what is on it."""
    for _ in range(2):
        figure.draw_without_rendering()
        used = figure.get_tightbbox()
        figure.set_size_inches(used.width + 2 * MARGIN, used.height + 2 * MARGIN)
    return figure
