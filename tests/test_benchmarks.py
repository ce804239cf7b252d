"""The figures in the README and on the pages are those that benchmarks/gpu.json and benchmarks/quality.jsonl hold."""

import json
import re
import statistics

import gpu
import pytest
import quality_plan
import quality_table
from overhead import FLOORS
from quality_plan import OTHERS, changed, methods_of, plain_at, recommended
from quality_rows import frozen

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
    one, exact = ([f"{over_plain(model, form, gpu.EAGER):.1f}" for model in gpu.UNETS] for form in (gpu.ONE, gpu.EXACT))
    assert len(set(one)) == 1 and f"SAG in one pass takes about {one[0]} times as long as plain guidance on the UNets" in text
    assert f"and exact SAG {min(exact)} to {max(exact)} times" in text
    added = [100 * over_floor(model, form) - 100 for model in gpu.UNETS for form in gpu.FLOORS]
    assert f"With CUDA graphs at batch 1, ksag adds {min(added):.0f} to {max(added):.0f} % to the floor on the UNets" in text
    sd3, sd3_one, flux = (100 * over_floor(*each) - 100 for each in
                          (("SD3 medium", gpu.EXACT), ("SD3 medium", gpu.ONE), ("Flux dev", gpu.EXACT)))  # fmt: skip
    assert f"{sd3:.0f}" == f"{sd3_one:.0f}" and f"On SD3, SAG takes {sd3:.0f} % more than the bare passes, also in one pass" in text
    assert f"on Flux it takes {flux:.0f} % more" in text
    pag = [100 * over_floor(model, gpu.PAG) - 100 for model in gpu.TRANSFORMERS]
    assert all(abs(percent) < 0.5 for percent in pag) and "PAG adds less than 0.5 % on either." in text
    small = BATCH_ONE["SD 1.5"]
    exact, one = (ratio(small, gpu.PIPELINE, gpu.key(form, gpu.EAGER)) for form in (gpu.EXACT, gpu.ONE))
    low, _, high = gpu.quartiles(small["times"], gpu.PIPELINE, gpu.key(gpu.ONE, gpu.GRAPHED))
    assert abs(exact - 1) < 0.1 and f"exact SAG on Stable Diffusion 1.5, about {one:.1f} times as long as one pass" in text
    assert f"and {low:.0f} to {high:.0f} times as long as one pass with CUDA graphs" in text
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
    every = [rows for model in CHOICE for sampler in quality_table.MAIN
             for _, rows in quality_table.main_rows(RESULTS, CHOICE, model, sampler)]  # fmt: skip
    assert all([row.seeds for row in rows] == [2, 3, 4] for rows in every)  # "three sets of seeds"
    assert max(abs(quality_table.fd(RESULTS[row]) / mean_fd(rows) - 1) for rows in every for row in rows) < 0.035


def test_the_parameters_page_starts_from_measured_settings():
    def falls(model, sampler, method):
        return " → ".join(f"{mean_fd(main_rows(model, sampler, m)):.1f}" for m in ("plain", method))

    rows = [row for row in page("docs/parameters.md").splitlines() if "FD " in row and row.startswith("|")]
    of_rows = (("emoji", "SAG + PAG"), ("emoji", "PAG"), ("emoji-flow", "SAG, one pass"), ("emoji-flow", "PAG"))
    for row, (model, method) in zip(rows, of_rows, strict=True):
        assert f"FD {falls(model, 'euler', method)} with `euler`, {falls(model, 'dpmpp_2m', method)} with `dpmpp_2m`" in row


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
            assert (over < 1) == (e > evaluations), (model, method, e)

    def reaches(model, method):
        curves = quality_table.along(RESULTS, CHOICE, model, "dpmpp_2m")
        return quality_table.reaches(curves[method], quality_table.fd(curves["plain"][64]))

    unet, both, flow = (f"{reaches(*each):.0f}" for each in (("emoji", "PAG"), ("emoji", "SAG + PAG"), ("emoji-flow", "PAG")))
    text = flat("docs/evaluate.md")
    assert f"PAG reaches the FD of 64 plain steps with {unet} evaluations, and SAG + PAG with {both}." in text
    assert f"On the transformer, PAG needs {flow}." in text
    curves = quality_table.along(RESULTS, CHOICE, "emoji", "dpmpp_2m_sde")
    lowest = {method: min(curve.values(), key=quality_table.fd) for method, curve in curves.items()}
    best = min(lowest, key=lambda method: quality_table.fd(lowest[method]))
    one, plain = (f"{quality_table.fd(lowest[m]):.2f} with {lowest[m]['evaluations']:g}" for m in (best, "plain"))
    assert best == "SAG, one pass" and f"in one pass {one} evaluations, where plain sampling has {plain}." in text
    for sag in "SAG", "SAG, one pass":
        for steps, result in curves[sag].items():
            first, second = ([quality_table.judged(r, i)["fd"] for r in (result, curves["PAG"][steps])] for i in (0, 1))
            assert (first[0] < first[1]) == (result["evaluations"] > 20)
            assert second[0] > second[1] or result["evaluations"] < 34
    assert "By the second judge, below, PAG is better from 34 evaluations on." in text
    for method, evaluations in (("SAG", 69), ("SAG, one pass", 46)):  # "worse than plain sampling with many evaluations"
        assert {e for e, over in over_curve("emoji", "dpmpp_2m", method).items() if over > 1 and e > 20} == {
            e for e in over_curve("emoji", "dpmpp_2m", method) if e >= evaluations
        }


def other_samplers(model, judge=0):
    """FD over that of plain sampling at equal evaluations, by sampler."""
    best, found = recommended(CHOICE[model]), {}
    for row, result in RESULTS.items():
        few = (row.model, row.directions, row.cond_scale, row.n) == (model, best, None, quality_table.FEW)
        if few and row.steps == OTHERS.get(row.sampler) and row.sampler != "dpm_adaptive":
            found[row.sampler] = quality_table.judged(result, judge)["fd"] / quality_table.judged(RESULTS[row.equal], judge)["fd"]
    return found


def test_the_page_says_what_other_samplers_do():
    text, found = flat("docs/evaluate.md"), other_samplers("emoji")
    worse = {sampler: over for sampler, over in found.items() if over > 1}
    assert worse.keys() == {"lms", "dpm_2_ancestral", "dpmpp_3m_sde"} and len(found) == 10
    better = sorted(over for over in found.values() if over < 1)
    assert f"to between {better[0]:.2f} times (`euler_ancestral`) and {better[-1]:.2f} times" in text
    lms, ancestral, three = (f"{worse[sampler]:.2f}" for sampler in ("lms", "dpm_2_ancestral", "dpmpp_3m_sde"))
    assert f"`lms` ({lms} times), `dpm_2_ancestral` ({ancestral}) and `dpmpp_3m_sde` ({three})" in text
    flow = other_samplers("emoji-flow")
    without_noise = [over for sampler, over in flow.items() if not sampler.endswith(("sde", "ancestral"))]
    assert f"to between {min(without_noise):.2f} and {max(without_noise):.2f} times" in text and flow["euler_ancestral"] < 1
    assert sum(over > 1 for over in flow.values()) == 4 and len(flow) - len(without_noise) == 6  # "with most of the others"
    second = other_samplers("emoji-flow", judge=1)
    assert all(second[sampler] > 1 for sampler in ("dpm_2", "dpm_fast", "heun"))
    (row,) = (row for row in RESULTS if (row.model, row.sampler, row.steps) == ("emoji-flow", "dpmpp_2m_sde", 24)
              and row.directions == methods_of(CHOICE["emoji-flow"])["SAG, one pass"])  # fmt: skip
    curve = quality_table.along(RESULTS, CHOICE, "emoji-flow", "dpmpp_2m_sde")["plain"].values()
    plain = plain_at(RESULTS[row]["evaluations"], {result["evaluations"]: quality_table.fd(result) for result in curve})
    one = f"its FD is {quality_table.fd(RESULTS[row]):.2f} with {RESULTS[row]['evaluations']:g} evaluations"
    assert f"{one}; plain sampling with {RESULTS[row]['evaluations']:g} has about {plain:.1f}." in text


def test_the_page_says_what_classifier_free_guidance_leaves():
    def found(model, sampler, cond_scale, way):
        (row,) = (r for r in RESULTS if (r.model, r.sampler, r.cond_scale, r.directions) == (model, sampler, cond_scale, way))
        return quality_table.fd(RESULTS[row])

    text, best = flat("docs/evaluate.md"), recommended(CHOICE["emoji"])
    pag = methods_of(CHOICE["emoji"])["PAG"]
    euler = [f"{found('emoji', 'euler', 1.5, way):.2f}" for way in ((), best, changed(best, 0.5))]
    dpmpp = [f"{found('emoji', 'dpmpp_2m', 1.5, way):.2f}" for way in ((), best, changed(best, 0.5), pag)]
    assert "with `euler`, SAG + PAG lowers FD from {} to {}, and to {} at half its scales".format(*euler) in text
    assert "it raises FD from {} to {}, and lowers it to {} at half its scales. PAG alone raises it to {}.".format(*dpmpp) in text
    at_three = {r.directions: quality_table.fd(RESULTS[r]) for r in RESULTS
                if (r.model, r.sampler, r.cond_scale) == ("emoji", "dpmpp_2m", 3.0)}  # fmt: skip
    assert len(at_three) == 5 and min(at_three, key=at_three.get) == ()
    flow = methods_of(CHOICE["emoji-flow"])
    helps = [
        [found("emoji-flow", s, 1.5, flow[m]) < found("emoji-flow", s, 1.5, ()) for s in quality_table.MAIN] for m in ("PAG", "SAG")
    ]
    assert helps == [[True, True], [True, False]]


def test_the_evaluation_page_says_where_guidance_does_not_help():
    text = flat("docs/evaluate.md")
    seg = " and ".join(f"{over_equal('emoji', sampler, 'SEG'):.2f}" for sampler in quality_table.MAIN)
    assert f"with equal evaluations ({seg} times its FD), and its recall is lower" in text
    euler, dpmpp = (f"{over_equal('emoji', sampler, 'skipping'):.2f}" for sampler in quality_table.MAIN)
    assert f"worse with `euler` ({euler}) and better with `dpmpp_2m` ({dpmpp})" in text
    assert f"with equal evaluations ({over_equal('emoji-flow', 'dpmpp_2m', 'SAG'):.2f})" in text
    exact, one = (f"{over_equal('emoji', 'dpmpp_2m', method, judge=1):.2f}" for method in ("SAG", "SAG, one pass"))
    assert exact == one and f"SAG raises FD ({exact} times, also in one pass)" in text
    euler, dpmpp = ({m: over_equal("emoji-flow", s, m, judge=1) for m in quality_plan.METHODS} for s in quality_table.MAIN)
    assert f"{euler['PAG']:.2f} times the FD with `euler`, {dpmpp['PAG']:.2f} with `dpmpp_2m`, and nothing with" in text
    assert min(euler, key=euler.get) == "SAG, one pass" and f"SAG in one pass with `euler` ({euler['SAG, one pass']:.2f})" in text
    assert min(dpmpp, key=dpmpp.get) == "skipping" and f"skipping a block with `dpmpp_2m` ({dpmpp['skipping']:.2f})" in text
    judges = {model: [len(result["measures"]) for row, result in RESULTS.items() if row.model == model and row.seeds > 1]
              for model in CHOICE}  # fmt: skip
    assert set(judges["emoji"]) == {2}  # "all of the UNet's rows", and of the transformer's "at least two sets of seeds"
    for sampler in quality_table.MAIN:
        for _, rows in quality_table.main_rows(RESULTS, CHOICE, "emoji-flow", sampler):
            assert sum(len(RESULTS[row]["measures"]) == 2 for row in rows) >= 2
    for sampler in quality_table.MAIN:
        unet = sorted(quality_plan.METHODS, key=lambda method, sampler=sampler: over_equal("emoji", sampler, method, judge=1))
        assert set(unet[:2]) == {"PAG", "SAG + PAG"}  # "the best methods too"
    second = other_samplers("emoji", judge=1)
    lost = {sampler: over for sampler, over in second.items() if over > 1}
    assert lost.keys() == {"lms", "dpm_2_ancestral"}
    others = sorted(over for over in second.values() if over < 1)
    lms, ancestral = (f"{lost[sampler]:.2f}" for sampler in ("lms", "dpm_2_ancestral"))
    assert (
        f"to between {others[0]:.2f} and {others[-1]:.2f} times, except with `lms` ({lms}) and `dpm_2_ancestral` ({ancestral})"
        in text
    )
    for sampler in quality_table.MAIN:
        assert mean_fd(main_rows("emoji-flow", sampler, "SAG + PAG")) > mean_fd(main_rows("emoji-flow", sampler, "PAG"))
    methods = methods_of(CHOICE["emoji"]).keys() - {"SAG + PAG"}
    plain = mean_fd(main_rows("emoji", "dpmpp_2m", "plain"))
    assert mean_fd(main_rows("emoji", "euler", "SAG + PAG")) < plain < min(mean_fd(main_rows("emoji", "euler", m)) for m in methods)
    way = dict(CHOICE["emoji-flow"]["methods"]["PAG"]["directions"])["PAG"]
    of_choice = {row.directions: row for row in RESULTS if (row.model, row.sampler, row.seeds) == ("emoji-flow", "dpmpp_2m", 1)}
    at = {scale: quality_table.fd(RESULTS[of_choice[(("PAG", frozen({**dict(way), "scale": scale})),)]]) for scale in (0.3, 0.6)}
    assert f"0.6 raises FD with `dpmpp_2m` from {at[0.3]:.1f} to {at[0.6]:.1f}" in text

    def longer(model, method, sampler="euler"):
        row = main_rows(model, sampler, method)[0]
        return 100 * quality_table.seconds(RESULTS[row]) / quality_table.seconds(RESULTS[row.equal]) - 100

    unet = [longer("emoji", m, s) for m in ("SAG", "SAG, one pass", "PAG", "SAG + PAG") for s in quality_table.MAIN]
    assert f"On the UNet, guided sampling takes {min(unet):.0f} to {max(unet):.0f} % longer" in text
    assert (
        "PAG takes {:.0f} % longer, SAG {:.0f} % and both together {:.0f} %".format(
            *(longer("emoji-flow", m) for m in ("PAG", "SAG", "SAG + PAG"))
        )
        in text
    )


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


def test_the_page_says_how_long_the_report_takes():
    def minutes(choice, *models):
        return sum(sum(r["seconds"]) for row, r in RESULTS.items() if (row.seeds == 1) == choice and row.model in models) / 60

    of_choice, of_report = (f"{minutes(choice, *CHOICE):.0f}" for choice in (True, False))
    unet, flow = (f"{minutes(False, model):.0f}" for model in CHOICE)
    text = f"sampling takes {of_choice} minutes for the choice and {of_report} for the report: {unet} for the UNet and {flow} for"
    assert text in flat("docs/evaluate.md")


def test_every_guided_row_was_measured_without_broken_samples():
    assert sum(result["not_finite"] for result in RESULTS.values()) == 0


def test_the_performance_page_has_the_overhead_on_a_cpu():
    times = json.loads((ROOT / "benchmarks/overhead.json").read_text())["seconds"]

    def medians(over, *names):
        return [f"{statistics.median(a / b for a, b in zip(times[n], times[over or FLOORS[n]], strict=True)):.2f}" for n in names]

    forms = "SAG", "SAG, one_pass", "PAG", "SAG, one_pass + PAG"
    exact, one, pag, both = medians("", *forms)
    assert f"the medians of {len(times['SAG'])} rounds over the floor" in flat("docs/performance.md")
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
