"""The evidence: the pages say what the raw rows say, the benchmark goes on where it was stopped, and what judges is whole."""

import dataclasses
import importlib
import io
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import quality
import quality_table
import torch
from click.core import ParameterSource
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from ksag import evaluate, zoo
from ksag.evaluate import features
from tests.commands import invoke, save_small_model
from tests.emoji_packages import ROOT, make_data

ROWS = [json.loads(line) for line in (ROOT / "benchmarks/quality.jsonl").read_text().splitlines()]
CHOICE = json.loads((ROOT / "benchmarks/quality_choice.json").read_text())
TABLES = (ROOT / "docs/quality.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
PAGE = (ROOT / "docs/evaluate.md").read_text()
CHOSEN = CHOICE["settings"]
LATE, BESIDE_3 = CHOICE["sag_scale in one pass"], CHOICE["sag_scale beside cond_scale 3.0"]
WITH_THE_LAST_STEP = {**CHOSEN, "sigma_range": [0.3, 12.0]}
TWO = {**CHOSEN, "sag_scale": 2.0}
USUAL = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}


# The tables


def found(measure="fd", judge=0, schedule=CHOICE["schedule"], sag=None, sampler="euler", **wanted):
    """A measure of rows of the report, one for each set of seeds, by a plain search through the raw lines."""
    wanted = {"cond_scale": None, "steps": quality.STEPS[sampler], "n": 5000, "dtype": "float16", "sampler": sampler, **wanted}
    return [
        list(r["measures"].values())[judge][measure]
        for r in sorted(ROWS, key=lambda r: r["row"]["seeds"])
        if dict(r["row"]["schedule"]) == schedule and (r["row"]["sag"] and dict(r["row"]["sag"])) == sag
        and r["row"]["seeds"] in quality.REPORT_SEEDS and all(r["row"][k] == v for k, v in wanted.items())
    ]  # fmt: skip


def ratios(sag=CHOSEN, **wanted):
    return [guided / plain for plain, guided in zip(found(**wanted), found(sag=sag, **wanted), strict=False)]


def ratio(sag=CHOSEN, **wanted):
    return statistics.mean(ratios(sag, **wanted))


def kept(form, **wanted):
    """The share of exact SAG's gain that a cheaper form keeps, in %, by either judge."""
    shares = []
    for judge in (0, 1):
        plain, exact, cheaper = (found(judge=judge, sag=sag, seeds=2, **wanted)[0] for sag in (None, CHOSEN, {**CHOSEN, **form}))
        shares.append(round(100 * (plain - cheaper) / (plain - exact)))
    return shares


def test_the_tables_are_those_of_the_rows():
    assert quality_table.report(*quality_table.load(ROOT / "benchmarks")) == (ROOT / "docs/quality.md").read_text()


def test_the_tables_have_what_a_plain_search_finds():
    for sampler in ("euler", "dpmpp_2m"):
        both = (ratios(sampler=sampler, judge=judge) for judge in (0, 1))
        cells = (f"{statistics.mean(x):.3f} ± {statistics.stdev(x):.3f}" for x in both if len(x) == 3)
        assert "| **SAG over plain** | " + " | ".join(f"**{cell}**" for cell in cells) + " | **" in TABLES
    for sag in (CHOSEN, WITH_THE_LAST_STEP):
        heun = ratio(sag, sampler="heun")
        assert re.search(rf"\| heun, 16 steps \| [\d.]+ \| [\d.]+ \| \*\*{heun:.3f}\*\* \|", TABLES)


def test_the_page_says_what_the_rows_say():
    """The sentences of "What SAG does for the bundled model"."""
    text = " ".join(PAGE.split())
    euler, second = (ratio(judge=judge) for judge in (0, 1))
    assert f"SAG takes FD to {euler:.2f} of plain's, by the second judge to {second:.2f}, at 1.4 times" in text
    assert "| **1.417** |" in TABLES
    ends = [statistics.mean(fds) for fds in (found(), found(sag=CHOSEN), found(steps=32), found(steps=64))]
    assert "from {:.1f} to {:.1f}. Plain `euler` has {:.1f} at 32 steps and {:.1f} at 64".format(*ends) in text
    recalls = [statistics.mean(found("recall", sag=sag)) for sag in (None, CHOSEN)]
    assert "Recall rises from {:.2f} to {:.2f}; precision stays".format(*recalls) in text
    most = [ratio(sampler=s) for s in ("euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde")]
    assert (
        "{:.2f} with `euler_ancestral`, {:.2f} with `dpmpp_2s_ancestral`, {:.2f} with `dpmpp_sde`, {:.2f} with `dpmpp_2m_sde`"
    ).format(*most) in text
    dpmpp = [ratio(sampler="dpmpp_2m", judge=judge) for judge in (0, 1)]
    assert "gains less: {:.2f}, by the second judge {:.2f}".format(*dpmpp) in text
    longer = (statistics.mean(found(sampler="dpmpp_2m", steps=steps)) for steps in (24, 64))
    assert "64 steps take plain `dpmpp_2m` from {:.1f} to {:.1f}".format(*longer) in text
    near, second = ([ratio(judge=j, sampler=s) for s in ("heun", "dpm_2", "dpm_fast", "dpm_adaptive")] for j in (0, 1))
    assert f"as near to the end, it is {min(near):.2f} to {max(near):.2f}" in text
    assert f"nothing by the second judge ({min(second):.2f} to {max(second):.2f})" in text
    lms = ratio(sampler="lms")
    assert f"`lms` must not be used with it: {lms:.2f}" in text
    parameters = " ".join((ROOT / "docs/parameters.md").read_text().split())
    assert f"({lms:.0f} times plain's distance)" in parameters
    by_category = {scale: [ratio(sampler=s, cond_scale=scale) for s in ("euler", "dpmpp_2m")] for scale in (1.0, 1.5, 3.0)}
    assert "By category: {:.2f} with `euler`, {:.2f} with `dpmpp_2m`".format(*by_category[1.0]) in text
    (e, d), (e3, d3) = by_category[1.5], by_category[3.0]
    assert f"{e:.2f} and {e3:.2f} with `euler`, and {d:.2f} and {d3:.2f} with `dpmpp_2m`" in text
    assert max(*by_category[1.0], e, d, e3, d3) < 1  # never worse than plain
    half = [ratio({**CHOSEN, "sag_scale": BESIDE_3}, sampler=s, cond_scale=3.0) for s in ("euler", "dpmpp_2m")]
    assert "`cond_scale=3`, it is {:.2f} and {:.2f}".format(*half) in text
    assert "`sag_scale={}` | `euler`: {:.2f}, `dpmpp_2m`: {:.2f} |".format(BESIDE_3, *half) in parameters
    assert f"`euler`: {euler:.2f} of plain's Fréchet distance, `dpmpp_2m`: {dpmpp[0]:.2f} |" in parameters
    assert f"gains little ({dpmpp[0]:.2f} to {max(near):.2f})" in parameters
    two = ratio(TWO), ratio(TWO, sampler="dpmpp_2m"), ratio(TWO, sampler="dpmpp_2m", cond_scale=1.5)
    assert "more with `euler`, {:.2f}, and less with `dpmpp_2m`, {:.2f}, and there it harms beside CFG: {:.2f}".format(*two) in text


def test_the_readme_says_what_the_samplers_gain():
    readme = " ".join((ROOT / "README.md").read_text().split())
    shares = {s: ratio(sampler=s) for s in quality.STEPS if s != "lms"}
    least, most = (choice(shares, key=shares.get) for choice in (max, min))
    assert f"from {shares[most]:.2f} of plain's distance (`{most}`) to {shares[least]:.2f} (`{least}`)" in readme


def test_the_page_says_what_the_last_step_does():
    text, parameters = (" ".join((ROOT / "docs" / page).read_text().split()) for page in ("evaluate.md", "parameters.md"))
    shares = {s: ratio(WITH_THE_LAST_STEP, sampler=s) for s in quality.STEPS}
    assert (
        "{euler:.2f} with `euler`, {dpmpp_2m:.2f} with `dpmpp_2m`, {dpmpp_2m_sde:.2f} with `dpmpp_2m_sde`".format(**shares) in text
    )
    assert "`euler`: {euler:.2f}, `dpmpp_2m`: {dpmpp_2m:.2f} |".format(**shares) in parameters
    assert f"never worse than plain but with `lms` ({shares.pop('lms'):.2f})" in text and max(shares.values()) < 1
    beside = [ratio(WITH_THE_LAST_STEP, sampler=s, cond_scale=scale) for s in ("euler", "dpmpp_2m") for scale in (1.0, 1.5, 3.0)]
    assert f"beside CFG {min(beside):.2f} to {max(beside):.2f}" in text
    assert CHOICE["schedule"]["sigma_min"] > 0.3  # so that (0.3, 12) is (0, 12)
    sde, ancestral = (
        [found(schedule=USUAL, sampler=s)[0], found(sag=CHOSEN, sampler=s)[0]] for s in ("dpmpp_2m_sde", "dpm_2_ancestral")
    )
    assert "({:.2f}), SAG's {:.2f} is {:.2f}".format(*sde, sde[1] / sde[0]) in text
    assert "is lower there ({:.2f}) than with SAG here ({:.2f})".format(*ancestral) in text


def test_the_parameters_page_says_what_was_tried():
    text = " ".join((ROOT / "docs/parameters.md").read_text().split())
    layers = [float(line.split("|")[3]) for line in TABLES.splitlines() if line.startswith("| `inner_model")]
    assert len(layers) == 8
    assert f"`euler` has {min(layers):.2f} of plain's distance with the best one and {max(layers):.2f} with the worst" in text
    strengths = {}
    for sampler in ("euler", "dpmpp_2m"):
        row = re.search(rf"\| {sampler}, 24 steps, unconditional \|([\d.| ]+)\|", TABLES)
        strengths[sampler] = [float(cell) for cell in row[1].split("|") if cell.strip()]
    assert strengths["euler"][-1] == min(strengths["euler"]) and "`euler` gains more up to 2.8, the most that was tried" in text
    assert strengths["dpmpp_2m"] == sorted(strengths["dpmpp_2m"]) and 0.99 < strengths["dpmpp_2m"][-1] < 1.01
    assert "gains most at 1 to 1.4, and nothing at 2.8" in text
    line = next(line for line in TABLES.splitlines() if line.startswith("| dpm_adaptive"))
    assert (
        float(line.split("×")[1].strip(" |")) == pytest.approx(2.6, abs=0.051) and "`dpm_adaptive` takes 2.6 times as long" in text
    )


def test_the_page_says_what_the_cheaper_forms_keep():
    text, parameters = (" ".join((ROOT / "docs" / page).read_text().split()) for page in ("evaluate.md", "parameters.md"))
    one, two, strong = {"one_pass": True}, {"every": 2}, {"one_pass": True, "sag_scale": LATE}
    cases = [
        {"sampler": "euler"}, {"sampler": "dpmpp_2m"}, {"sampler": "euler_ancestral"}, {"sampler": "dpmpp_2m_sde"},
        {"sampler": "dpmpp_2m", "steps": 12},
    ]  # fmt: skip
    one_, two_, strong_, both_ = ([kept(form, **case)[0] for case in cases] for form in (one, two, strong, strong | two))
    assert (
        f"`one_pass` keeps {one_[0]} % of exact SAG's gain with `euler`, {one_[2]} % with `euler_ancestral`, and {one_[3]} % with"
        in text
    )
    assert f"`every=2` {two_[0]}, {two_[2]} and {two_[3]} %" in text
    assert (
        f"it keeps {strong_[0]}, {strong_[2]} and {strong_[3]} %, and with `every=2` {both_[0]}, {both_[2]} and {both_[3]} %"
        in text
    )
    by_category = (kept(form, sampler="dpmpp_2m", cond_scale=1.0)[0] for form in (strong, strong | two))
    assert "with `dpmpp_2m`, these keep {} and {} %".format(*by_category) in text
    assert f"`one_pass` at `sag_scale={LATE}` keeps {strong_[4]} %, `every=2` {two_[4]} %, and both {both_[4]} %" in text
    little = [{"sampler": "dpmpp_2m", "steps": 48}, {"sampler": "heun"}]
    left = [[ratio({**CHOSEN, **form}, seeds=2, **case) for case in little] for form in (strong, {}, one)]
    assert (
        "too much: {:.2f} and {:.2f} of plain's distance, where exact SAG has {:.2f} and {:.2f}, and one pass at its".format(
            *left[0], *left[1]
        )
        in text
    )
    assert "at its strength, 1.4, has {:.2f} and {:.2f}".format(*left[2]) in text
    assert f"1.4 times as large: {LATE} for the bundled model" in parameters and round(1.4 * CHOSEN["sag_scale"], 3) == LATE
    names = {
        "`one_pass=True`": one,
        "`one_pass=True`, 1.4 times as strong": strong,
        "`every=2`": two,
        "both, 1.4 times as strong": strong | two,
        "`one_pass=True, every=3`, 1.4 times as strong": strong | {"every": 3},
    }
    in_order = [cases[i] for i in (0, 1, 4, 2)]
    for name, form in names.items():
        cells = " | ".join(f"{kept(form, **case)[0]} %" for case in in_order)
        assert re.search(rf"\| {re.escape(name)} \| (\d\.\d\d )?{re.escape(f'| {cells} |')}", parameters), name


def test_the_tables_of_one_judge_and_a_few_rows():
    """As a user's own run makes them, without the second judge."""
    few = [{**r, "measures": dict([next(iter(r["measures"].items()))])} for r in ROWS if r["row"]["sampler"] == "euler"]
    results = {quality.Row.of(r): r for r in few}
    text = quality_table.report(results, CHOICE)
    assert "second judge |" not in text and "| euler, 64 steps |" in text and "dpmpp_2m, 24" not in text


# The benchmark


def test_what_was_chosen_is_what_is_recommended():
    assert {**CHOSEN, "sigma_range": tuple(CHOSEN["sigma_range"])} == zoo.SETTINGS and CHOICE["schedule"] == quality.SCHEDULE
    model = zoo.load_config()["model"]
    assert {name: model[name] for name in ("sigma_min", "sigma_max")} == {k: v for k, v in CHOICE["schedule"].items() if k != "rho"}


def test_what_was_chosen_follows_from_the_rows(bench, monkeypatch):
    """Again from all that was measured, and by its own rules, but that nothing is measured anew."""
    (bench.out / "quality.jsonl").write_text((ROOT / "benchmarks/quality.jsonl").read_text())
    monkeypatch.setattr(bench, "measure", lambda row: pytest.fail(f"not measured: {quality.describe(row)}"))
    quality.choose(bench, 1000)
    assert json.loads((bench.out / "quality_choice.json").read_text()) == CHOICE


def test_settings_are_chosen_on_other_seeds_than_reported():
    rows = quality.report_rows(CHOICE)
    assert quality.CHOICE_SEEDS not in {row.seeds for row in rows} == set(quality.REPORT_SEEDS)
    assert {row.sampler for row in rows} == quality.STEPS.keys()
    assert all(row.plain in rows for row in rows if row.sag is not None)


@pytest.fixture
def bench(tmp_path):
    ((judge, reference),), shares = quality.load_judges([features.CLASSIFIER.parent], torch.device("cpu"))
    judges = [(judge, dataclasses.replace(reference, features=reference.features[:200]))]  # all only take longer
    return quality.Bench(tmp_path, torch.device("cpu"), zoo.EMOJI, judges, shares, 4, math.inf, 0, 1, compiled=None)


SHORT = quality.Row(steps=2, n=4)
SHORT_SAG = quality.Row(steps=2, n=4, sag=quality.frozen(zoo.SETTINGS | {"sigma_range": (0.0, math.inf)}))


def test_the_benchmark_goes_on_where_it_was_killed(bench, monkeypatch):
    first = bench.run([SHORT])[SHORT.key]
    path = bench.out / "quality.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])  # killed while it wrote the next row
    measured, measure = [], bench.measure
    monkeypatch.setattr(bench, "measure", lambda row: measured.append(row) or measure(row))
    results = bench.run([SHORT, SHORT_SAG])
    assert measured == [SHORT_SAG] and results[SHORT.key] == first
    assert quality.load_results(path) == results
    guided = results[SHORT_SAG.key]
    assert (first["evaluations"], guided["evaluations"]) == (2, 4) and not guided["not_finite"]
    assert guided["measures"] != first["measures"]
    assert quality.Row.of(guided) == SHORT_SAG
    again = measure(SHORT)
    assert again["measures"] == first["measures"]  # a set of seeds is the same noise


def test_the_benchmark_stops_in_time_and_keeps_whole_rows_only(bench):
    bench.ends = time.time() - 1
    with pytest.raises(quality.OutOfTime):
        bench.run([SHORT])
    with pytest.raises(quality.OutOfTime):
        bench.measure(SHORT)
    assert not bench.results()


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
    extractor = features.load("emoji")
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
    classifier, metadata = features.read(features.CLASSIFIER)
    reference = evaluate.load_statistics()
    assert sum(path.stat().st_size for path in (features.CLASSIFIER, evaluate.STATISTICS)) <= 4 * 2**20
    assert reference.extractor == features.load("emoji").name == next(iter(ROWS[0]["measures"]))
    assert reference.n == metadata["training"]["pictures"] == sum(metadata["training"]["categories"])
    assert (len(classifier["category.bias"]), len(classifier["style.bias"])) == (len(zoo.CATEGORIES), len(zoo.STYLES))
    assert torch.linalg.eigvalsh(reference.cov).min() > -1e-9
    kept = evaluate.statistics(reference.features, reference.extractor)
    assert len(reference.features) == 4000 and evaluate.frechet_distance(kept, reference) < 1  # a part of the same pictures


def test_the_page_says_what_the_classifier_reached():
    training = features.read(features.CLASSIFIER)[1]["training"]
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


def test_the_script_trains_a_classifier(trained):
    data, out = trained
    metadata = features.read(out / "classifier.safetensors")[1]
    training = metadata["training"]
    assert (training["pictures"], training["held_out"]) == (32, 8)
    assert training["accuracy_training"]["category"] > 0.8  # by chance 1 of 5
    described = [p for pictures in json.loads((data / "index.json").read_text())["pictures"].values() for p in pictures]
    counts = [sum(p["category"] == category and not p["held_out"] for p in described) for category in zoo.CATEGORIES]
    assert training["categories"] == counts
    distances = training["frechet_distances"]
    assert distances["colours of another"] > 1.5 * distances["nothing"]  # these pictures are their colours
    assert distances["8 held out, to all"] > 2 * distances["8 of training, to the rest"]  # of a colour that is not trained on


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
    """Stands for Inception, whose weights are not here: the mean of each colour, and the first pixel."""

    def forward(self, pictures):
        return torch.cat([pictures.float().mean(dim=(2, 3)), pictures[:, :, 0, 0].float()], dim=1)


def shortened(line):
    """The page's command, with few pictures and steps."""
    args = shlex.split(re.sub(r"--n \d+ (--batch-size \d+)?", "--n 4 ", line))[1:]
    return [*args, "--steps", "2", "--device", "cpu"] if args[0] == "sample" else [*args, "--device", "cpu"]


@pytest.mark.parametrize("whose", ["bundled", "own"])
def test_the_pages_commands_and_python_run(tmp_path, monkeypatch, whose):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    section = PAGE.split("## A model of your own")[whose == "own"].split("## What the measures mean")[0]
    if whose == "own":
        save_small_model("mine.safetensors")
        invoke("sample", "--weights", "mine.safetensors", "--n", 4, "--steps", 2, "--seed", 7, "--out", "photos", "--device", "cpu")
        load = features.load
        monkeypatch.setattr(features, "load", lambda name, *_: features.Extractor(name, Means()) if name != "emoji" else load(name))
    lines = [line for line in section.splitlines() if line.startswith("ksag ")]
    assert len(lines) == {"bundled": 3, "own": 4}[whose]
    for line in lines:
        output = invoke(*shortened(line))
    assert re.search(r"plain 4 [\d.]+ .* with-sag 4 [\d.]+", output)
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
