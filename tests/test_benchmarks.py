"""The figures in the README and on the pages are those that benchmarks/gpu.json and benchmarks/quality.jsonl hold."""

import json
import statistics
from pathlib import Path

import comfyui
import gpu

ROOT = Path(__file__).parents[1]
RUN = json.loads((ROOT / "benchmarks/gpu.json").read_text())


def test_the_page_is_the_report_of_the_run():
    assert (ROOT / "docs/gpu.md").read_text() == gpu.report(RUN)


def test_the_readme_has_the_medians_of_the_run():
    readme = (ROOT / "README.md").read_text()
    assert [(r["model"], r["side"], r["batch"]) for r in RUN["steps"]] == gpu.TIMED
    for result in RUN["steps"]:
        times = result["times"]
        names = [
            *(gpu.key(form, gpu.EAGER) for form in (gpu.CFG, gpu.SAG, gpu.ONE)), gpu.PIPELINE,
            *(gpu.key(form, gpu.GRAPHED) for form in (gpu.CFG, gpu.SAG, gpu.ONE, gpu.THIRD)),
        ]  # fmt: skip
        medians = (f"{statistics.median(times[name]) * 1e3:.1f} ms" if name in times else "" for name in names)
        row = "|".join(f" {cell} " if cell else " " for cell in (gpu.case(result), *medians))
        assert f"\n|{row}|\n" in readme


BATCH_ONE = [r for r in RUN["steps"] if (r["model"], r["side"], r["batch"]) in (("SD 1.5", 64, 1), ("SDXL", 128, 1))]
NAMES = {gpu.SAG: "exact SAG", gpu.ONE: "one pass", gpu.THIRD: "one pass at every third call"}


def over_plain(times, form, mode):
    return statistics.median(a / b for a, b in zip(times[gpu.key(form, mode)], times[gpu.key(gpu.CFG, mode)], strict=True))


def test_the_readmes_table_of_costs_is_that_of_the_run():
    readme = (ROOT / "README.md").read_text()
    for result in BATCH_ONE:
        for form, name in NAMES.items():
            memory = result["peaks"][gpu.key(form, gpu.EAGER)] / result["peaks"][gpu.key(gpu.CFG, gpu.EAGER)]
            times = (f"{over_plain(result['times'], form, mode):.2f}" for mode in (gpu.EAGER, gpu.GRAPHED))
            assert f"\n| {result['model']}, batch 1: {name} | {' | '.join(times)} | {memory:.2f} |\n" in readme


def test_the_performance_pages_first_table_is_that_of_the_run():
    page = (ROOT / "docs/performance.md").read_text()
    for form, mode in (
        (gpu.SAG, gpu.EAGER),
        (gpu.ONE, gpu.EAGER),
        (gpu.SAG, gpu.GRAPHED),
        (gpu.ONE, gpu.GRAPHED),
        (gpu.THIRD, gpu.GRAPHED),
    ):
        ratios = " | ".join(f"{over_plain(result['times'], form, mode):.2f}" for result in BATCH_ONE)
        assert f"\n| {NAMES[form]}, {mode} | {ratios} |\n" in page


def test_the_performance_page_says_what_the_run_says():
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
    small = BATCH_ONE[0]
    times = small["times"]

    def over(name, other, times=times):
        return [a / b for a, b in zip(times[name], times[other], strict=True)]

    one_eager, one_graphed = (gpu.key(gpu.ONE, mode) for mode in (gpu.EAGER, gpu.GRAPHED))
    node = statistics.median(over(comfyui.SAG, comfyui.CFG))
    eager, graphed = (statistics.median(over(gpu.PIPELINE, name)) for name in (one_eager, one_graphed))
    assert f"ComfyUI's own node takes {node:.2f} times its plain step" in page
    assert f"{eager:.2f} times as long as one pass, eager, and {graphed:.2f} times as long as one pass with CUDA graphs" in page
    third, third_of_xl = (over_plain(result["times_in_a_run"], gpu.THIRD, gpu.GRAPHED) for result in BATCH_ONE)
    assert f"CUDA graphs, in `sample_euler` | {third:.2f} | {third_of_xl:.2f} |" in page
    assert f"in `sample_euler` it is {third:.2f}" in page
    parameters = (ROOT / "docs/parameters.md").read_text()
    for form, name in (
        (gpu.SAG, "exact"),
        (gpu.ONE, "`one_pass=True`"),
        (gpu.THIRD, "`one_pass=True, every=3`, 1.4 times as strong"),
    ):
        cost = over_plain(small["times_in_a_run"], form, gpu.GRAPHED)
        assert f"\n| {name} | {cost:.2f} | " in parameters
    (low, _, high), (bare_low, _, bare_high), (least, _, most) = (
        statistics.quantiles(ratios, n=4)
        for ratios in (
            over(one_eager, gpu.key(gpu.CFG, gpu.EAGER)), over(one_eager, gpu.key(gpu.FLOOR_ONE, gpu.EAGER)),
            over(gpu.PIPELINE, one_graphed),
        )
    )  # fmt: skip
    assert f"one pass over plain guidance are {low:.2f} to {high:.2f}, and over its floor {bare_low:.2f} to {bare_high:.2f}" in page
    assert f"over diffusers' pipeline the quartiles are {least:.1f} to {most:.1f}" in page
    bare = statistics.median(over(gpu.key(gpu.FLOOR_ONE, gpu.GRAPHED), gpu.key(gpu.CFG, gpu.GRAPHED)))
    assert f"the three steps' passes alone are {(2 + bare) / 3:.2f}" in page
    graphed = [
        over(gpu.key(form, gpu.GRAPHED), gpu.key(floor, gpu.GRAPHED), r["times"])
        for r in RUN["steps"] for form, floor in gpu.FLOORS.items()
    ]  # fmt: skip
    added = [100 * statistics.median(x) - 100 for x in graphed]
    assert f"ksag adds {min(added):.0f} to {max(added):.0f} % to its passes (CUDA graphs)" in page
    held = [r["peaks"][gpu.key(gpu.ONE, gpu.EAGER)] / r["peaks"][gpu.key(gpu.FLOOR_ONE, gpu.EAGER)] for r in RUN["steps"]]
    assert max(held) <= 1.004 and "within 1.004 of the bare pass of 3B" in page


def test_the_performance_page_says_what_compiling_gains():
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
    small = BATCH_ONE[0]
    times = small["times"]
    names = gpu.key(gpu.ONE, gpu.BOTH), gpu.key(gpu.CFG, gpu.BOTH)
    one, plain = (f"{statistics.median(times[name]) * 1e3:.1f} ms" for name in names)
    alone, in_a_run = (over_plain(small[kind], gpu.ONE, gpu.BOTH) for kind in ("times", "times_in_a_run"))
    assert f"takes {one} with CUDA graphs: {alone:.2f} of plain guidance's {plain} in the same mode" in page
    assert f"(in `sample_euler` {in_a_run:.2f})" in page
    pipeline = statistics.median(a / b for a, b in zip(times[gpu.PIPELINE], times[names[0]], strict=True))
    assert f"pipeline takes {pipeline:.2f} times as long." in page


def test_the_readmes_table_of_quality_is_that_of_the_rows():
    readme = (ROOT / "README.md").read_text()
    rows = [json.loads(line) for line in (ROOT / "benchmarks/quality.jsonl").read_text().splitlines()]
    chosen = json.loads((ROOT / "benchmarks/quality_choice.json").read_text())
    for sampler in ("euler", "dpmpp_2m"):
        for name, sag in (("plain", None), ("SAG", chosen["settings"])):
            found = [
                r for r in rows
                if (r["row"]["sampler"], r["row"]["steps"], r["row"]["n"], r["row"]["cond_scale"]) == (sampler, 24, 5000, None)
                and dict(r["row"]["schedule"]) == chosen["schedule"] and (dict(r["row"]["sag"]) if r["row"]["sag"] else None) == sag
            ]  # fmt: skip
            assert sorted(r["row"]["seeds"] for r in found) == [2, 3, 4]
            first = [next(iter(r["measures"].values())) for r in found]
            mean = {key: statistics.mean(m[key] for m in first) for key in first[0]}
            fd = f"{mean['fd']:.2f} ± {statistics.stdev(m['fd'] for m in first):.2f}"
            shown = f"**{fd}**" if sag else fd
            cells = [
                f"`{sampler}`, {name}",
                shown,
                f"{1000 * mean['kid']:.1f}",
                f"{mean['precision']:.3f}",
                f"{mean['recall']:.3f}",
            ]
            evaluations = f"{found[0]['evaluations']:g}"
            assert f"| {' | '.join([*cells, evaluations])} |" in readme
