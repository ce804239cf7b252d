"""FD against evaluations per picture, a curve for each method.  `python benchmarks/quality_plot.py`

Draws docs/evaluations.png from quality.jsonl: the bundled UNet, with `euler`, at several numbers of steps.
"""

from pathlib import Path

import click
from matplotlib.figure import Figure
from quality_rows import Result
from quality_table import HERE, PLAIN, along, fd, load

STYLES = {PLAIN: "#777777", "SAG": "#e07b00", "PAG": "#2a78c2", "SAG + PAG": "#b3123f"}
LABELS = {PLAIN: (6, 4, "left"), "SAG": (8, 0, "left"), "PAG": (8, 0, "left"), "SAG + PAG": (0, -16, "center")}
"""Offset in points, and alignment, of the label at the end of each curve."""


def draw(curves: dict[str, dict[int, Result]]) -> Figure:
    figure = Figure(figsize=(7, 4.2), dpi=200, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for name, color in STYLES.items():
        x = [result["evaluations"] for result in curves[name].values()]
        y = [fd(result) for result in curves[name].values()]
        axes.plot(x, y, "o-", color=color, markersize=5, linewidth=2)
        right, up, side = LABELS[name]
        axes.annotate(name, (x[-1], y[-1]), (right, up), textcoords="offset points", color=color, fontsize=12, weight="bold",
                      ha=side, va="center", bbox={"color": "white", "pad": 1})  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(7.5, 80), ylim=(4.4, 42))
    for axis, ticks in ((axes.xaxis, (8, 12, 16, 24, 32, 48, 64)), (axes.yaxis, (5, 6, 8, 10, 15, 20, 30, 40))):
        axis.set_ticks(ticks, [str(tick) for tick in ticks], fontsize=11)
        axis.set_ticks([], minor=True)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("model evaluations per picture", fontsize=12)
    axes.set_ylabel("FD (lower is better)", fontsize=12)
    return figure


@click.command(help=__doc__)
@click.argument("folder", default=HERE, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", default=HERE.parent / "docs/evaluations.png", type=click.Path(path_type=Path), help="The picture to write.")
def main(folder: Path, out: Path) -> None:
    draw(along(*load(folder), "emoji", "euler")).savefig(out)


if __name__ == "__main__":
    main()
