"""What did `benchmarks/quality.py` find?  `python benchmarks/quality_table.py`

Writes docs/quality.md from quality.jsonl and quality_choice.json: for each model and sampler, all methods at 24 steps, the settings
of the methods, and FD along the number of steps. Only rows that were measured appear.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path

import click
from quality_plan import MAIN, Choice, load_choice, methods_of
from quality_rows import Directions, Result, Row, Settings, load_results

HERE = Path(__file__).parent
SEEDS, STEPS, ALONG = 2, 24, 2000
"""The seeds of the report, the steps of the main tables, and the pictures of each row along the steps."""
PLAIN = "plain"
TITLES = {"emoji": "Bundled UNet", "emoji-flow": "Transformer trained by flow matching"}
HEADS = ["evaluations", "seconds", "FD", "over plain", "over equal", "KID × 1000", "precision, recall"]
Results = dict[Row, Result]


def load(folder: Path) -> tuple[Results, Choice]:
    """The results by their rows, and what was chosen."""
    return {Row.of(result): result for result in load_results(folder / "quality.jsonl").values()}, load_choice(folder)


def first_judge(result: Result) -> dict[str, float]:
    measures: dict[str, float] = next(iter(result["measures"].values()))
    return measures


def fd(result: Result) -> float:
    return first_judge(result)["fd"]


def seconds(result: Result) -> float:
    """For 1,000 pictures: the median over the row's batches."""
    return statistics.median(result["seconds"]) * 1000 / result["batch"]


def names(choice: Choice, model: str) -> dict[Directions, str]:
    return {(): PLAIN} | {directions: name for name, directions in methods_of(choice[model]).items()}


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def method_cells(row: Row, name: str, results: Results) -> list[str]:
    """One row of a main table. The two ratios are empty for plain sampling, and where plain sampling was not measured."""
    result = results[row]
    measures = first_judge(result)

    def over(other: Row) -> str:
        return f"{measures['fd'] / fd(results[other]):.2f}" if row.directions and other in results else ""

    ratios = [over(row.plain), over(row.equal)]
    shares = f"{measures['precision']:.3f}, {measures['recall']:.3f}"
    start = [name, f"{result['evaluations']:g}", f"{seconds(result):.2f}", f"{measures['fd']:.2f}"]
    return [*start, *ratios, f"{1000 * measures['kid']:.1f}", shares]


def main_rows(results: Results, choice: Choice, model: str, sampler: str) -> list[tuple[str, Row]]:
    """Plain sampling by its number of steps, then the methods in the order of the choice."""
    known = names(choice, model)
    of_report = [row for row in results if (row.model, row.sampler, row.seeds) == (model, sampler, SEEDS) and row.n != ALONG]
    plain = sorted((row for row in of_report if not row.directions), key=lambda row: row.steps)
    guided = [row for way in known for row in of_report if way and row.directions == way and row.steps == STEPS]
    named = [(PLAIN if row.steps == STEPS else f"{PLAIN}, {row.steps} steps", row) for row in plain]
    return named + [(known[row.directions], row) for row in guided]


def along(results: Results, choice: Choice, model: str, sampler: str) -> dict[str, dict[int, Result]]:
    """By method and number of steps."""
    found: dict[str, dict[int, Result]] = {}
    for way, name in names(choice, model).items():
        rows = {row.steps: row for row in results if (row.model, row.sampler, row.directions) == (model, sampler, way)
                and (row.seeds, row.n, row.cond_scale) == (SEEDS, ALONG, None)}  # fmt: skip
        if rows:
            found[name] = {steps: results[rows[steps]] for steps in sorted(rows)}
    return found


def along_table(curves: dict[str, dict[int, Result]]) -> str:
    def cell(name: str, steps: int) -> str:
        result = curves[name].get(steps)
        return f"{fd(result):.2f} ({result['evaluations']:g})" if result else ""

    steps = sorted({k for curve in curves.values() for k in curve})
    return table(["steps", *curves], ([str(k), *(cell(name, k) for name in curves)] for k in steps))


def settings_of(choice: Choice, model: str) -> str:
    def code(kind: str, settings: Settings) -> str:
        return f"{kind}({', '.join(f'{key}={value!r}' for key, value in settings)})"

    named = [(name, way) for way, name in names(choice, model).items() if way]
    return "\n".join(f"- {name}: `{' + '.join(code(*one) for one in way)}`" for name, way in named)


def page(results: Results, choice: Choice) -> str:
    """docs/quality.md."""
    parts = []
    for model in choice:
        for sampler in MAIN:
            rows = main_rows(results, choice, model, sampler)
            if rows:
                parts.append(f"### {TITLES[model]}, `{sampler}`, {STEPS} steps, {rows[0][1].n:,} pictures")
                parts.append(table(["", *HEADS], (method_cells(row, name, results) for name, row in rows)))
        parts += ["Settings:", settings_of(choice, model)]
        for sampler in MAIN:
            if curves := along(results, choice, model, sampler):
                parts.append(f"### {TITLES[model]}, `{sampler}`, FD by steps, {ALONG:,} pictures")
                parts += ["In brackets: evaluations per picture.", along_table(curves)]
    return "\n\n".join(parts) + "\n"


@click.command(help=__doc__)
@click.argument("folder", default=HERE, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", default=HERE.parent / "docs/quality.md", type=click.Path(path_type=Path), help="The page to write.")
def main(folder: Path, out: Path) -> None:
    out.write_text(page(*load(folder)))


if __name__ == "__main__":
    main()
