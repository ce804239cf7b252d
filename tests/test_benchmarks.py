"""The figures in the README and on the pages are those that benchmarks/gpu.json and benchmarks/quality.jsonl hold."""

import json
import re
import statistics

import gpu
import pytest
import quality_table
from overhead import FLOORS
from quality_plan import OTHERS, changed, methods_of, plain_at, recommended

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


def main_rows(model, sampler, method):
    return dict(quality_table.main_rows(RESULTS, CHOICE, model, sampler))[method]


def mean_fd(rows):
    return statistics.mean(quality_table.fd(RESULTS[row]) for row in rows)


def over_equal(model, sampler, method, judge=0):
    """The mean over the sets of seeds that this judge saw, of FD over that of plain sampling at equal evaluations."""
    pairs = [[quality_table.judged(RESULTS[each], judge) for each in (row, row.equal)] for row in main_rows(model, sampler, method)]
    return statistics.mean(one["fd"] / two["fd"] for one, two in pairs if one and two)


def fd_cells(model, sampler, method):
    """FD of plain sampling at 24 steps, of plain sampling at equal evaluations, and guided; means over the sets of seeds."""
    rows = main_rows(model, sampler, method)
    plain, equal, guided = (f"{mean_fd(each):.2f}" for each in ([r.plain for r in rows], [r.equal for r in rows], rows))
    return f"{plain} | {equal} | **{guided}**"


def test_the_readmes_table_of_quality_is_measured():
    for sampler in quality_table.MAIN:
        assert f"\n| `{sampler}` | {fd_cells('emoji', sampler, 'SAG + PAG')} |\n" in page("README.md")


def test_the_evaluation_pages_table_is_measured():
    names = {"UNet": "emoji", "transformer": "emoji-flow"}
    rows = re.findall(r"^\| (UNet|transformer), `(\w+)`, (.*?) \| (.* \| .* \| .*) \|$", page("docs/evaluate.md"), re.M)
    assert len(rows) == 8
    for model, sampler, method, cells in rows:
        assert cells == fd_cells(names[model], sampler, method.replace(" in one pass", ", one pass"))
    seeds = {model: {row.seeds for row in RESULTS if row.model == model and row.seeds > 1} for model in CHOICE}
    assert seeds == {"emoji": {2, 3}, "emoji-flow": {2, 3, 4}}  # "two sets of seeds for the UNet and three for the transformer"
    every = [rows for model in CHOICE for sampler in quality_table.MAIN
             for _, rows in quality_table.main_rows(RESULTS, CHOICE, model, sampler)]  # fmt: skip
    assert max(abs(quality_table.fd(RESULTS[row]) / mean_fd(rows) - 1) for rows in every for row in rows) < 0.035


def test_the_parameters_page_starts_from_measured_settings():
    def falls(model, sampler, *methods):
        plain, *guided = (f"{mean_fd(main_rows(model, sampler, m)):.1f}" for m in ("plain", *methods))
        return f"{plain} → {' or '.join(guided)}"

    rows = [row for row in page("docs/parameters.md").splitlines() if "FD " in row and row.startswith("|")]
    for row, model, methods in zip(
        rows, ("emoji", "emoji", "emoji-flow"), (["SAG + PAG"], ["PAG"], ["SAG, one pass", "PAG"]), strict=True
    ):
        assert f"FD {falls(model, 'euler', *methods)} with `euler`, {falls(model, 'dpmpp_2m', *methods)} with `dpmpp_2m`" in row


def over_curve(model, sampler, method):
    """By evaluations: FD over that of plain sampling with as many, interpolated."""
    curves = quality_table.along(RESULTS, CHOICE, model, sampler)
    plain = {result["evaluations"]: quality_table.fd(result) for result in curves["plain"].values()}
    return {r["evaluations"]: quality_table.fd(r) / plain_at(r["evaluations"], plain) for r in curves[method].values()}


def test_the_picture_shows_what_the_page_says():
    assert max(over_curve("emoji", "euler", "PAG").values()) < 1
    for model, method, evaluations in (
        ("emoji", "SAG", 20), ("emoji", "SAG + PAG", 20), ("emoji-flow", "SAG", 20), ("emoji-flow", "PAG", 20),
        ("emoji-flow", "SAG + PAG", 40),
    ):  # fmt: skip
        for e, over in over_curve(model, "euler", method).items():
            assert (over < 1) == (e > evaluations) or 17 <= e <= 20, (model, method, e)

    def reaches(model, method):
        curves = quality_table.along(RESULTS, CHOICE, model, "dpmpp_2m")
        return quality_table.reaches(curves[method], quality_table.fd(curves["plain"][64]))

    unet, both, flow = (f"{reaches(*each):.0f}" for each in (("emoji", "PAG"), ("emoji", "SAG + PAG"), ("emoji-flow", "PAG")))
    text = flat("docs/evaluate.md")
    assert f"PAG reaches the FD of 64 plain steps with {unet} evaluations, and SAG + PAG with {both}." in text
    assert f"On the transformer, PAG does with {flow}." in text


def other_samplers(model):
    """FD over that of plain sampling at equal evaluations, by sampler."""
    best, found = recommended(CHOICE[model]), {}
    for row, result in RESULTS.items():
        few = (row.model, row.directions, row.cond_scale, row.n) == (model, best, None, quality_table.FEW)
        if few and row.steps == OTHERS.get(row.sampler) and row.sampler != "dpm_adaptive":
            found[row.sampler] = quality_table.fd(result) / quality_table.fd(RESULTS[row.equal])
    return found


def test_the_page_says_what_other_samplers_do():
    text, found = flat("docs/evaluate.md"), other_samplers("emoji")
    worse = {sampler: over for sampler, over in found.items() if over > 1}
    assert worse.keys() == {"lms", "dpm_2_ancestral", "dpmpp_3m_sde"}
    better = sorted(over for over in found.values() if over < 1)
    adaptive = next(row for row in RESULTS if (row.sampler, row.model) == ("dpm_adaptive", "emoji") and row.directions)
    assert quality_table.fd(RESULTS[adaptive]) < quality_table.fd(RESULTS[adaptive.plain]) and len(better) + 1 == 8
    assert f"SAG + PAG has {better[0]:.2f} to {better[-1]:.2f} times the FD" in text
    lms, ancestral, three = (f"{worse[sampler]:.2f}" for sampler in ("lms", "dpm_2_ancestral", "dpmpp_3m_sde"))
    assert f"`lms` ({lms} times), `dpm_2_ancestral` ({ancestral}) and `dpmpp_3m_sde` ({three})" in text
    flow = other_samplers("emoji-flow")
    assert all(
        (over < 1) == (not s.endswith(("sde", "ancestral")) or s in ("euler_ancestral", "dpmpp_2s_ancestral"))
        for s, over in flow.items()
    )
    curves = quality_table.along(RESULTS, CHOICE, "emoji-flow", "dpmpp_2m_sde")
    plain, one = (quality_table.fd(curves[name][24]) for name in ("plain", "SAG, one pass"))
    assert f"`dpmpp_2m_sde` at 24 steps, FD falls from {plain:.2f} to {one:.2f}" in text


def test_the_page_says_what_classifier_free_guidance_leaves():
    def found(sampler, cond_scale, scale):
        way = changed(recommended(CHOICE["emoji"]), scale) if scale else ()
        (row,) = (r for r in RESULTS if (r.model, r.sampler, r.cond_scale, r.directions) == ("emoji", sampler, cond_scale, way))
        return f"{quality_table.fd(RESULTS[row]):.2f}"

    text = flat("docs/evaluate.md")
    euler, euler_half, plain, half, whole = (
        found(*each)
        for each in (("euler", 1.5, 0), ("euler", 1.5, 0.5), ("dpmpp_2m", 1.5, 0), ("dpmpp_2m", 1.5, 0.5), ("dpmpp_2m", 1.5, 1))
    )
    assert f"from {euler} to {euler_half} with `euler` and from {plain} to {half} with `dpmpp_2m`; at its full scales" in text
    assert f"raises the latter to {whole}." in text
    at_three = {r.directions: quality_table.fd(RESULTS[r]) for r in RESULTS
                if (r.model, r.sampler, r.cond_scale) == ("emoji", "dpmpp_2m", 3.0)}  # fmt: skip
    assert len(at_three) == 5 and min(at_three, key=at_three.get) == ()


def test_the_evaluation_page_says_where_guidance_does_not_help():
    text = flat("docs/evaluate.md")
    seg = " and ".join(f"{over_equal('emoji', sampler, 'SEG'):.2f}" for sampler in quality_table.MAIN)
    assert f"with equal evaluations ({seg} times its FD), and its recall is lower" in text
    euler, dpmpp = (f"{over_equal('emoji', sampler, 'skipping'):.2f}" for sampler in quality_table.MAIN)
    assert f"worse with `euler` ({euler}) and better with `dpmpp_2m` ({dpmpp})" in text
    assert f"with equal evaluations ({over_equal('emoji-flow', 'dpmpp_2m', 'SAG'):.2f})" in text
    exact, one = (f"{over_equal('emoji', 'dpmpp_2m', method, judge=1):.2f}" for method in ("SAG", "SAG, one pass"))
    assert f"({exact} and, in one pass, {one} times the FD at equal evaluations)" in text
    assert f"less from PAG on the transformer ({over_equal('emoji-flow', 'dpmpp_2m', 'PAG', judge=1):.2f})" in text
    for sampler in quality_table.MAIN:
        assert mean_fd(main_rows("emoji-flow", sampler, "SAG + PAG")) > mean_fd(main_rows("emoji-flow", sampler, "PAG"))
    methods = methods_of(CHOICE["emoji"]).keys() - {"SAG + PAG"}
    plain = mean_fd(main_rows("emoji", "dpmpp_2m", "plain"))
    assert mean_fd(main_rows("emoji", "euler", "SAG + PAG")) < plain < min(mean_fd(main_rows("emoji", "euler", m)) for m in methods)
    strong = {("PAG", (("attention", "transformer_blocks.3.attn"), ("scale", 1.0), ("sigma_range", (0.1, 12.0))))}
    (row,) = (row for row in RESULTS if set(row.directions) == strong and (row.sampler, row.seeds) == ("euler", 2))
    low, high = (quality_table.fd(RESULTS[each]) for each in (row.plain, row))
    assert f"PAG at 1.0 in block 3 raises FD from {low:.1f} to {high:.1f} with `euler`" in text
    guided, equal = (quality_table.seconds(RESULTS[main_rows("emoji-flow", "euler", m)[0]]) for m in ("SAG", "plain, 35 steps"))
    assert f"{guided:.2f} s with SAG against {equal:.2f} s for 1,000 pictures" in text


def test_the_page_says_what_the_blocks_of_the_transformer_do():
    lines = quality_table.block_table(RESULTS, CHOICE, "emoji-flow").splitlines()[2:]
    ratios = [
        [tuple(map(float, cell.split(", "))) for cell in line.split(" | ")[1:]] for line in (line.strip(" |") for line in lines)
    ]
    assert [block for block, row in enumerate(ratios) if statistics.mean(row[2]) < 1] == [5, 6]  # where PAG helps
    assert all(0.93 < ratio < 1.05 for row in ratios for ratio in row[0])  # SAG
    assert (
        min(range(8), key=lambda block: sum(ratios[block][0])) == 2 and min(range(8), key=lambda block: sum(ratios[block][1])) == 2
    )
    assert all(sum(row[1]) < sum(row[0]) for row in ratios)  # one pass is better in every block


def test_the_page_says_how_the_settings_were_chosen():
    tried = {model: {name: method["tried"] for name, method in CHOICE[model]["methods"].items()} for model in CHOICE}
    assert set(tried["emoji"].values()) == {4}
    assert tried["emoji-flow"].pop("SAG + PAG") == 10 and set(tried["emoji-flow"].values()) == {12}
    minutes = [sum(sum(r["seconds"]) for row, r in RESULTS.items() if (row.seeds == 1) == first) / 60 for first in (True, False)]
    assert "sampling takes {:.0f} minutes for the choice and {:.0f} for the rows".format(*minutes) in flat("docs/evaluate.md")


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
