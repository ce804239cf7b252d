"""What did `benchmarks/quality.py` find?  `python benchmarks/quality_table.py`

Writes docs/quality.md from quality.jsonl and quality_choice.json: for each model and sampler all methods at 24 steps, then the
settings of the methods, FD by steps, the other samplers, classifier-free guidance, and a transformer's blocks. Only rows that
were measured appear. The last table comes from quality_gpus.jsonl, if it is there: rows of one GPU alone, and beside another.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click
import numpy as np
from quality_plan import (
    ALONG,
    ALONG_STEPS,
    CHOICE_SEEDS,
    COND_SCALES,
    FEW,
    GRID_STEPS,
    KINDS,
    MAIN,
    OTHERS,
    PLAIN_STEPS,
    REPORT_SEEDS,
    SAMPLED,
    Choice,
    load_choice,
    methods_of,
    plain_at,
    recommended,
    starts,
)
from quality_rows import FLOWS, Directions, Result, Row, Settings, frozen, load_results

from ksag.samplers import SAMPLERS

HERE = Path(__file__).parent
FIRST, STEPS = REPORT_SEEDS[0], 24
"""The first seeds of the report, and the steps of the main tables."""
ENOUGH = 4
"""Points that a curve has at least; the methods without a curve have two."""
PLAIN, EQUAL = "plain", "with equal evaluations"
TITLES = {"emoji": "Bundled UNet", "emoji-flow": "Transformer, first training", "emoji-flow-2": "Transformer, second training"}
Results = dict[Row, Result]
Curves = dict[str, dict[int, Result]]


def load(folder: Path) -> tuple[Results, Choice]:
    """The results by their rows, and what was chosen."""
    return {Row.of(result): result for result in load_results(folder / "quality.jsonl").values()}, load_choice(folder)


def judged(result: Result, judge: int = 0) -> dict[str, float]:
    """The measures of the first or the second judge; nothing if that one did not see the row."""
    measures = list(result["measures"].values())
    found: dict[str, float] = measures[judge] if judge < len(measures) else {}
    return found


def fd(result: Result) -> float:
    return judged(result)["fd"]


def seconds(result: Result) -> float:
    """For 1,000 pictures: of the row's fastest batch, since others may have waited for the compiler."""
    return float(min(result["seconds"])) * 1000 / result["batch"]


def plain_of(row: Row) -> Row:
    return row.plain


def equal_to(row: Row) -> Row:
    return row.equal


def names(choice: Choice, model: str) -> dict[Directions, str]:
    return {(): PLAIN} | {directions: name for name, directions in methods_of(choice[model]).items()}


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


# All methods at 24 steps


MAIN_HEAD = [
    "",
    "evaluations",
    "seconds",
    "FD",
    "over plain",
    "over equal",
    "second judge, over equal",
    "KID × 1000",
    "precision, recall",
]


def spread(values: list[float]) -> str:
    """The mean, and the lowest and the highest of several."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else mean


def over(rows: list[Row], other: Callable[[Row], Row], results: Results, judge: int = 0) -> str:
    """FD over that of another row, for each set of seeds in which this judge saw both."""
    pairs = [(judged(results[row], judge), judged(results[other(row)], judge)) for row in rows if other(row) in results]
    ratios = [one["fd"] / two["fd"] for one, two in pairs if one and two]
    return spread(ratios) if ratios and rows[0].directions else ""


def method_cells(name: str, rows: list[Row], results: Results) -> list[str]:
    """A line of a main table, from the rows of one method with each set of seeds. For plain sampling the ratios are empty."""

    def mean(of: Callable[[Result], float]) -> float:
        return statistics.mean(of(results[row]) for row in rows)

    def share(part: str) -> str:
        return f"{mean(lambda result: judged(result)[part]):.3f}"

    return [
        name, f"{results[rows[0]]['evaluations']:g}", f"{seconds(results[rows[0]]):.2f}",
        spread([fd(results[row]) for row in rows]), over(rows, plain_of, results),
        over(rows, equal_to, results), over(rows, equal_to, results, judge=1),
        f"{1000 * mean(lambda result: judged(result)['kid']):.1f}", f"{share('precision')}, {share('recall')}",
    ]  # fmt: skip


def main_rows(results: Results, choice: Choice, model: str, sampler: str) -> list[tuple[str, list[Row]]]:
    """Plain sampling by its number of steps, then the methods in the order of the choice; each with every set of seeds."""
    known = names(choice, model)
    found: dict[tuple[Directions, int], list[Row]] = {}
    for row in sorted(results, key=lambda row: row.seeds):
        if (row.model, row.sampler) == (model, sampler) and row.seeds in REPORT_SEEDS and row.n > FEW:
            found.setdefault((row.directions, row.steps), []).append(row)
    plain = sorted(steps for directions, steps in found if not directions)
    named = [(PLAIN if steps == STEPS else f"{PLAIN}, {steps} steps", found[(), steps]) for steps in plain]
    return named + [(known[way], found[way, STEPS]) for way in known if way and (way, STEPS) in found]


def settings_of(choice: Choice, model: str) -> str:
    def code(kind: str, settings: Settings) -> str:
        return f"{kind}({', '.join(f'{key}={value!r}' for key, value in settings)})"

    named = [(name, way) for way, name in names(choice, model).items() if way]
    return "\n".join(f"- {name}: `{' + '.join(code(*one) for one in way)}`" for name, way in named)


# FD by the number of steps


def along(results: Results, choice: Choice, model: str, sampler: str) -> Curves:
    """By method and number of steps."""
    found: Curves = {}
    for way, name in names(choice, model).items():
        rows = {row.steps: row for row in results if (row.model, row.sampler, row.directions) == (model, sampler, way)
                and (row.seeds, row.n, row.cond_scale) == (FIRST, FEW, None) and row.steps in ALONG_STEPS}  # fmt: skip
        if len(rows) >= (ENOUGH if name in (PLAIN, *ALONG) else 2):
            found[name] = {steps: results[rows[steps]] for steps in sorted(rows)}
    return found


def reaches(curve: dict[int, Result], goal: float) -> float | None:
    """The evaluations with which a method's FD falls to `goal`, interpolated linearly in the logarithms of both."""
    points = [(result["evaluations"], fd(result)) for result in curve.values()] if len(curve) >= ENOUGH else []
    for (e0, f0), (e1, f1) in itertools.pairwise(points):
        if f0 > goal >= f1:
            return math.exp(np.interp(-math.log(goal), [-math.log(f0), -math.log(f1)], [math.log(e0), math.log(e1)]))
    return points[0][0] if points and points[0][1] <= goal else None


def along_table(curves: Curves) -> str:
    def cell(name: str, steps: int) -> str:
        result = curves[name].get(steps)
        return f"{fd(result):.2f} ({result['evaluations']:g})" if result else ""

    steps = sorted({k for curve in curves.values() for k in curve})
    rows = [[str(k), *(cell(name, k) for name in curves)] for k in steps]
    last = list(curves[PLAIN])[-1]
    found = [reaches(curve, fd(curves[PLAIN][last])) for curve in curves.values()]
    rows.append([f"evaluations to the FD of {last} plain steps", *(f"{e:.0f}" if e else "" for e in found)])
    return table(["steps", *curves], rows)


# Other samplers


def sampler_table(results: Results, choice: Choice, model: str) -> str:
    """The best method under every other sampler."""
    best, rows = recommended(choice[model]), []
    for row in results:
        few = (row.model, row.directions, row.seeds, row.n, row.cond_scale) == (model, best, FIRST, FEW, None)
        there = row.plain in results and (row.sampler == "dpm_adaptive" or row.equal in results)
        if few and there and row.steps == OTHERS.get(row.sampler):
            equal = results.get(row.equal)
            guided, plain = results[row], results[row.plain]
            ratio = over([row], equal_to, results) if equal else ""
            rows.append([
                f"`{row.sampler}`", str(row.steps), f"{fd(plain):.2f} ({plain['evaluations']:g})",
                f"{fd(equal):.2f} ({equal['evaluations']:g})" if equal else "", f"{fd(guided):.2f} ({guided['evaluations']:g})",
                over([row], plain_of, results), ratio, over([row], equal_to, results, 1) if equal else "",
            ])  # fmt: skip
    head = ["", "steps", "plain", "plain, equal", "guided", "over plain", "over equal", "second judge, over equal"]
    return table(head, sorted(rows)) if rows else ""


def grid_tables(results: Results, choice: Choice, model: str) -> dict[str, str]:
    """FD of every method under every sampler by number of steps, relative to plain sampling; by what a table compares."""
    ways, steps = methods_of(choice[model]), sorted(GRID_STEPS)
    schedule = frozen(choice[model]["schedule"])

    def row(sampler: str, scale: float | None, k: int, way: Directions = ()) -> Row:
        return Row(model, sampler, k, schedule, way, scale, FIRST, FEW)

    def cell(rows: list[Row], other: Callable[[Row], Row], judge: int) -> str:
        ratios = [over([one], other, results, judge) if one in results else "" for one in rows]
        return ", ".join(ratio or "–" for ratio in ratios) if any(ratios) else ""

    def compared(other: Callable[[Row], Row], judge: int) -> str:
        lines = []
        for sampler, scale in [*((s, None) for s in SAMPLERS), *((s, scale) for scale in COND_SCALES for s in MAIN)]:
            plain = [results.get(row(sampler, scale, k)) for k in steps]
            fds = ", ".join(f"{judged(one, judge)['fd']:.1f}" if one and judged(one, judge) else "–" for one in plain)
            cells = [cell([row(sampler, scale, k, way) for k in steps], other, judge) for way in ways.values()]
            if all(cells):
                lines.append([f"`{sampler}`" + (f", `cond_scale` {scale:g}" if scale else ""), fds, *cells])
        return table(["", "plain FD", *ways], lines) if lines else ""

    return {
        EQUAL: compared(equal_to, 0),
        f"{EQUAL}, by the second judge": compared(equal_to, 1),
        "with the same steps": compared(plain_of, 0),
    }


# Classifier-free guidance


def cfg_table(results: Results, choice: Choice, model: str, sampler: str) -> str:
    """Each method with two cond_scales, beside plain classifier-free guidance with the cond_scale that gives the same precision."""
    known = names(choice, model)
    known |= {tuple((kind, frozen({**dict(s), "scale": round(dict(s)["scale"] / 2, 3)})) for kind, s in recommended(choice[model])):
              "the best at half its scales"}  # fmt: skip
    of_report = [row for row in results if (row.model, row.sampler, row.steps) == (model, sampler, STEPS) and row.cond_scale]
    plain = sorted((row for row in of_report if not row.directions), key=lambda row: row.cond_scale or 0)
    scales = [row.cond_scale or 0.0 for row in plain]
    rows = []
    shown = [row for row in of_report if row.cond_scale in COND_SCALES]
    for row in sorted(shown, key=lambda row: (row.cond_scale, list(known).index(row.directions))):
        measures = judged(results[row])
        cells = [f"{row.cond_scale:g}", known[row.directions], f"{results[row]['evaluations']:g}", f"{measures['fd']:.2f}"]
        cells += [over([row], other, results, judge) for other, judge in ((plain_of, 0), (equal_to, 0), (equal_to, 1))]
        cells += [f"{1000 * measures['kid']:.1f}", f"{measures['precision']:.3f}, {measures['recall']:.3f}"]
        rows.append(cells + (effective(measures, [judged(results[one]) for one in plain], scales) if row.directions else ["", ""]))
    head = [
        "cond_scale",
        "",
        "evaluations",
        "FD",
        "over plain",
        "over equal",
        "second judge, over equal",
        "KID × 1000",
        "precision, recall",
        "plain's cond_scale of equal precision",
        "its FD",
    ]
    return table(head, rows) if rows else ""


def effective(measures: dict[str, float], plain: list[dict[str, float]], scales: list[float]) -> list[str]:
    """The cond_scale at which plain classifier-free guidance has this precision, and its FD there, both interpolated.

    Precision rises and falls with cond_scale: of several places, the one with the lowest FD.
    """
    goal, precisions, places = measures["precision"], [one["precision"] for one in plain], []
    for (p0, s0, f0), (p1, s1, f1) in itertools.pairwise(zip(precisions, scales, (one["fd"] for one in plain), strict=True)):
        if min(p0, p1) <= goal <= max(p0, p1):
            part = (goal - p0) / (p1 - p0) if p1 != p0 else 0.0
            places.append((f0 + part * (f1 - f0), s0 + part * (s1 - s0)))
    if not places:
        return [f"{'below' if goal < min(precisions) else 'above'} all", ""]
    distance, scale = min(places)
    return [f"{scale:.2f}", f"{distance:.2f}"]


# The blocks of a transformer


def block_table(results: Results, choice: Choice, model: str) -> str:
    """FD over plain sampling at equal evaluations by block that each method reads, changes or skips: on the seeds of the choice."""
    schedule = frozen(choice[model]["schedule"])

    def row(sampler: str, steps: int = STEPS, way: Directions = ()) -> Row:
        return Row(model, sampler, steps, schedule, way, seeds=CHOICE_SEEDS, n=1000)

    def cell(way: Directions) -> str:
        ratios = []
        for sampler in MAIN:
            curve = {results[one]["evaluations"]: fd(results[one]) for one in (row(sampler, k) for k in PLAIN_STEPS)}
            result = results[row(sampler, way=way)]
            ratios.append(fd(result) / plain_at(result["evaluations"], curve))
        return ", ".join(f"{ratio:.2f}" for ratio in ratios)

    ways = {method: starts(model, method, {}) for method in KINDS}
    if not all(row(sampler, way=way) in results for of_method in ways.values() for way in of_method for sampler in MAIN):
        return ""
    return table(["block", *ways], ([str(i), *map(cell, each)] for i, each in enumerate(zip(*ways.values(), strict=True))))


# Speed


def speed_table(lines: Iterable[str]) -> str:
    """Evaluations a second of the same rows on one GPU, and on each of two at once."""
    alone, beside = ({Row.of(result): result for result in map(json.loads, lines) if result["gpus"] == n} for n in (1, 2))

    def speed(result: Result) -> float:
        return 1000 * float(result["evaluations"]) / seconds(result)

    def name(row: Row) -> str:
        one_pass = ", one pass" if any(dict(settings).get("one_pass") for _, settings in row.directions) else ""
        return f"{' + '.join(kind for kind, _ in row.directions) or PLAIN}{one_pass}, {row.steps} steps"

    rows = [row for row in beside if row in alone]
    speeds = [(name(row), speed(alone[row]), speed(beside[row])) for row in rows]
    return table(
        ["", "alone", "beside another GPU", "ratio"], ([n, f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.2f}"] for n, a, b in speeds)
    )


def page(results: Results, choice: Choice, gpus: Sequence[str] = ()) -> str:
    """docs/quality.md. `gpus` are the lines of quality_gpus.jsonl."""
    parts: list[str] = []

    def section(title: str, *content: str) -> None:
        if all(content):
            parts.extend([f"### {title}", *content])

    for model in choice:
        title = TITLES[model]
        for sampler in MAIN:
            if rows := main_rows(results, choice, model, sampler):
                content = table(MAIN_HEAD, (method_cells(name, of_method, results) for name, of_method in rows))
                section(f"{title}, `{sampler}`, {STEPS} steps, {rows[0][1][0].n:,} pictures", content)
        parts += ["Settings:", settings_of(choice, model)]
        for sampler in SAMPLED:
            if PLAIN in (curves := along(results, choice, model, sampler)):
                text = "In brackets: evaluations per picture."
                section(f"{title}, `{sampler}`, FD by steps, {FEW:,} pictures", text, along_table(curves))
        method = names(choice, model)[recommended(choice[model])]
        text = f"Guided by {method}. In brackets: evaluations per picture."
        section(f"{title}, other samplers, {FEW:,} pictures", text, sampler_table(results, choice, model))
        grid = grid_tables(results, choice, model)
        for compared, content in grid.items() if grid[EQUAL] else ():
            *first, last = sorted(GRID_STEPS)
            text = f"At {', '.join(map(str, first))} and {last} steps. The methods' columns have FD over plain sampling {compared}."
            section(f"{title}, every method and sampler, {compared}, {FEW:,} pictures", text, content)
        for sampler in MAIN:
            section(
                f"{title}, `{sampler}` with classifier-free guidance, {FEW:,} pictures", cfg_table(results, choice, model, sampler)
            )
        if model in FLOWS:
            text = "FD over plain sampling with equal evaluations, under `euler` and `dpmpp_2m`, each method at one scale."
            section(f"{title}, by block, 1,000 pictures", text, block_table(results, choice, model))
    if gpus:
        section("Bundled UNet, evaluations a second", "With `euler`, in the fastest batch of a row.", speed_table(gpus))
    return "\n\n".join(parts) + "\n"


@click.command(help=__doc__)
@click.argument("folder", default=HERE, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", default=HERE.parent / "docs/quality.md", type=click.Path(path_type=Path), help="The page to write.")
def main(folder: Path, out: Path) -> None:
    gpus = folder / "quality_gpus.jsonl"
    out.write_text(page(*load(folder), gpus.read_text().splitlines() if gpus.exists() else ()))


if __name__ == "__main__":
    main()
