"""The evidence: the benchmark resumes and follows its own rules, and the bundled classifier is intact."""

import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import click
import emoji_flow
import pytest
import quality
import quality_plan
import quality_plot
import quality_table
import torch
from click.core import ParameterSource
from click.testing import CliRunner
from PIL import Image
from quality_rows import SPEED, Row, append_result, frozen, load_results
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from ksag import evaluate, zoo
from ksag.evaluate import features
from tests.commands import invoke, save_small_model
from tests.emoji_packages import ROOT, make_data
from tests.small_flow import CONFIG, small_flow

PAGE = (ROOT / "docs/evaluate.md").read_text()
SAG = ("SAG", frozen({"attention": "d_blocks.3.2", "scale": 1.0}))
PAG = ("PAG", frozen({"attention": ["d_blocks.3.2", "d_blocks.3.4"], "scale": 1.0, "sigma_range": (0.4, 40.0)}))
SHORT = Row(steps=3, n=4)


# The benchmark


@pytest.fixture
def bench(tmp_path):
    ((judge, reference),), shares = quality.load_judges([features.CLASSIFIER.parent], torch.device("cpu"))
    judges = [(judge, dataclasses.replace(reference, features=reference.features[:200]))]  # all only take longer
    return quality.Bench(tmp_path, torch.device("cpu"), judges, shares, batch=4)


def guided(*directions, **row):
    return dataclasses.replace(SHORT, directions=directions, **row)


def test_a_row_survives_its_file(tmp_path):
    row = guided(SAG, PAG, cond_scale=1.5, schedule=())
    append_result(tmp_path / "quality.jsonl", {"row": json.loads(row.key)})
    (found,) = load_results(tmp_path / "quality.jsonl").values()
    assert Row.of(found) == row and Row.of(found).key == row.key


@pytest.mark.parametrize(
    "row",
    [
        SHORT,
        guided(SAG, cond_scale=1.5),
        pytest.param(guided(PAG, sampler="heun"), marks=pytest.mark.slow),
        guided((SAG[0], frozen({**dict(SAG[1]), "one_pass": True})), PAG),
        pytest.param(guided((PAG[0], frozen({**dict(PAG[1]), "every": 2})), steps=4), marks=pytest.mark.slow),
    ],
    ids=["plain", "CFG", "heun", "one pass", "every 2"],
)
def test_evaluations_are_counted_as_expected(bench, row):
    x, seconds, evaluations = bench.sample(dataclasses.replace(row, n=2))
    about = 0.5 if row.sampler == "heun" else 0  # half of its calls are at the next sigma
    assert abs(evaluations - row.evaluations) <= about and len(seconds) == 1 and x.isfinite().all()
    assert row.equal.evaluations == pytest.approx(row.evaluations, abs=1)


@pytest.mark.slow
def test_the_network_in_pieces_samples_the_same(bench):
    row = guided(SAG, PAG, n=2, steps=2)
    whole, *_ = bench.sample(row)
    plain, *_ = bench.sample(row.plain)
    bench.models["emoji"].piece = 3
    pieces, _, evaluations = bench.sample(row)
    assert evaluations == row.evaluations
    torch.testing.assert_close(pieces, whole, atol=1e-3, rtol=1e-3)
    assert (plain - whole).abs().max() > 0.1


def compiled_with(bench, row, monkeypatch):
    """The paths of the modules that are compiled for a row, whose samples must not change; nothing is compiled in fact."""
    expected, *_ = bench.sample(row)
    modules, called = [], set()

    def compile(forward, dynamic):
        def call(*args, **kwargs):
            called.add(forward.__self__)
            return forward(*args, **kwargs)

        modules.append(forward.__self__)
        return call

    monkeypatch.setattr(torch, "compile", compile)
    bench.compiled = True
    found, *_ = bench.sample(row)
    assert torch.equal(found, expected) and called
    network = bench.models[row.model].network
    assert not any("forward" in vars(module) for path, module in network.named_modules() if path)  # as it was
    paths = {module: path for path, module in network.named_modules()}
    return {paths[module] for module in modules}


def test_a_layer_that_is_not_there_is_an_error(bench):
    bench.compiled = True
    with pytest.raises(ValueError, match=r"one module for each of \['middle'\], got \[\]"):
        bench.sample(guided(("PAG", (("scale", 1.0),)), n=2, steps=2))


def test_only_blocks_without_hooks_are_compiled(bench, monkeypatch):
    compiled = compiled_with(bench, guided(SAG, n=2, steps=2), monkeypatch)
    assert {"u_net.d_blocks.2", "u_net.d_blocks.3.1", "u_net.d_blocks.3.4"} <= compiled
    assert not {"u_net.d_blocks.3", "u_net.d_blocks.3.2", "u_net.d_blocks.2.1"} & compiled


def test_the_norms_inside_a_layer_with_hooks_are_compiled(bench, monkeypatch):
    emoji_flow.save(small_flow(augmented=False).state_dict(), bench.out / "emoji_flow", CONFIG, {})
    bench.flows = bench.out
    pag = ("PAG", frozen({"attention": "transformer_blocks.1.attn", "scale": 0.3}))
    compiled = compiled_with(bench, guided(pag, model="emoji-flow", schedule=(), n=2, steps=2), monkeypatch)
    assert {"transformer.transformer_blocks.0", "transformer.transformer_blocks.1.attn.norm_q"} <= compiled
    assert not {"transformer.transformer_blocks.1", "transformer.transformer_blocks.1.attn"} & compiled


@pytest.mark.slow
def test_the_benchmark_goes_on_where_it_was_killed(bench, monkeypatch):
    first = bench.run([SHORT])[SHORT]
    path = bench.out / "quality.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])  # killed while it wrote the next row
    measured, measure = [], bench.measure
    monkeypatch.setattr(bench, "measure", lambda row, sizes: measured.append(row) or measure(row, sizes))
    results = bench.run([SHORT, guided(PAG)])
    assert measured == [guided(PAG)] and results[SHORT] == first
    assert [Row.of(result) for result in load_results(path).values()] == [*results]
    assert results[guided(PAG)]["measures"] != first["measures"] and not first["not_finite"]
    assert measure(SHORT, [SHORT.n])[0]["measures"] == first["measures"]  # a set of seeds is the same noise


def test_the_benchmark_stops_in_time_and_keeps_whole_rows_only(bench):
    bench.ends = time.time() - 1
    with pytest.raises(quality.OutOfTime):
        bench.run([SHORT])
    with pytest.raises(quality.OutOfTime):
        bench.measure(SHORT, [SHORT.n])
    assert not bench.results()


@pytest.mark.slow
def test_rows_that_differ_in_the_number_of_samples_only_are_sampled_once(bench, monkeypatch):
    small, large = SHORT, dataclasses.replace(SHORT, n=8)
    expected = bench.run([small])[small]
    sampled, sample = [], bench.sample
    monkeypatch.setattr(bench, "sample", lambda row: sampled.append(row) or sample(row))
    bench.ends = time.time() + 120  # rather than to wait for a row that nobody measures
    found = bench.run([large, guided(PAG), small])
    assert sampled == [large, guided(PAG)] and found[small]["measures"] == expected["measures"] != found[large]["measures"]
    assert [len(found[row]["seconds"]) for row in (small, large)] == [1, 2]
    assert bench.run([small, large]) == {row: found[row] for row in (small, large)} and len(sampled) == 2


def test_a_process_that_looks_later_measures_its_own_rows(bench, monkeypatch):
    rows = [guided(PAG, steps=steps) for steps in (2, 3, 4, 5)]
    counts, bench.ranks = measured(bench, monkeypatch, lambda row: 1.0), 2
    first, second = quality.shared_out(rows, 2)
    append_result(bench.out / "quality.jsonl", *bench.measure(first[0], [first[0].n]))  # by the other one
    counts.clear()
    bench.rank, bench.ends = 1, time.time() + 0.5
    with pytest.raises(quality.OutOfTime):  # it waits for the other's
        bench.run(rows)
    assert list(counts) == second


# The choice


def measured(bench, monkeypatch, fd):
    """A bench whose rows have the FD that a function of them says; the rows that were measured are counted."""
    counts = Counter()

    def measure(row, sizes):
        counts[row] += 1
        measures = {bench.judges[0][0].name: {"fd": fd(row)}}
        result = {"measures": measures, "evaluations": row.evaluations, "seconds": [1.0]}
        return [result | {"row": json.loads(dataclasses.replace(row, n=n).key)} for n in sizes]

    monkeypatch.setattr(bench, "measure", measure)
    return counts


def by_scale(row):
    """Falls with the evaluations alone, but that PAG on one layer is better, and best at a scale of 1.4."""
    fd = 100 / row.evaluations
    for name, settings in row.directions:
        if name == "PAG" and dict(settings)["attention"] == "u_blocks.1.1":
            fd *= 0.5 + abs(dict(settings)["scale"] - 1.4)
    return fd


def test_the_best_setting_at_equal_evaluations_is_chosen(bench, monkeypatch):
    counts = measured(bench, monkeypatch, by_scale)
    choice = quality_plan.choose(bench, ["emoji"], n=4, tries=6)["emoji"]
    assert json.loads((bench.out / "quality_choice.json").read_text()) == json.loads(json.dumps({"emoji": choice}))
    assert choice["methods"].keys() == set(quality_plan.METHODS)
    assert {row.seeds for row in counts} == {quality_plan.CHOICE_SEEDS} and set(counts.values()) == {1}
    found = choice["methods"]["PAG"]
    ((_, settings),) = found["directions"]
    assert dict(settings)["attention"] == "u_blocks.1.1" and dict(settings)["scale"] == 1.4
    assert found["score"] == pytest.approx(math.log(0.5), abs=0.02)
    assert choice["methods"]["SEG"]["score"] == pytest.approx(0, abs=0.02)  # the evaluations explain all of its gain
    assert {method["tried"] for method in choice["methods"].values()} == {6}
    quality_plan.choose(bench, ["emoji"], n=4, tries=6)
    assert set(counts.values()) == {1}  # nothing is measured again


def test_the_best_schedule_of_plain_sampling_is_chosen(bench, monkeypatch):
    measured(bench, monkeypatch, lambda row: 2.0 if not row.schedule else abs(dict(row.schedule)["sigma_min"] - 0.12) + 1)
    choice = quality_plan.choose(bench, ["emoji-flow"], n=4, tries=3)["emoji-flow"]
    assert choice["schedule"]["sigma_min"] == 0.12
    assert {method["tried"] for method in choice["methods"].values()} == {3}


def test_a_choice_that_runs_out_of_time_keeps_what_it_has(bench, monkeypatch):
    def fd(row):
        if len(row.directions) == 2:
            raise quality.OutOfTime
        return by_scale(row)

    measured(bench, monkeypatch, fd)
    with pytest.raises(quality.OutOfTime):
        quality_plan.choose(bench, ["emoji"], n=4, tries=3)
    choice = quality_plan.load_choice(bench.out)
    assert choice["emoji"]["methods"].keys() == set(quality_plan.METHODS) - {"SAG + PAG"}
    assert quality_plan.report_rows(choice)


def some_choice():
    choice = {}
    for model in quality_plan.STARTS:
        best = {}
        for method in quality_plan.METHODS:
            best[method] = quality_plan.starts(model, method, best)[0]
        methods = {name: {"directions": one, "score": -i} for i, (name, one) in enumerate(best.items())}
        choice[model] = {"schedule": quality_plan.SCHEDULES[model][-1], "methods": methods}
    return choice


def test_the_report_has_plain_beside_every_guided_row():
    rows = quality_plan.report_rows(some_choice())
    assert quality_plan.CHOICE_SEEDS not in {row.seeds for row in rows} == set(quality_plan.REPORT_SEEDS)
    assert {row.sampler for row in rows} == set(quality_plan.SAMPLERS)
    assert all(row.plain in rows for row in rows if row.directions and row.steps <= 64)
    at_24 = [row for row in rows if row.directions and row.n > quality_plan.FEW]
    assert all(row.equal in rows for row in at_24) and len(at_24) == len(SPEED) * 2 * 3 * 7
    first = rows[: len(rows) // 10]
    assert {row.model for row in first} == set(SPEED) and {row.steps for row in first if row.directions} == {24}


def test_the_grid_has_every_method_with_every_sampler_and_with_classifier_free_guidance():
    choice = some_choice()
    rows = quality_plan.grid_rows(choice)
    assert all(row.plain in rows for row in rows) and {(row.seeds, row.n) for row in rows} == {(2, quality_plan.FEW)}
    guided = [row for row in rows if row.directions]
    assert all(row.equal in rows for row in guided if row.sampler != "dpm_adaptive")
    without, scales = len(quality_plan.SAMPLERS) - 1, 2 * 2  # dpm_adaptive takes no number of steps
    assert len(guided) == len(SPEED) * 7 * (3 * (without + scales) + 1) and {row.steps for row in guided} == {12, 24, 48}
    assert {(row.sampler, row.cond_scale) for row in guided if row.cond_scale} == {
        *itertools.product(quality_plan.MAIN, (1.5, 3.0))
    }


def test_each_command_measures_or_estimates_its_own_rows(tmp_path, monkeypatch):
    ran, choice = [], {"emoji": some_choice()["emoji"]}
    (tmp_path / "quality_choice.json").write_text(json.dumps(choice))
    monkeypatch.setattr(quality.Bench, "run", lambda self, rows: ran.append(rows))
    options = ["--out", str(tmp_path), "--limit", "30", "--n", "4"]
    result = CliRunner().invoke(quality.main, ["report", "grid", "estimate", *options], catch_exceptions=False)
    expected = [quality_plan.report_rows(choice), quality_plan.grid_rows(choice)]
    assert ran == [[dataclasses.replace(row, n=4) for row in rows[:30]] for rows in expected] and ran[0] != ran[1]
    counts = [str(len(quality.to_sample(rows))) for rows in ran]  # with the same n, two rows of the report are one
    assert re.findall(r"(\w+), emoji: (\d+) rows", result.output) == [("report", counts[0]), ("grid", counts[1])]


def test_the_best_method_has_a_curve_too():
    choice = some_choice()
    assert "SEG" not in quality_plan.ALONG
    choice["emoji"]["methods"]["SEG"]["score"] = -100
    seg = quality_plan.methods_of(choice["emoji"])["SEG"]
    found = {
        (row.sampler, row.steps) for row in quality_plan.report_rows(choice) if (row.directions, row.n) == (seg, quality_plan.FEW)
    }
    assert found >= set(itertools.product(quality_plan.SAMPLED, quality_plan.ALONG_STEPS))


def test_the_settings_to_start_from_name_layers_of_the_models():
    layers = {name for name, _ in zoo.load().named_modules()}
    for row in (dataclasses.replace(SHORT, directions=way) for way in quality_plan.methods_of(some_choice()["emoji"]).values()):
        for layer in quality.layers_of(row):
            assert f"inner_model.u_net.{layer}" in layers


# The table and the picture


def some_results():
    """Plain sampling has FD 100 / steps, and every method 60 / steps; the second judge, who was not there at first, says 50."""
    results = {}
    for row in quality_plan.report_rows(some_choice()):
        measures = {"fd": (60 if row.directions else 100) / row.steps, "kid": 0.01, "precision": 0.8, "recall": 0.6}
        measures["fd"] *= 1 + (row.seeds - 3) / 10
        judges = {"judge": measures} | ({"second": measures | {"fd": 50 / row.steps}} if row.seeds > 2 else {})
        results[row] = {"measures": judges, "evaluations": row.evaluations, "seconds": [1.0, 2.0, 9.0], "batch": 500}
    return results


def test_the_table_divides_by_plain_at_equal_steps_and_at_equal_evaluations():
    results = some_results()
    rows = dict(quality_table.main_rows(results, some_choice(), "emoji", "euler"))["PAG"]
    cells = quality_table.method_cells("PAG", rows, results)
    equal = 60 / 24 / (100 / rows[0].equal.steps)
    second = 50 / 24 / (50 / rows[0].equal.steps)
    assert cells == [
        "PAG", f"{rows[0].evaluations:g}", "2.00", "2.50 (2.25–2.75)", "0.60 (0.60–0.60)", f"{equal:.2f} ({equal:.2f}–{equal:.2f})",
        f"{second:.2f} ({second:.2f}–{second:.2f})", "10.0", "0.800, 0.600",
    ]  # fmt: skip
    without = {row: result for row, result in results.items() if row not in {each.equal for each in rows}}
    assert quality_table.method_cells("PAG", rows, without)[5:7] == ["", ""]
    first = [row for row in rows if row.seeds == 2]
    assert quality_table.method_cells("PAG", first, results)[3:7] == ["2.25", "0.60", f"{equal:.2f}", ""]


def test_the_grid_divides_by_plain_sampling_with_the_same_number_of_steps():
    choice, results = some_choice(), {}
    for row in quality_plan.grid_rows({"emoji": choice["emoji"]}):
        fd = row.steps / 3 * (row.steps / 100 if row.directions else 1)
        first = {"fd": fd, "kid": 0.01, "precision": 0.8, "recall": 0.6}
        results[row] = {"measures": {"first": first, "second": {"fd": 1}}, "evaluations": row.evaluations}
    found = quality_table.grid_tables(results, choice, "emoji")
    same = found["with the same steps"].splitlines()
    assert len(same) == 2 + len(quality_plan.SAMPLERS) + 4 and all(
        line.endswith("| 4.0, 8.0, 16.0 |" + " 0.12, 0.24, 0.48 |" * 7) for line in same[2:] if "dpm_adaptive" not in line
    )
    assert "| `dpm_adaptive` | –, 8.0, – |" + " –, 0.24, – |" * 7 in same and "| `euler`, `cond_scale` 1.5 |" in "\n".join(same)
    assert "1.00, 1.00, 1.00" in found["with equal evaluations, by the second judge"]
    row = next(row for row in results if row.sampler == "lms" and row.steps == 12 and "SEG" in str(row.directions))
    equal = row.steps * row.steps / 100 / row.equal.steps
    assert f"| {equal:.2f}, " in next(line for line in found["with equal evaluations"].splitlines() if line.startswith("| `lms`"))
    del results[row]
    assert " –, 0.24, 0.48 " in quality_table.grid_tables(results, choice, "emoji")["with the same steps"]
    one_judge = {row: result | {"measures": {"first": result["measures"]["first"]}} for row, result in results.items()}
    text = quality_table.page(one_judge, {"emoji": choice["emoji"]})
    assert text.count("every method and sampler") == 2 and "by the second judge" not in text


def test_the_page_has_only_what_was_measured():
    choice, results = some_choice(), some_results()
    whole = quality_table.page(results, choice)
    assert whole.count("\n| SAG + PAG |") == 2 * len(SPEED) and "| 24 | 3.75 (24) | 2.25 (" in whole
    for text in (
        "other samplers",
        "| `heun` | 16 |",
        "`dpmpp_2m_sde`, FD by steps",
        "with classifier-free guidance",
        "| 1.5 | PAG |",
    ):
        assert text in whole
    some = {row: result for row, result in results.items() if row.model == "emoji" and row.sampler == "euler"}
    part = quality_table.page(some, choice)
    assert part.count("\n| SAG + PAG |") == 1 and "`dpmpp_2m`" not in part and "heun" not in part


CURVE = {
    e: {"evaluations": float(e), "measures": {"judge": {"fd": fd}}}
    for e, fd in ((8, 20.0), (16, 10.0), (24, 9.0), (32, 8.0), (64, 6.0))
}


@pytest.mark.parametrize(("goal", "expected"), [(20.0, 8.0), (10.0, 16.0), (200**0.5, 128**0.5), (5.0, None)])
def test_how_many_evaluations_reach_an_fd(goal, expected):
    assert quality_table.reaches(CURVE, goal) == pytest.approx(expected)


def test_classifier_free_guidance_of_equal_precision():
    plain = [{"precision": p, "fd": fd} for p, fd in ((0.7, 10.0), (0.8, 6.0), (0.9, 8.0))]
    at = functools.partial(quality_table.effective, plain=plain, scales=[1.0, 1.5, 3.0])
    assert at({"precision": 0.8}) == ["1.50", "6.00"] and at({"precision": 0.85}) == ["2.25", "7.00"]
    assert at({"precision": 0.65}) == ["below all", ""] and at({"precision": 0.95}) == ["above all", ""]
    falls = [{"precision": p, "fd": fd} for p, fd in ((0.8, 10.0), (0.9, 6.0), (0.7, 8.0))]  # 0.85 is there twice
    assert quality_table.effective({"precision": 0.85}, falls, [1.0, 1.5, 3.0]) == ["1.88", "6.50"]


def test_the_blocks_of_the_transformer_are_compared_at_equal_evaluations():
    model = "emoji-flow"
    row = Row(model, seeds=1, n=1000, schedule=frozen(quality_plan.SCHEDULES[model][-1]))
    rows = [dataclasses.replace(row, sampler=s, steps=k) for s in quality_plan.MAIN for k in quality_plan.PLAIN_STEPS]
    ways = [quality_plan.starts(model, method, {}) for method in quality_plan.KINDS]
    rows += [dataclasses.replace(row, sampler=s, directions=way) for s in quality_plan.MAIN for each in ways for way in each]
    results = {}
    for one in rows:  # at equal evaluations each is twice as good, skipping block 3 four times
        skips = "SkipBlock" in str(one.directions) and "blocks.3" in str(one.directions)
        fd = 100 / one.evaluations / (4 if skips else 2 if one.directions else 1)
        results[one] = {"measures": {"judge": {"fd": fd}}, "evaluations": one.evaluations}
    lines = quality_table.block_table(results, some_choice(), model).splitlines()
    assert lines[2] == "| 0 |" + " 0.50, 0.50 |" * 5 and lines[5] == "| 3 |" + " 0.50, 0.50 |" * 4 + " 0.25, 0.25 |"
    assert quality_table.block_table(dict(list(results.items())[:-1]), some_choice(), model) == ""


def test_the_stored_page_is_that_of_the_stored_rows_and_the_pictures_have_all_curves():
    stored = quality_table.load(ROOT / "benchmarks")
    gpus = (ROOT / "benchmarks/quality_gpus.jsonl").read_text().splitlines()
    assert (ROOT / "docs/quality.md").read_text() == quality_table.page(*stored, gpus)
    for name, draw in (("evaluations", quality_plot.small), ("curves", quality_plot.large)):
        figure = draw(functools.partial(quality_table.along, *stored), list(stored[1]))
        for axes in figure.axes:
            second = {"SEG"} if "second" in axes.get_title() else set()
            labels = {line.get_label() for line in axes.lines}
            assert labels == {"plain", "SAG", "SAG, one pass", "PAG", "SAG + PAG"} | second, axes.get_title()
            assert all(len(line.get_xdata()) >= quality_table.ENOUGH for line in axes.lines)
        with Image.open(ROOT / f"docs/{name}.png") as image:
            assert image.size == tuple(figure.canvas.get_width_height())


# The classifier


SHAPES = {  # drawn here, in the manner of emoji
    "smiley": '<circle cx="8" cy="8" r="7" fill="#fc3"/><circle cx="5" cy="6" r="1"/><circle cx="11" cy="6" r="1"/>'
    '<path d="M4 10q4 4 8 0" fill="none" stroke="#000"/>',
    "heart": '<path d="M8 14L2 8a3.5 3.5 0 0 1 6-5a3.5 3.5 0 0 1 6 5z" fill="#d22"/>',
    "star": '<path d="M8 1l2 5h5l-4 3l2 6l-5-4l-5 4l2-6l-4-3h5z" fill="#fb0"/>',
    "house": '<path d="M1 8l7-6l7 6z" fill="#a32"/><path d="M3 8h10v7h-10z" fill="#ec9"/><path d="M7 10h3v5h-3z" fill="#642"/>',
    "leaf": '<path d="M2 14q0-12 12-12q0 12-12 12z" fill="#4a3"/><path d="M2 14l8-8" stroke="#262"/>',
    "drop": '<path d="M8 1q6 7 6 9a6 5 0 0 1-12 0q0-2 6-9z" fill="#39d"/>',
}


@pytest.fixture(scope="module")
def drawn():
    resvg = pytest.importorskip("resvg_py")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" fill="#fff"/>{}</svg>'
    png = (resvg.svg_to_bytes(svg_string=svg.format(shape), width=64, height=64) for shape in SHAPES.values())
    return torch.stack([decoded(bytes(data)) for data in png])


def decoded(png):
    with Image.open(io.BytesIO(png)) as image:
        return pil_to_tensor(image.convert("RGB"))


def test_the_bundled_features_notice_damage(drawn):
    extractor = features.load_extractor("emoji")
    original, reals = extractor(drawn), features.to_reals(drawn)

    def moved(damaged):
        return (extractor(features.to_bytes(damaged)) - original).norm(dim=1)

    noise = torch.randn(reals.shape)
    nothing = moved(reals + noise.sign() / 127.5)  # one of 255 levels: nobody sees it
    pooled = {side: F.interpolate(F.avg_pool2d(reals, side), scale_factor=side) for side in (2, 4)}
    holed = {side: reals.index_fill(3, torch.arange(32 - side, 32), 1.0) for side in (6, 16)}
    for mild, strong in (
        (reals + 0.1 * noise, reals + 0.3 * noise), (pooled[2], pooled[4]), (holed[6], holed[16]),
    ):  # fmt: skip
        assert (moved(mild) > 3 * nothing).all()
        assert moved(strong).mean() > moved(mild).mean()


def test_what_is_shipped_is_whole_and_small():
    classifier, metadata = zoo.files.read(features.CLASSIFIER)
    reference = evaluate.load_statistics()
    assert sum(path.stat().st_size for path in (features.CLASSIFIER, evaluate.STATISTICS)) <= 4 * 2**20
    assert reference.extractor == features.load_extractor("emoji").name
    assert reference.n == metadata["training"]["pictures"] == sum(metadata["training"]["categories"])
    assert (len(classifier["category.bias"]), len(classifier["style.bias"])) == (len(zoo.CATEGORIES), len(zoo.STYLES))
    assert torch.linalg.eigvalsh(reference.cov).min() > -1e-9
    kept = evaluate.statistics(reference.features, reference.extractor)
    assert len(reference.features) == 4000 and evaluate.frechet_distance(kept, reference) < 1  # a part of the same pictures


def test_the_page_says_what_the_classifier_reached():
    training = zoo.files.read(features.CLASSIFIER)[1]["training"]
    distances, accuracy = training["frechet_distances"], training["accuracy_held_out"]
    (rows,) = re.findall(r"\| \| FD \|\n\| --- \| --- \|\n((?:\|.*\n)+)", PAGE)
    names = ("nothing", "474 of training, to the rest", "474 held out, to all", "noise of 0.1", "blur of 1.0 pixels")
    expected = [distances[name] for name in (*names, "a square of 12 pixels missing")]
    assert [float(row.split("|")[2]) for row in rows.splitlines()] == [round(d, 2) for d in expected]
    text = " ".join(PAGE.split())
    assert (
        f"category of {accuracy['category']:.0%} of the held-out pictures, and the style of {accuracy['style']:.0%}".replace(
            "%", " %"
        )
        in text
    )
    assert f"{training['pictures']:,} pictures" in text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The script's run on its own data set of coloured rectangles, which a small network learns at once."""
    folder = tmp_path_factory.mktemp("classifier")
    data, out = make_data(folder), folder / "out"
    options = {"data": data, "out": out, "epochs": 60, "batch-size": 16, "widths": "8,8,8,16", "keep": 20}
    command = [sys.executable, "-W", "ignore", ROOT / "scripts/train_classifier.py", *(f"--{k}={v}" for k, v in options.items())]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return data, out


@pytest.mark.slow
def test_the_script_trains_a_classifier(trained):
    data, out = trained
    metadata = zoo.files.read(out / "classifier.safetensors")[1]
    training = metadata["training"]
    assert (training["pictures"], training["held_out"]) == (32, 8)
    assert training["accuracy_training"]["category"] > 0.8  # by chance 1 of 5
    described = [p for pictures in json.loads((data / "index.json").read_text())["pictures"].values() for p in pictures]
    counts = [sum(p["category"] == category and not p["held_out"] for p in described) for category in zoo.CATEGORIES]
    assert training["categories"] == counts
    distances = training["frechet_distances"]
    assert distances["colours of another"] > 1.5 * distances["nothing"]  # these pictures are their colours
    assert distances["8 held out, to all"] > 2 * distances["8 of training, to the rest"]  # of a colour that is not trained on


@pytest.mark.slow
def test_the_script_keeps_the_features_of_what_was_trained_on(trained):
    data, out = trained
    import train_emoji

    extractor = features.load_classifier(out / "classifier.safetensors")
    pictures, _ = train_emoji.load_pictures(data, list(zoo.CATEGORIES), list(zoo.STYLES))
    known = evaluate.load_statistics(out / "statistics.safetensors")
    assert (known.n, len(known.features), known.extractor) == (32, 20, extractor.name)
    found = extractor(pictures.images).double()
    torch.testing.assert_close(known.mean, found.mean(0), rtol=1e-3, atol=1e-4)  # other batches, other rounding
    torch.testing.assert_close(known.cov, torch.cov(found.T), rtol=1e-3, atol=1e-4)


# The page's commands


COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


class Means(nn.Module):
    """A replacement for Inception, whose weights are not available offline: the mean of each colour, and the first pixel."""

    def forward(self, pictures):
        return torch.cat([pictures.float().mean(dim=(2, 3)), pictures[:, :, 0, 0].float()], dim=1)


def shortened(line):
    """The page's command, with few pictures and steps."""
    args = shlex.split(re.sub(r"--n \d+ (--batch-size \d+)?", "--n 4 ", line))[1:]
    return [*args, "--steps", "2", "--device", "cpu"] if args[0] == "sample" else [*args, "--device", "cpu"]


@pytest.mark.parametrize("whose", [pytest.param("bundled", marks=pytest.mark.slow), "own"])
def test_the_pages_commands_and_python_run(tmp_path, monkeypatch, whose):
    monkeypatch.chdir(tmp_path)
    section = PAGE.split("## Your own model")[whose == "own"].split("## What the measures mean")[0]
    if whose == "own":
        save_small_model("mine.safetensors")
        invoke("sample", "--weights", "mine.safetensors", "--n", 4, "--steps", 2, "--seed", 7, "--out", "photos", "--device", "cpu")
        load = features.load_extractor
        monkeypatch.setattr(
            features, "load_extractor", lambda name, *_: features.Extractor(name, Means()) if name != "emoji" else load(name)
        )
    lines = [line for line in section.splitlines() if line.startswith("ksag ")]
    assert len(lines) == {"bundled": 3, "own": 4}[whose]
    for line in lines:
        output = invoke(*shortened(line))
    assert re.search(r"plain 4 [\d.]+ .* guided 4 [\d.]+", output)
    if whose == "bundled":
        (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
        names = {}
        exec(compile(code, "evaluate.md", "exec"), names)
        fd = evaluate.measure(names["found"], evaluate.load_statistics()).fd
        assert f"plain 4 {fd:.4f}" in output


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python ")])
def test_the_pages_scripts_can_be_given(tmp_path, monkeypatch, line):
    """As far as the work itself."""
    args = shlex.split(line)[1:]
    assert (ROOT / args[0]).is_file()
    monkeypatch.syspath_prepend(str((ROOT / args[0]).parent))
    command = importlib.import_module(Path(args[0]).stem).main
    for name in ("emoji", "runs/quality", "runs/second", "ksag/zoo"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    context = command.make_context(args[0], args[1:].copy())
    given = {name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    arguments = sum(isinstance(parameter, click.Argument) for parameter in command.params)
    assert len(given) == len({arg for arg in args if arg.startswith("--")}) + arguments
