"""FD against the cost of a picture, a curve for each method.  `python benchmarks/quality_plot.py`

Draws from quality.jsonl, at 8 to 64 steps: docs/evaluations.png, FD against evaluations with one sampler for each model, and
docs/curves.png, FD against evaluations and against seconds with three samplers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from quality_rows import Result
from quality_table import ENOUGH, HERE, PLAIN, SAMPLED, TITLES, Curves, along, fd, load, seconds

STYLES = {
    PLAIN: ("#777777", "o-"), "SAG": ("#e07b00", "s-"), "SAG, one pass": ("#7a4a00", "^--"), "PAG": ("#2a78c2", "D-"),
    "SAG + PAG": ("#b3123f", "v-"), "SEG": ("#2e8b57", "P-"),
}  # fmt: skip
"""Each method's colour, and its marker and line."""
FDS = (4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 40)
COSTS: dict[str, tuple[Callable[[Result], float], tuple[float, ...]]] = {
    "model evaluations per picture": (lambda result: float(result["evaluations"]), (8, 16, 32, 64, 128)),
    "seconds for 1,000 pictures": (seconds, (0.25, 0.5, 1, 2, 4, 8)),
}
"""What is on the horizontal axis, and its ticks."""


def draw_curves(axes: Axes, curves: Curves, label: str, title: str) -> None:
    """FD against one kind of cost."""
    cost, ticks = COSTS[label]
    for name, (color, line) in STYLES.items():
        if len(curves.get(name, ())) >= ENOUGH:
            x, y = zip(*((cost(result), fd(result)) for result in curves[name].values()), strict=True)
            axes.plot(x, y, line, color=color, markersize=4, linewidth=1.6, label=name)
    axes.set(xscale="log", yscale="log", title=title, xlim=(ticks[0] / 1.15, ticks[-1] * 1.15))
    low, high = axes.get_ylim()
    for axis, shown in ((axes.xaxis, ticks), (axes.yaxis, [tick for tick in FDS if low <= tick <= high])):
        axis.set_ticks(shown, [f"{tick:g}" for tick in shown])
        axis.set_ticks([], minor=True)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)
    axes.set_ylabel("FD (lower is better)")


def add_legend(figure: Figure) -> None:
    """One for all axes, above them."""
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(
        handles=[lines[name] for name in STYLES if name in lines], loc="outside upper center", ncols=len(STYLES), frameon=False
    )


def small(of: Callable[[str, str], Curves], models: Sequence[str]) -> Figure:
    """A column for each model with `euler`, FD against evaluations."""
    figure = Figure(figsize=(9, 3.7), dpi=200, facecolor="white", layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
        draw_curves(axes, of(model, "euler"), next(iter(COSTS)), TITLES[model])
        if axes is not figure.axes[0]:
            axes.set_ylabel("")
    add_legend(figure)
    return figure


def large(of: Callable[[str, str], Curves], models: Sequence[str]) -> Figure:
    """A column for each sampler, and two rows for each model."""
    figure = Figure(figsize=(11, 20 / 3 * len(models)), dpi=110, facecolor="white", layout=ConstrainedLayoutEngine(hspace=0.06))
    rows = [(model, label) for model in models for label in COSTS]
    for of_row, (model, label) in zip(figure.subplots(len(rows), len(SAMPLED)), rows, strict=True):
        for axes, sampler in zip(of_row, SAMPLED, strict=True):
            draw_curves(axes, of(model, sampler), label, f"{TITLES[model]}\n{sampler}")
            if axes is not of_row[0]:
                axes.set_ylabel("")
    add_legend(figure)
    return figure


@click.command(help=__doc__)
@click.argument("folder", default=HERE, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", default=HERE.parent / "docs", type=click.Path(path_type=Path), help="The folder to write the pictures to.")
def main(folder: Path, out: Path) -> None:
    results, choice = load(folder)

    def of(model: str, sampler: str) -> Curves:
        return along(results, choice, model, sampler)

    small(of, list(choice)).savefig(out / "evaluations.png")
    large(of, list(choice)).savefig(out / "curves.png")


if __name__ == "__main__":
    main()
