"""The GPU's figures in the documents are those that benchmarks/gpu.json holds."""

import json
import statistics
from pathlib import Path

import gpu

ROOT = Path(__file__).parents[1]
RUN = json.loads((ROOT / "benchmarks/gpu.json").read_text())


def test_the_page_has_the_times_and_the_memory_of_the_run():
    page = (ROOT / "docs/gpu.md").read_text()
    assert gpu.steps_table(RUN["steps"]) in page and gpu.memory_table(RUN["memory"]) in page


def test_the_readme_has_the_medians_of_the_run():
    readme = (ROOT / "README.md").read_text()
    assert [(r["model"], r["side"], r["batch"]) for r in RUN["steps"]] == gpu.TIMED
    for result in RUN["steps"]:
        times = result["times"]
        columns = gpu.CFG, gpu.PIPELINE, gpu.EAGER, gpu.COMPILE, gpu.GRAPHED
        medians = (f"{statistics.median(times[name]) * 1e3:.1f} ms" if name in times else "" for name in columns)
        over_floor = gpu.ratio(times, gpu.GRAPHED, gpu.FLOOR_GRAPHED).split()[0]
        row = "|".join(f" {cell} " if cell else " " for cell in (gpu.case(result), *medians, over_floor))
        assert f"\n|{row}|\n" in readme
