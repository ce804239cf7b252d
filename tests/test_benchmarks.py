"""The figures in the README and on the pages are those that benchmarks/gpu.json and benchmarks/quality.jsonl hold."""

import json
import re
import statistics

import gpu
import pytest
import quality_table
from overhead import FLOORS
from quality_plan import methods_of, plain_at

import ksag
from ksag import zoo
from tests.emoji_packages import ROOT

RUN = json.loads((ROOT / "benchmarks/gpu.json").read_text())
RESULTS, CHOICE = quality_table.load(ROOT / "benchmarks")
BATCH_ONE = {case["model"]: case for case in RUN["cases"] if case["batch"] == 1}


def page(name):
    return (ROOT / name).read_text()


def flat(name):
    return " ".join(page(name).split())


def ratio(case, name, over):
    return gpu.quartiles(case["times"], name, over)[1]


def over_plain(model, form, mode=gpu.GRAPHED):
    return ratio(BATCH_ONE[model], gpu.key(form, mode), gpu.key(gpu.CFG, mode))


def over_floor(model, form):
    return ratio(BATCH_ONE[model], gpu.key(form, gpu.GRAPHED), gpu.key(gpu.FLOORS[form], gpu.GRAPHED))


def span(values):
    return f"{min(values):.2f} to {max(values):.2f}"


# Times


def test_the_page_of_times_is_the_report_of_the_run():
    assert page("docs/gpu.md") == gpu.report(RUN)


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_tables_of_times_are_medians_of_the_run(name):
    readme = name == "README.md"
    forms = (gpu.EXACT, gpu.ONE, gpu.PAG, gpu.BOTH) if readme else (gpu.EXACT, gpu.ONE, gpu.THIRD, gpu.PAG, gpu.BOTH)
    for model, case in BATCH_ONE.items():
        if not readme or model in gpu.UNETS:
            first = model if readme else f"{model}, {case['side']} × {case['side']}"
            cells = [first, *(f"{over_plain(model, form):.2f}" for form in forms)]
            assert f"\n| {' | '.join(cells)} |\n" in page(name)


def test_the_performance_page_says_what_the_run_says():
    text = flat("docs/performance.md")
    one = span([over_plain(model, gpu.ONE) for model in gpu.UNETS])
    exact = span([over_plain(model, gpu.EXACT) for model in gpu.UNETS])
    assert f"in one pass takes {one} times as long as plain" in text
    assert f"computes: {one} for one pass, {exact} for exact SAG." in text
    one, exact = (span([over_plain(model, form, gpu.EAGER) for model in gpu.UNETS]) for form in (gpu.ONE, gpu.EXACT))
    assert f"SAG in one pass takes {one} times as long as plain guidance on the UNets, and exact SAG {exact} times" in text
    added = [100 * over_floor(model, form) - 100 for model in gpu.UNETS for form in gpu.FLOORS]
    assert f"ksag adds {min(added):.0f} to {max(added):.0f} % to the floor on the UNets" in text
    sd3, sd3_one, flux = (100 * over_floor(*each) - 100 for each in
                          (("SD3 medium", gpu.EXACT), ("SD3 medium", gpu.ONE), ("Flux dev", gpu.EXACT)))  # fmt: skip
    assert f"On SD3, SAG takes {sd3:.0f} % more than the bare passes (in one pass {sd3_one:.0f} %)" in text
    assert f"on Flux it takes {flux:.0f} % more" in text
    assert all(over_floor(model, gpu.PAG) < 1.015 for model in gpu.TRANSFORMERS)  # PAG adds 1 % or less
    small = BATCH_ONE["SD 1.5"]
    forms = [gpu.key(*each) for each in ((gpu.EXACT, gpu.EAGER), (gpu.ONE, gpu.EAGER), (gpu.ONE, gpu.GRAPHED))]
    exact, one, graphed = (ratio(small, gpu.PIPELINE, form) for form in forms)
    assert f"takes {exact:.2f} times as long as ksag's exact SAG on Stable Diffusion 1.5, {one:.2f} times" in text
    assert f"and {graphed:.1f} times as long as one pass with CUDA graphs" in text
    rounds = [len(times) for case in RUN["cases"] for times in case["times"].values()]
    assert f"Medians of {min(rounds)} to {max(rounds)} rounds" in text


def test_the_performance_page_says_what_memory_the_run_needed():
    for model in BATCH_ONE.keys() - {"Flux dev"}:  # without uncond
        peaks = BATCH_ONE[model]["peaks"]
        one, pag, both = (
            peaks[gpu.key(form, gpu.EAGER)] / peaks[gpu.key(gpu.CFG, gpu.EAGER)] for form in (gpu.ONE, gpu.PAG, gpu.BOTH)
        )
        assert one == pytest.approx(1.5, abs=0.03) and pag == pytest.approx(1.5, abs=0.03) and both == pytest.approx(2, abs=0.03)
    assert "one pass and PAG need 1.5 times the activation memory of plain guidance, and both together 2 times" in flat(
        "docs/performance.md"
    )


# Quality


def fd_cells(model, sampler, method):
    """FD of plain sampling at 24 steps, of plain sampling at equal evaluations, and guided."""
    rows = quality_table.main_rows(RESULTS, CHOICE, model, sampler)
    (row,) = (row for name, row in rows if name == method)
    plain, equal, guided = (f"{quality_table.fd(RESULTS[each]):.2f}" for each in (row.plain, row.equal, row))
    return f"{plain} | {equal} | **{guided}**"


def test_the_readmes_table_of_quality_is_measured():
    for sampler in quality_table.MAIN:
        assert f"\n| `{sampler}` | {fd_cells('emoji', sampler, 'SAG + PAG')} |\n" in page("README.md")


def test_the_evaluation_pages_table_is_measured():
    names = {"UNet": "emoji", "transformer": "emoji-flow"}
    rows = re.findall(r"^\| (UNet|transformer), `(\w+)`, (.*?) \| (.* \| .* \| .*) \|$", page("docs/evaluate.md"), re.M)
    assert len(rows) == 6
    for model, sampler, method, cells in rows:
        assert cells == fd_cells(names[model], sampler, method.replace(" in one pass", ", one pass"))


def test_the_evaluation_page_says_what_was_measured():
    text = flat("docs/evaluate.md")

    def ratios(model, method):
        rows = (dict(quality_table.main_rows(RESULTS, CHOICE, model, sampler))[method] for sampler in quality_table.MAIN)
        return " and ".join(f"{quality_table.fd(RESULTS[row]) / quality_table.fd(RESULTS[row.equal]):.2f}" for row in rows)

    assert f"with equal evaluations ({ratios('emoji', 'SEG')} times its FD), and its recall is lower" in text
    assert f"with equal evaluations ({ratios('emoji-flow', 'SAG')} times its FD)" in text
    flow = {name: RESULTS[row] for name, row in quality_table.main_rows(RESULTS, CHOICE, "emoji-flow", "euler")}
    plain, pag, seg, both = (quality_table.fd(flow[name]) for name in ("plain", "PAG", "SEG", "SAG + PAG"))
    assert f"FD rises from {plain:.1f} to {pag:.1f} with PAG and to {seg:.0f} with SEG" in text
    assert f"SAG + PAG also makes it worse ({both:.1f})" in text
    guided, equal = (quality_table.seconds(flow[name]) for name in ("SAG", "plain, 35 steps"))
    assert f"{guided:.2f} s with SAG against {equal:.2f} s for 1,000 pictures" in text


def test_the_page_says_how_the_settings_were_chosen_and_what_is_missing():
    assert {method["tried"] for model in CHOICE.values() for method in model["methods"].values()} == {4}
    report = [row for row in RESULTS if row.seeds == quality_table.SEEDS]
    assert {row.seeds for row in RESULTS} == {1, quality_table.SEEDS}
    assert {row.sampler for row in report} == set(quality_table.MAIN) and {row.cond_scale for row in report} == {None}
    assert {len(result["measures"]) for result in RESULTS.values()} == {1}  # judges
    there = {row.directions for row in report if (row.model, row.sampler) == ("emoji-flow", "dpmpp_2m")}
    assert {name for name, way in methods_of(CHOICE["emoji-flow"]).items() if way not in there} == {"SAG + PAG", "SAG, every 2"}


def test_the_picture_shows_what_the_page_says():
    """The picture's claims: PAG is below plain sampling at equal evaluations, and SAG is not with few of them."""
    curves = quality_table.along(RESULTS, CHOICE, "emoji", "euler")

    def over_curve(name):
        plain = {result["evaluations"]: quality_table.fd(result) for result in curves["plain"].values()}
        return {r["evaluations"]: quality_table.fd(r) / plain_at(r["evaluations"], plain) for r in curves[name].values()}

    assert max(over_curve("PAG").values()) < 1
    for name in ("SAG", "SAG + PAG"):
        assert all((over < 1) == (evaluations > 20) for evaluations, over in over_curve(name).items())


def test_every_guided_row_was_measured_without_broken_samples():
    assert sum(result["not_finite"] for result in RESULTS.values()) == 0


def test_the_performance_page_has_the_overhead_on_a_cpu():
    times = json.loads((ROOT / "benchmarks/overhead.json").read_text())["seconds"]

    def medians(over, *names):
        return [f"{statistics.median(a / b for a, b in zip(times[n], times[over or FLOORS[n]], strict=True)):.2f}" for n in names]

    forms = "SAG", "SAG, one_pass", "PAG", "SAG, one_pass + PAG"
    exact, one, pag, both = medians("", *forms)
    assert f"are {exact} for SAG, {one} in one pass, {pag} for PAG, and {both} for SAG in one pass with PAG" in flat(
        "docs/performance.md"
    )
    *first, last, third = medians("plain CFG", *forms, "SAG, every=3")
    assert f"they are {', '.join(first)} and {last}, and {third} for SAG with `every=3`" in flat("docs/performance.md")


def test_the_recommended_settings_are_those_that_were_chosen():
    def as_chosen(direction):
        layers = [layer.removeprefix("inner_model.u_net.") for layer in direction.layers]
        chosen = {"scale": direction.scale, "sigma_range": list(direction.sigma_range), "attention": layers}
        return direction.name, chosen | ({"blur_sigma": direction.blur_sigma} if direction.name == "SAG" else {})

    def stored(method):
        for name, settings in CHOICE["emoji"]["methods"][method]["directions"]:
            layers = dict(settings)["attention"]
            yield name, dict(settings) | {"attention": [layers] if isinstance(layers, str) else layers}

    alone = {name.replace("sag_scale", "scale"): value for name, value in zoo.SETTINGS.items()}
    assert [as_chosen(ksag.SAG(**alone))] == list(stored("SAG"))
    assert [as_chosen(direction) for direction in zoo.directions()] == list(stored("SAG + PAG"))
