"""Which rows the quality benchmark measures: the settings that `choose` tries, and the tables of `report` and `grid`.

`choose` tries the same number of settings for each method, on seeds that `report` does not use: first those that are written here
(three on the UNet, every block of a transformer), then, as far as the number allows, the best of them stronger, weaker, and at
other noise levels. If even the best is worse than plain sampling, only weaker ones follow. SAG + PAG starts from the best of both.
The score of a setting is the mean over the samplers of log(FD / FD of plain sampling at the same number of evaluations).
"""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from quality_rows import FLOWS, SCHEDULE, TWO_CALLS, Directions, Row, frozen

from ksag.samplers import SAMPLERS

if TYPE_CHECKING:
    from quality import Bench

CHOICE_SEEDS, REPORT_SEEDS = 1, (2, 3, 4)
FEW = 2000
"""The pictures of a row of the report outside the main tables."""
MAIN = ("euler", "dpmpp_2m")
PLAIN_STEPS = (24, 36, 54)
"""Where `choose` measures plain sampling; it interpolates in between."""
FLOW_SCHEDULES = [{}, *({"sigma_min": low, "sigma_max": 160.0, "rho": 7.0} for low in (0.04, 0.12, 0.32)),
                  {"sigma_min": 0.04, "sigma_max": 40.0, "rho": 7.0}]  # fmt: skip
SCHEDULES: dict[str, list[dict[str, float]]] = {"emoji": [SCHEDULE], **dict.fromkeys(FLOWS, FLOW_SCHEDULES)}
RANGES = {"emoji": ((0.4, 12.0), (0.4, 6.0)), **dict.fromkeys(FLOWS, ((0.1, 12.0), (0.05, 40.0)))}
"""Each model's first sigma_range, and the other one."""
DOWN, UP, BOTH = "d_blocks.3.2", "u_blocks.1.1", ["d_blocks.3.2", "d_blocks.3.4"]
THREE = [*BOTH, "u_blocks.0.1"]
BLOCKS = [f"transformer_blocks.{i}" for i in range(8)]
STARTS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "emoji": {
        "SAG": [{"attention": layer, "scale": scale, "blur_sigma": 1.5} for layer, scale in ((UP, 1.4), (DOWN, 1.0), (DOWN, 1.6))],
        "SAG, one pass": [{"attention": layer, "scale": scale, "blur_sigma": 1.5, "one_pass": True}
                          for layer, scale in ((UP, 1.96), (DOWN, 1.4), (UP, 1.4))],
        "PAG": [{"attention": layers, "scale": scale} for layers, scale in ((BOTH, 1.0), (UP, 1.0), (THREE, 0.7))],
        "SEG": [{"attention": layers, "scale": scale} for layers, scale in ((BOTH, 2.5), (UP, 2.0), (THREE, 2.0))],
        "skipping": [{"blocks": layers, "scale": scale} for layers, scale in ((BOTH, 1.0), (UP, 1.0), (THREE, 0.7))],
    },
    **{model: {
        "SAG": [{"attention": f"{block}.attn", "scale": 1.0, "blur_sigma": 2.0} for block in BLOCKS],
        "SAG, one pass": [{"attention": f"{block}.attn", "scale": 1.4, "blur_sigma": 2.0, "one_pass": True} for block in BLOCKS],
        "PAG": [{"attention": f"{block}.attn", "scale": 0.3} for block in BLOCKS],
        "SEG": [{"attention": f"{block}.attn", "scale": 0.3} for block in BLOCKS],
        "skipping": [{"blocks": block, "scale": 0.3} for block in BLOCKS],
    } for model in FLOWS},
}  # fmt: skip
TRIES = {"emoji": 4, **dict.fromkeys(FLOWS, 12)}
"""Settings to try for each method."""
TOGETHER = "SAG + PAG"
KINDS = {"SAG": "SAG", "SAG, one pass": "SAG", "PAG": "PAG", "SEG": "SEG", "skipping": "SkipBlock"}
METHODS = (*KINDS, TOGETHER)
ALONG = ("SAG", "SAG, one pass", "PAG", TOGETHER)
SAMPLED = (*MAIN, "dpmpp_2m_sde")
ALONG_STEPS = (8, 12, 16, 24, 32, 48, 64)
"""The methods, besides each model's best, and the samplers that are measured at these steps."""
OTHERS = {s: 16 if s in TWO_CALLS else 32 if s.endswith(("sde", "ancestral")) else 24 for s in SAMPLERS if s not in MAIN}
"""The steps of the other samplers, with which they evaluate the model about as often, or more often where they add noise."""
GRID_STEPS = (24, 12, 48)
COND_SCALES = (1.5, 3.0)
Choice = dict[str, Any]


def load_choice(folder: Path) -> Choice:
    """What `choose` wrote for each model: its schedule, and each method's directions and score."""
    path = folder / "quality_choice.json"
    return json.loads(path.read_text()) if path.exists() else {}


# The choice


def changed(directions: Directions, scale: float = 1.0, **settings: Any) -> Directions:
    """All directions with scales multiplied, and further settings.

    >>> changed((("PAG", (("scale", 1.0),)),), 0.5, every=2)
    (('PAG', (('every', 2), ('scale', 0.5))),)
    """
    return tuple((name, frozen({**dict(s), "scale": round(dict(s)["scale"] * scale, 3), **settings})) for name, s in directions)


def starts(model: str, method: str, best: dict[str, Directions]) -> list[Directions]:
    """The first settings to try."""
    if method != TOGETHER:
        return [((KINDS[method], frozen({**s, "sigma_range": RANGES[model][0]})),) for s in STARTS[model][method]]
    sag, pag = best["SAG"], best["PAG"]
    return [changed(sag, a) + changed(pag, b) for a, b in ((0.7, 0.7), (0.5, 1.0), (1.0, 0.5))]


def moves(model: str, scores: Mapping[Directions, float], best: Directions, first: bool) -> list[Directions]:
    """What to try after the first settings: two other strengths of the best, weaker ones if even that is worse than plain sampling.
    After those, one by one: other noise levels, then other strengths.
    """
    weaker = scores[best] > 0
    new = [changed(best, factor) for factor in ((0.5, 0.25, 0.125) if weaker else (1.4, 0.7, 2.0, 0.5))]
    if not first and not weaker:
        new = [changed(best, sigma_range=RANGES[model][1]), *new]
    return [one for one in new if one not in scores][: 2 if first else 1]


def plain_at(evaluations: float, plain: dict[float, float]) -> float:
    """The FD of plain sampling at this number of evaluations, interpolated linearly in the logarithms of both.

    >>> round(plain_at(20.0, {10.0: 4.0, 40.0: 1.0}), 6)
    2.0
    """
    known = sorted(plain)
    return math.exp(np.interp(math.log(evaluations), np.log(known), np.log([plain[e] for e in known])))


def choose(bench: "Bench", models: Sequence[str], n: int, tries: int | None = None) -> Choice:
    """Tries settings, and writes the best of each method to quality_choice.json after every round."""
    choice = load_choice(bench.out)
    base: dict[str, Any] = {"n": n, "seeds": CHOICE_SEEDS}

    # Plain sampling at its own best schedule
    options = {(model, i): [Row(model, sampler, 24, frozen(schedule), **base) for sampler in MAIN]
               for model in models for i, schedule in enumerate(SCHEDULES[model])}  # fmt: skip
    found = bench.run([row for rows in options.values() for row in rows])
    for model in models:
        mine = {i: rows for (m, i), rows in options.items() if m == model}
        fds = {i: statistics.geometric_mean([bench.fd(found[row]) for row in rows]) for i, rows in mine.items()}
        choice[model] = {"schedule": SCHEDULES[model][min(fds, key=fds.__getitem__)], "methods": {}}
        bench.log(f"{model}: {[(SCHEDULES[model][i], round(fd, 3)) for i, fd in fds.items()]}")

    def row(model: str, sampler: str, directions: Directions = (), steps: int = 24) -> Row:
        return Row(model, sampler, steps, frozen(choice[model]["schedule"]), directions, **base)

    plain = bench.run([row(model, sampler, steps=steps) for model in models for steps in PLAIN_STEPS for sampler in MAIN])
    curves: dict[tuple[str, str], dict[float, float]] = {(model, sampler): {} for model in models for sampler in MAIN}
    for one, result in plain.items():
        curves[one.model, one.sampler][result["evaluations"]] = bench.fd(result)

    def score(model: str, directions: Directions) -> float:
        logs = []
        for sampler in MAIN:
            result = found[row(model, sampler, directions)]
            logs.append(math.log(bench.fd(result) / plain_at(result["evaluations"], curves[model, sampler])))
        return statistics.mean(logs)

    tried: dict[tuple[str, str], dict[Directions, float]] = {(model, method): {} for method in METHODS for model in models}
    best: dict[str, dict[str, Directions]] = {model: {} for model in models}
    for methods in (METHODS[:-1], METHODS[-1:]):
        while True:
            now = {}
            for model, method in ((model, method) for method in methods for model in models):
                before = tried[model, method]
                first = starts(model, method, best[model])
                new = moves(model, before, best[model][method], len(before) == len(first)) if before else first
                if new := new[: (tries or TRIES[model]) - len(before)]:
                    now[model, method] = new
            if not now:
                break
            rows = [row(model, s, one) for (model, _), new in now.items() for one in new for s in MAIN]
            found |= bench.run(rows)
            for (model, method), new in now.items():
                scores = tried[model, method]
                scores |= {directions: score(model, directions) for directions in new}
                best[model][method] = taken = min(scores, key=scores.__getitem__)
                choice[model]["methods"][method] = {"directions": taken, "score": round(scores[taken], 4), "tried": len(scores)}
                bench.log(f"{model}, {method}: {scores[taken]:.3f} of {[round(s, 3) for s in scores.values()]}: {taken}")
            save_choice(bench, choice)
    return choice


def save_choice(bench: "Bench", choice: Choice) -> None:
    if bench.rank == 0:
        (bench.out / "quality_choice.json").write_text(json.dumps(choice, indent=1) + "\n")


# The report


def recommended(of_model: Choice) -> Directions:
    """The directions of the best method."""
    methods = of_model["methods"].values()
    return frozen(min(methods, key=lambda method: method["score"])["directions"])


def with_plain(rows: Sequence[Row]) -> list[Row]:
    """Each row after plain sampling at the same steps, and at the same number of evaluations."""
    return [each for row in rows for each in (row.plain, *([] if row.sampler == "dpm_adaptive" else [row.equal]), row)]


def methods_of(of_model: Choice) -> dict[str, Directions]:
    """The chosen directions of each method, and SAG at every second call."""
    found = {name: frozen(method["directions"]) for name, method in of_model["methods"].items()}
    return found | ({"SAG, every 2": changed(found["SAG"], every=2)} if "SAG" in found else {})


def report_rows(choice: Choice) -> list[Row]:
    """All rows of the tables, the most important first."""
    parts: list[list[Row]] = []
    n, first = {"emoji": 5000, **dict.fromkeys(FLOWS, 3000)}, REPORT_SEEDS[0]

    def row(model: str, sampler: str, steps: int, directions: Directions = (), **other: Any) -> Row:
        schedule = frozen(choice[model]["schedule"])
        return Row(model, sampler, steps, schedule, directions, **{"seeds": first, "n": FEW, **other})

    def main(model: str, seeds: int) -> list[Row]:
        ways = [way for way in methods_of(choice[model]).values()]
        return with_plain([row(model, s, 24, way, seeds=seeds, n=n[model]) for s in MAIN for way in ways])

    def along(model: str, samplers: Sequence[str], most: Sequence[int]) -> list[Row]:
        ways = methods_of(choice[model])
        shown = [(), *(ways[name] for name in ALONG if name in ways), recommended(choice[model])]
        steps = {way: most if way else ALONG_STEPS for way in shown}
        return [row(model, sampler, k, way) for sampler in samplers for way in shown for k in steps[way]]

    def others(model: str) -> list[Row]:
        best = recommended(choice[model])
        return with_plain([row(model, sampler, k, best) for sampler, k in OTHERS.items()])

    def with_cfg(model: str) -> list[Row]:
        ways = methods_of(choice[model])
        best = recommended(choice[model])
        guided = [best, changed(best, 0.5), *(ways[name] for name in ("SAG", "PAG") if name in ways)]
        rows = [row(model, s, 24, way, cond_scale=scale) for scale in COND_SCALES for s in MAIN[::-1] for way in ((), *guided)]
        return rows + [row(model, s, 24, cond_scale=scale) for scale in (1.0, 2.0) for s in MAIN[::-1]]

    parts += [main(model, first) for model in choice]
    parts += [along(model, MAIN, ALONG_STEPS[:5]) for model in choice]
    parts += [main(model, REPORT_SEEDS[1]) for model in choice]
    parts += [others(model) + with_cfg(model) for model in choice]
    parts += [along(model, SAMPLED[2:], ALONG_STEPS[:5]) for model in choice]
    parts += [main(model, REPORT_SEEDS[2]) for model in choice]
    parts += [along(model, SAMPLED, ALONG_STEPS[5:]) for model in choice]
    return list(dict.fromkeys(row for part in parts for row in part))


def grid_rows(choice: Choice) -> list[Row]:
    """Every method with every sampler, and with the main samplers under classifier-free guidance, by number of steps."""
    rows: list[Row] = []
    for steps, model in itertools.product(GRID_STEPS, choice):
        samplers = [s for s in SAMPLERS if s != "dpm_adaptive" or steps == GRID_STEPS[0]]  # its steps follow from the model
        places = [*((s, None) for s in samplers), *((s, scale) for scale in COND_SCALES for s in MAIN)]
        schedule, first = frozen(choice[model]["schedule"]), REPORT_SEEDS[0]
        ways = methods_of(choice[model]).values()
        rows += with_plain([Row(model, s, steps, schedule, way, scale, first, FEW) for s, scale in places for way in ways])
    return list(dict.fromkeys(rows))


ROWS = {"report": report_rows, "grid": grid_rows}
