"""The GPU's figures in the documents are those that benchmarks/gpu.json holds."""

import json
import statistics
from pathlib import Path

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
