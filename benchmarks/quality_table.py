"""What did `benchmarks/quality.py` find?  `python benchmarks/quality_table.py > docs/quality.md`

Markdown of the raw rows in a folder's quality.jsonl, for the settings in its quality_choice.json first. Only rows of the report's
seeds show what SAG does; those of the choice's seeds show how it was chosen.
"""

import dataclasses
import json
import math
import re
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from quality import CHOICE_SEEDS, REPORT_SEEDS, STEPS, Row, frozen, gain_kept, load_results

from ksag.samplers import SAMPLERS

Result = dict[str, Any]
Results = dict[Row, Result]
MAIN = ("euler", "dpmpp_2m")
FORMS = ("one_pass", "every")
SMALL_GAIN = 0.03


class Pair(NamedTuple):
    """Plain and SAG of the same noise."""

    plain: Result
    sag: Result


class Group(NamedTuple):
    """What rows have in common that stand in one table."""

    settings: tuple[tuple[str, Any], ...]
    schedule: tuple[tuple[str, float], ...]


def group_of(row: Row) -> Group:
    return Group(frozen({name: value for name, value in row.settings.items() if name not in FORMS}), row.schedule)


def form_of(row: Row) -> dict[str, Any]:
    return {name: row.settings[name] for name in FORMS if name in row.settings}


def differing(row: Row, group: Group) -> dict[str, Any]:
    """What a row sets otherwise than the group."""
    return {name: value for name, value in row.settings.items() if (name, value) not in group.settings}


def with_strength(group: Group, sag_scale: float) -> Group:
    return Group(frozen({**dict(group.settings), "sag_scale": sag_scale}), group.schedule)


# --- Numbers ---


def of_judge(number: int, name: str) -> Callable[[Result], float]:
    """A measure by the first judge, which is the bundled classifier, or by the second; NaN where there is no second."""

    def measure(result: Result) -> float:
        judges = list(result["measures"].values())
        return judges[number][name] if number < len(judges) else math.nan

    return measure


FD, SECOND_FD, KID = of_judge(0, "fd"), of_judge(1, "fd"), of_judge(0, "kid")
PRECISION, RECALL = of_judge(0, "precision"), of_judge(0, "recall")


def evaluations(result: Result) -> float:
    return result["evaluations"]


def seconds(result: Result) -> float:
    """Of a batch; the first one of a row may include compiling."""
    return statistics.median(result["seconds"][1:] or result["seconds"])


def ratios(pairs: Sequence[Pair], measure: Callable[[Result], float]) -> list[float]:
    return [measure(pair.sag) / measure(pair.plain) for pair in pairs]


def mean(pairs: Sequence[Pair], measure: Callable[[Result], float]) -> tuple[float, float]:
    """Of plain and of SAG."""
    return statistics.mean(measure(pair.plain) for pair in pairs), statistics.mean(measure(pair.sag) for pair in pairs)


def spread(values: Sequence[float], form: str) -> str:
    """Their mean, and their standard deviation where they differ; nothing where one is NaN.

    >>> spread([1.0, 2.0, 3.0], ".1f"), spread([1.0, 1.0], ".1f"), spread([1.0], ".1f"), spread([math.nan], ".1f")
    ('2.0 ± 1.0', '1.0', '1.0', '')
    """
    if any(map(math.isnan, values)):
        return ""
    text = format(statistics.mean(values), form)
    return text if len(set(values)) == 1 else f"{text} ± {format(statistics.stdev(values), form)}"


# --- Rows ---


def lines(results: Results, rows: Iterable[Row]) -> dict[Row, list[Pair]]:
    """Pairs of one line: those that differ in their seeds alone. The line's row has none, 0."""
    found = defaultdict(list)
    for row in rows:
        if row.plain in results:
            found[dataclasses.replace(row, seeds=0)].append(Pair(results[row.plain], results[row]))
    return dict(found)


def exact(found: dict[Row, list[Pair]], **wanted: Any) -> dict[Row, list[Pair]]:
    """The lines of exact SAG, unconditional if nothing else is wanted."""
    wanted = {"cond_scale": (None,), **wanted}
    return {
        row: pairs for row, pairs in found.items()
        if not form_of(row) and all(getattr(row, name) in values for name, values in wanted.items())
    }  # fmt: skip


def usual(found: dict[Row, list[Pair]], samplers: Sequence[str]) -> dict[Row, list[Pair]]:
    """In the order of the samplers, at each one's usual number of steps."""
    there = {row.sampler: (row, pairs) for row, pairs in exact(found).items() if row.steps == STEPS[row.sampler]}
    return dict(there[sampler] for sampler in samplers if sampler in there)


def in_order(row: Row) -> tuple[Any, ...]:
    return row.cond_scale or 0, list(STEPS).index(row.sampler), -row.steps


def ordered(found: dict[Row, list[Pair]]) -> dict[Row, list[Pair]]:
    return dict(sorted(found.items(), key=lambda line: (MAIN.index(line[0].sampler), line[0].cond_scale or 0, line[0].steps)))


# --- Tables ---


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Columns in which nothing stands are left out; a cell does not break at ±, →, / and %.

    >>> print(table(["", "a", "b"], [["x", "1", ""], ["y", "", ""]]))
    |  | a |
    | --- | --- |
    | x | 1 |
    | y |  |
    """
    rows = [head, ["---"] * len(head), *body]
    filled = [0, *(i for i in range(1, len(head)) if any(row[i] for row in rows[2:]))]
    text = "\n".join("| " + " | ".join(row[i] for i in filled) + " |" for row in rows)
    return re.sub(" ([±→/]) ", "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", text).replace(" %", "\N{NO-BREAK SPACE}%")


def bold(text: str) -> str:
    return f"**{text}**" if text else ""


def spread_table(found: dict[Row, list[Pair]]) -> str:
    """Three rows for each line: plain, SAG, and their ratio."""
    columns = {
        "FD": (FD, ".2f"), "FD, second judge": (SECOND_FD, ".2f"), "KID × 1000": (lambda r: 1000 * KID(r), ".1f"),
        "precision": (PRECISION, ".3f"), "recall": (RECALL, ".3f"), "evaluations": (evaluations, ".0f"),
        "seconds a batch": (seconds, ".2f"),
    }  # fmt: skip
    body = []
    for row, pairs in found.items():
        for name, side in (("plain", 0), ("SAG", 1)):
            cells = [spread([measure(pair[side]) for pair in pairs], form) for measure, form in columns.values()]
            body.append([f"{row.sampler}, {row.steps} steps, {name}", *cells])
        body.append(["**SAG over plain**", *(bold(spread(ratios(pairs, measure), ".3f")) for measure, _ in columns.values())])
    return table(["", *columns], body)


def pairs_table(found: dict[Row, list[Pair]], name: Callable[[Row], str]) -> str:
    """One row for each line."""
    head = ["", "FD, plain", "FD, SAG", "ratio", "ratio, second judge", "KID × 1000", "precision", "recall", "evaluations", "time"]
    body = []
    for row, pairs in found.items():
        kid, precision, recall, calls = (mean(pairs, measure) for measure in (KID, PRECISION, RECALL, evaluations))
        times = ratios([pair for pair in pairs if pair.plain["device"] == pair.sag["device"]], seconds)
        body.append([
            name(row), *(f"{value:.2f}" for value in mean(pairs, FD)), bold(spread(ratios(pairs, FD), ".3f")),
            spread(ratios(pairs, SECOND_FD), ".3f"), f"{1000 * kid[0]:.1f} → {1000 * kid[1]:.1f}",
            f"{precision[0]:.3f} → {precision[1]:.3f}", f"{recall[0]:.3f} → {recall[1]:.3f}", f"{calls[0]:.0f} → {calls[1]:.0f}",
            f"× {statistics.mean(times):.2f}" if times else "",
        ])  # fmt: skip
    return table(head, body)


def kept(exact_pair: Pair, form: Result, measure: Callable[[Result], float]) -> str:
    """How much of exact SAG's gain another form has, in %."""
    plain, exact_sag, cheaper = (measure(result) for result in (*exact_pair, form))
    if math.isnan(plain):
        return ""
    if plain - exact_sag < SMALL_GAIN * plain:
        return "—"
    return f"{100 * gain_kept(plain, exact_sag, cheaper):.0f}".replace("-", "−")


def kept_cell(exact_pair: Pair, form: Result) -> str:
    """The gain that is kept, by the one judge and by the other, and the evaluations over plain's."""
    shares = filter(None, (kept(exact_pair, form, measure) for measure in (FD, SECOND_FD)))
    return f"{' / '.join(shares)} % ({evaluations(form) / evaluations(exact_pair.plain):.2f})"


def forms_table(results: Results, group: Group, rows: Sequence[Row]) -> str:
    """How much of the gain of a group's exact rows its cheaper ones keep; of one set of seeds."""
    forms = sorted({frozen(differing(row, group)) for row in rows}, key=lambda form: (len(form), form))
    exact_rows = {dataclasses.replace(row, sag=group.settings) for row in rows}
    body = []
    for row in sorted(exact_rows, key=in_order):
        if row not in results or row.plain not in results:
            continue
        pair = Pair(results[row.plain], results[row])
        cheaper = [results.get(dataclasses.replace(row, sag=frozen({**row.settings, **dict(form)}))) for form in forms]
        cells = ["" if result is None else kept_cell(pair, result) for result in cheaper]
        body.append([case(row), f"{FD(pair.plain):.2f} → {FD(pair.sag):.2f}", *cells])
    return table(["", "FD, plain → exact SAG", *(settings_name(dict(form)) for form in forms)], body) if body else ""


def strengths_table(results: Results, rows: Sequence[Row]) -> str:
    """The Fréchet distance over plain's, at each strength."""
    scales = sorted({row.settings["sag_scale"] for row in rows})
    cases: dict[str, dict[float, Row]] = defaultdict(dict)
    for row in sorted(rows, key=in_order):
        cases[case(row)][row.settings["sag_scale"]] = row
    body = []
    for name, there in cases.items():
        body.append([name, *(f"{ratio(results, there[scale], FD):.3f}" if scale in there else "" for scale in scales)])
    return table(["`sag_scale`", *(f"{scale:g}" for scale in scales)], body)


def layers_table(results: Results, rows: Sequence[Row]) -> str:
    """The Fréchet distance over plain's, at the strengths that all layers were tried at."""
    by_scale: dict[float, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_scale[row.settings["sag_scale"]][row.settings["attention"]] = row
    layers = sorted({row.settings["attention"] for row in rows})
    scales = [scale for scale in sorted(by_scale) if len(by_scale[scale]) == len(layers)]
    body = [[f"`{layer}`", *(f"{ratio(results, by_scale[scale][layer], FD):.3f}" for scale in scales)] for layer in layers]
    return table(["layer", *(f"`sag_scale={scale:g}`" for scale in scales)], body)


def ratio(results: Results, row: Row, measure: Callable[[Result], float]) -> float:
    return measure(results[row]) / measure(results[row.plain])


# --- Text ---


def steps(row: Row) -> str:
    return "dpm_adaptive, its own steps" if row.sampler == "dpm_adaptive" else f"{row.sampler}, {row.steps} steps"


def condition(row: Row) -> str:
    return "unconditional" if row.cond_scale is None else f"by category, `cond_scale={row.cond_scale:g}`"


def case(row: Row) -> str:
    return f"{steps(row)}, {condition(row)}"


def settings_name(settings: dict[str, Any]) -> str:
    """As keywords, the form first.

    >>> settings_name({"every": 2, "sag_scale": 2.0, "one_pass": True})
    '`one_pass=True, every=2, sag_scale=2`'
    """
    form = {name: settings[name] for name in FORMS if name in settings}
    return f"`{', '.join(f'{name}={written(value)}' for name, value in (form | settings).items())}`"


def written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, tuple):
        return f"({', '.join(f'{part:g}' for part in value)})"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}"


def scheduled(group: Group) -> str:
    schedule = dict(group.schedule)
    return f"{schedule['sigma_min']:g} to {schedule['sigma_max']:g}, rho {schedule['rho']:g}"


def described(group: Group) -> str:
    settings = ", ".join(f"{name}={written(value)}" for name, value in group.settings)
    return f"`{settings}`; Karras's schedule, sigma {scheduled(group)}"


def title(group: Group, chosen: Group) -> str:
    """What a group sets otherwise than the chosen one."""
    if group.schedule != chosen.schedule:
        return f"At sigma {scheduled(group)}"
    return f"At {', '.join(f'{name} {written(value)}' for name, value in group.settings if (name, value) not in chosen.settings)}"


def origin(results: Results, rows: Sequence[Row]) -> str:
    """How many samples these rows are of, and where they were made."""

    def listed(values: Iterable[Any]) -> str:
        return ", ".join(map(str, sorted(set(values))))

    return (
        f"{listed(row.n for row in rows)} samples a row in batches of {listed(results[row]['batch'] for row in rows)}, "
        f"seeds {listed(row.seeds for row in rows)}; {listed(results[row]['device'] for row in rows)}"
    )


def group_tables(results: Results, group: Group, also: Sequence[Group] = ()) -> list[str]:
    """Tables of a group's rows; `also` are its settings at other strengths, in one pass and beside CFG."""
    reported = [row for row in results if row.sag is not None and row.seeds in REPORT_SEEDS and row.dtype == "float16"]
    rows = [row for row in reported if group_of(row) == group]
    beside = [row for row in reported if group_of(row) in also and row.cond_scale is not None and not form_of(row)]
    late = [row for row in reported if group_of(row) in also and "one_pass" in form_of(row)]
    cheaper = [*filter(form_of, rows), *late]
    found = lines(results, sorted([*rows, *beside], key=lambda row: row.seeds))
    main, every = usual(found, MAIN), usual(found, SAMPLERS)
    categories = ordered(exact(found, cond_scale=(1.0, 1.5, 3.0)))
    along = ordered(exact(found, sampler=MAIN))

    def beside_cfg(row: Row) -> str:
        strength = differing(row, group)
        return f"{row.sampler}, {condition(row)}{f', {settings_name(strength)}' if strength else ''}"

    parts = {
        "Unconditional, mean ± standard deviation over the sets of seeds": spread_table(main) if main else "",
        "Each sampler at a usual number of steps": pairs_table(every, steps) if len(every) > len(main) else "",
        "By category, and with CFG": pairs_table(categories, beside_cfg) if categories else "",
        "Along steps": pairs_table(along, steps) if len(along) > len(main) else "",
        f"Cheaper forms: FD gain kept in % of exact SAG's, by the first and the second judge (evaluations over plain's); "
        f"— where exact SAG gains less than {SMALL_GAIN:.0%}": forms_table(results, group, cheaper),
    }  # fmt: skip
    missing = [name.partition(",")[0].partition(":")[0].lower() for name, text in parts.items() if not text]
    head = f"{described(group)}. {origin(results, rows)}."
    if missing:
        head += f" Not measured yet at these settings: {', '.join(missing)}."
    shown = [f"{name}:\n\n{text}" for name, text in parts.items() if text]
    if cheaper:
        forms = lines(results, sorted(cheaper, key=in_order))
        in_full = pairs_table(forms, lambda row: f"{case(row)}, {settings_name(differing(row, group))}")
        shown.append(folded("The cheaper forms in full", [in_full]))
    return [head, *shown]


def choice_section(results: Results, rows: Sequence[Row], chosen: Group) -> str:

    def but_strength(row: Row) -> dict[str, Any]:
        return {name: value for name, value in row.settings.items() if name != "sag_scale"}

    wanted = {name: value for name, value in chosen.settings if name != "sag_scale"}
    strengths = [row for row in rows if but_strength(row) == wanted]
    late = [row for row in rows if but_strength(row) == {**wanted, "one_pass": True}]
    layers = [row for row in rows if row.sampler == "euler" and row.cond_scale is None
              and but_strength(row) == {"attention": row.settings["attention"], "blur_sigma": 2.0}]  # fmt: skip
    best = []
    for sampler in MAIN:
        usual_rows = [row for row in rows if row.sampler == sampler and row.steps == STEPS[sampler] and row.cond_scale is None]
        tried = [row for row in usual_rows if not form_of(row)]
        if not tried:
            continue
        row = min(tried, key=lambda row: ratio(results, row, FD))
        settings = ", ".join(f"{name}={written(value)}" for name, value in row.settings.items())
        best.append(f"{sampler} {ratio(results, row, FD):.3f}, the lowest of {len(tried)} settings tried (`{settings}`)")
    return "\n\n".join([
        "### How the settings were chosen",
        f"FD over plain's. {origin(results, rows)}. What is lowest here is so by luck too: the tables above are of other seeds.",
        f"Lowest: {'; '.join(best)}.",
        f"Layers (euler, `blur_sigma=2`):\n\n{layers_table(results, layers)}",
        f"Strength, all other settings as chosen:\n\n{strengths_table(results, strengths)}",
        *([f"Strength in one pass:\n\n{strengths_table(results, late)}"] if late else []),
    ])  # fmt: skip


def folded(title: str, parts: Sequence[str]) -> str:
    return f'??? note "{title}"\n\n' + textwrap.indent("\n\n".join(parts), "    ")


def report(results: Results, choice: dict[str, Any]) -> str:
    chosen = Group(frozen(choice["settings"]), frozen(choice["schedule"]))
    also = {with_strength(chosen, value) for name, value in choice.items() if name.startswith("sag_scale ")} - {chosen}
    exact_rows = [row for row in results if row.sag is not None and row.seeds in REPORT_SEEDS and not form_of(row)]
    groups = set(map(group_of, exact_rows))
    others = sorted(groups - {chosen, *also}, key=lambda group: (group.schedule != chosen.schedule, group))
    tried = [row for row in results if row.sag is not None and row.seeds == CHOICE_SEEDS and row.schedule == chosen.schedule]
    return "\n\n".join([
        "FD and KID by the bundled classifier, against the pictures that the model was trained on; the second judge is another "
        "classifier, trained apart from both. Evaluations are of the network, a sample. Time is that of a batch, the median of a "
        "row's batches but for its first, which may include compiling.",
        *(["### At the recommended settings", *group_tables(results, chosen, list(also))] if chosen in groups else []),
        *(folded(title(group, chosen), group_tables(results, group)) for group in others),
        *([choice_section(results, [row for row in tried if row.plain in results], chosen)] if tried else []),
    ]) + "\n"  # fmt: skip


def load(folder: Path) -> tuple[Results, dict[str, Any]]:
    results = {Row.of(result): result for result in load_results(folder / "quality.jsonl").values()}
    return results, json.loads((folder / "quality_choice.json").read_text())


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, path_type=Path), default=Path(__file__).parent)
def main(folder: Path) -> None:
    click.echo(report(*load(folder)), nl=False)


if __name__ == "__main__":
    main()
