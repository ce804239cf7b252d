"""The figures in the README and on the pages are those that benchmarks/gpu.json and benchmarks/quality.jsonl hold."""

import itertools
import json
import math
import re
import statistics

import gpu
import pytest
import quality_plan
import quality_table
from overhead import FLOORS
from quality_plan import OTHERS, changed, methods_of, plain_at, recommended
from quality_rows import FLOWS, frozen, to_sample

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


def mean_fd(rows, judge=0):
    return statistics.mean(quality_table.judged(RESULTS[row], judge)["fd"] for row in rows)


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
    names = {"UNet": "emoji", "first transformer": "emoji-flow", "second transformer": "emoji-flow-2"}
    rows = re.findall(r"^\| (UNet|\w+ transformer), `(\w+)`, (.*?) \| (.* \| .* \| .*) \|$", page("docs/evaluate.md"), re.M)
    assert len(rows) == 8
    for model, sampler, method, cells in rows:
        assert cells == fd_cells(names[model], sampler, method.replace(" in one pass", ", one pass"))
    every = [rows for model in CHOICE for sampler in quality_table.MAIN
             for _, rows in quality_table.main_rows(RESULTS, CHOICE, model, sampler)]  # fmt: skip
    assert all([row.seeds for row in rows] == [2, 3, 4] for rows in every)  # "three sets of seeds"
    for rows in every:
        most = 0.05 if rows[0].model == "emoji-flow-2" else 0.035  # "within 4 %, and within 5 % on the second transformer"
        assert max(abs(quality_table.fd(RESULTS[row]) / mean_fd(rows) - 1) for row in rows) < most


def test_the_parameters_page_starts_from_measured_settings():
    def falls(models, sampler, method):
        fds = [[f"{mean_fd(main_rows(model, sampler, m)):.1f}" for m in ("plain", method)] for model in models]
        return " and ".join(" → ".join(pair) for pair in fds)

    rows = [row for row in page("docs/parameters.md").splitlines() if "FD " in row and row.startswith("|")]
    for row, (models, method) in zip(rows, ((["emoji"], "SAG + PAG"), (["emoji"], "PAG"), (FLOWS, "SEG")), strict=True):
        assert f"FD {falls(models, 'euler', method)} with `euler`, {falls(models, 'dpmpp_2m', method)} with `dpmpp_2m`" in row
    for model, block in zip(FLOWS, (2, 3), strict=True):
        ((_, settings),) = methods_of(CHOICE[model])["SEG"]
        scale, low_high = dict(settings)["scale"], dict(settings)["sigma_range"]
        seg = f"`ksag.SEG({scale}, sigma_range={low_high}, attention=…)`"
        assert f"{seg} in block 2 of the first and block 3 of the second, of 8 each" in rows[-1]
        assert dict(settings)["attention"] == f"transformer_blocks.{block}.attn"


def over_curve(model, sampler, method):
    """By evaluations: FD over that of plain sampling with as many, interpolated."""
    curves = quality_table.along(RESULTS, CHOICE, model, sampler)
    plain = {result["evaluations"]: quality_table.fd(result) for result in curves["plain"].values()}
    return {r["evaluations"]: quality_table.fd(r) / plain_at(r["evaluations"], plain) for r in curves[method].values()}


def test_the_picture_shows_what_the_page_says():
    text = flat("docs/evaluate.md")
    assert max(over_curve("emoji", "euler", "PAG").values()) < 1
    second = "SEG is better from {} evaluations on, SAG in one pass from {} on, SAG and PAG from {} on, and SAG + PAG from {} on."
    places = {"SEG": 18, "SAG, one pass": 24, "SAG": 47, "SAG + PAG": 62, "PAG": 47}
    assert f"{second.format(*list(places.values())[:4])} PAG is about equal at 35." in text
    for model, method, evaluations in (
        ("emoji", "SAG", 20), ("emoji", "SAG + PAG", 20), ("emoji-flow", "SAG", 20), ("emoji-flow", "PAG", 20),
        ("emoji-flow", "SAG + PAG", 40), *(("emoji-flow-2", *place) for place in places.items()),
    ):  # fmt: skip
        for e, over in over_curve(model, "euler", method).items():
            assert (over < 1) == (e >= evaluations), (model, method, e)
    assert over_curve("emoji-flow-2", "euler", "PAG")[35] == pytest.approx(1, abs=0.005)

    def reaches(model, method):
        curves = quality_table.along(RESULTS, CHOICE, model, "dpmpp_2m")
        return f"{quality_table.reaches(curves[method], quality_table.fd(curves['plain'][64])):.0f}"

    unet, both = reaches("emoji", "PAG"), reaches("emoji", "SAG + PAG")
    assert f"PAG reaches the FD of 64 plain steps with {unet} evaluations, and SAG + PAG with {both}." in text
    plain, seg = reaches("emoji-flow-2", "plain"), reaches("emoji-flow-2", "SEG")
    assert f"On the first transformer, PAG needs {reaches('emoji-flow', 'PAG')}." in text
    assert f"On the second, SEG needs {seg}, but plain sampling needs only {plain}." in text


def test_the_page_says_what_dpmpp_2m_sde_reaches():
    def lowest(model, judge=0):
        curves = quality_table.along(RESULTS, CHOICE, model, "dpmpp_2m_sde")
        found = {method: min((quality_table.judged(result, judge)["fd"], result["evaluations"]) for result in curve.values())
                 for method, curve in curves.items()}  # fmt: skip
        return found, min(found, key=found.get)

    for model, name in zip(CHOICE, ("UNet", "first transformer", "second transformer"), strict=True):
        found, best = lowest(model)
        (plain, steps), (one, e) = found["plain"], found["SAG, one pass"]
        assert best == "SAG, one pass"
        assert (
            f"\n| {name} | {plain:.2f} with {steps:g}{' evaluations' if name == 'UNet' else ''} | {one:.2f} with {e:g} |\n"
            in page("docs/evaluate.md")
        )
    for model, method, most in (("emoji", "PAG", 17), ("emoji-flow-2", "SEG", 24)):  # "with few evaluations"
        curves = quality_table.along(RESULTS, CHOICE, model, "dpmpp_2m_sde")
        for steps, result in curves[method].items():
            better = quality_table.fd(result) < quality_table.fd(curves["SAG, one pass"][steps])
            assert better == (result["evaluations"] <= most)
    assert "PAG is better on the UNet (up to 17) and SEG on the second transformer (up to 24)" in flat("docs/evaluate.md")
    assert lowest("emoji", judge=1)[1] == "PAG"


def test_the_page_says_where_sag_is_worse_with_many_evaluations():
    assert "in one pass from 46 evaluations on, and exact SAG from 69 on." in flat("docs/evaluate.md")
    for method, evaluations in (("SAG", 69), ("SAG, one pass", 46)):
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
    seg = other_samplers("emoji-flow-2")
    better = sorted(over for over in seg.values() if over < 1)
    assert {sampler for sampler, over in seg.items() if over > 1} == {"dpm_2_ancestral"} and len(better) == 9
    spread = f"with nine of the ten, to between {better[0]:.2f} and {better[-1]:.2f} times"
    assert f"{spread}; it raises FD with `dpm_2_ancestral` ({seg['dpm_2_ancestral']:.2f})." in text


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

    def helps(model, method):
        way = methods_of(CHOICE[model])[method]
        return [found(model, sampler, 1.5, way) < found(model, sampler, 1.5, ()) for sampler in quality_table.MAIN]

    assert helps("emoji-flow", "PAG") == [True, True] and helps("emoji-flow", "SAG") == [True, False]
    assert all(helps("emoji-flow-2", method) == [True, True] for method in ("SEG", "PAG", "SAG"))
    for model, sampler in itertools.product(CHOICE, quality_table.MAIN):
        assert found(model, sampler, 3.0, ()) > found(model, sampler, 1.5, ())


def test_the_evaluation_page_says_where_guidance_does_not_help():
    text = flat("docs/evaluate.md")
    seg = " and ".join(f"{over_equal('emoji', sampler, 'SEG'):.2f}" for sampler in quality_table.MAIN)
    assert f"with equal evaluations ({seg} times its FD), and its recall is lower" in text
    euler, dpmpp = (f"{over_equal('emoji', sampler, 'skipping'):.2f}" for sampler in quality_table.MAIN)
    assert f"worse with `euler` ({euler}) and better with `dpmpp_2m` ({dpmpp})" in text
    both = [over_equal("emoji-flow-2", "euler", "SAG + PAG", judge) for judge in (0, 1)]
    assert (
        "SAG + PAG is worse than plain sampling with equal evaluations ({:.2f}, and {:.2f} by the second judge).".format(*both)
        in text
    )
    (first, one), (second, two) = (
        [over_equal(*place, "SAG", judge) for judge in (0, 1)] for place in (("emoji-flow", "dpmpp_2m"), ("emoji-flow-2", "euler"))
    )
    exact = f"on the first transformer with `dpmpp_2m` ({first:.2f}) and on the second with `euler` ({second:.2f})"
    assert f"Exact SAG is worse {exact}, but not by the second judge." in text and max(one, two) < 1
    exact, one = (f"{over_equal('emoji', 'dpmpp_2m', method, judge=1):.2f}" for method in ("SAG", "SAG, one pass"))
    assert exact == one and f"SAG raises FD ({exact} times, also in one pass)" in text
    judges = {model: [len(result["measures"]) for row, result in RESULTS.items() if row.model == model and row.seeds > 1]
              for model in CHOICE}  # fmt: skip
    assert set(judges["emoji"] + judges["emoji-flow-2"]) == {2}  # "all rows", and of the first transformer "at least two sets"
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
    for model in CHOICE:  # "`dpmpp_2m` without guidance is better than `euler` with any method, except SAG + PAG on the UNet"
        plain = mean_fd(main_rows(model, "dpmpp_2m", "plain"))
        better = {m for m in methods_of(CHOICE[model]) if mean_fd(main_rows(model, "euler", m)) < plain}
        assert better == ({"SAG + PAG"} if model == "emoji" else set())
    for model, methods in (("emoji", ("PAG", "SAG + PAG")), ("emoji-flow-2", ("SEG",))):  # but by the second judge
        for method in methods:
            assert mean_fd(main_rows(model, "euler", method), 1) < mean_fd(main_rows(model, "dpmpp_2m", "plain"), 1)
    way = dict(CHOICE["emoji-flow"]["methods"]["PAG"]["directions"])["PAG"]
    of_choice = {row.directions: row for row in RESULTS if (row.model, row.sampler, row.seeds) == ("emoji-flow", "dpmpp_2m", 1)}
    at = {scale: quality_table.fd(RESULTS[of_choice[(("PAG", frozen({**dict(way), "scale": scale})),)]]) for scale in (0.3, 0.6)}
    plain = quality_table.fd(RESULTS[next(row.plain for row in of_choice.values() if row.directions and row.plain in RESULTS)])
    fds = f"has an FD of {at[0.3]:.1f}, and 0.6 has {at[0.6]:.1f}, where plain sampling has {plain:.1f}."
    assert f"with `dpmpp_2m`, a PAG scale of 0.3 {fds}" in text

    def longer(model, method, sampler="euler"):
        row = main_rows(model, sampler, method)[0]
        return 100 * quality_table.seconds(RESULTS[row]) / quality_table.seconds(RESULTS[row.equal]) - 100

    unet, first, second = (
        "{:.0f} to {:.0f} %".format(
            *(end(longer(model, m, s) for m in quality_plan.METHODS for s in quality_table.MAIN) for end in (min, max))
        )
        for model in CHOICE
    )
    assert (
        f"guided sampling on the UNet takes {unet} longer" in text
        and f"On the second transformer, it takes {second} longer" in text
    )
    assert f"before its parts were compiled, and take {first} longer." in text


def test_the_page_compares_two_trainings_of_the_transformer():
    names = {"SAG in one pass": "SAG, one pass", "skipping a block": "skipping"}
    rows = re.findall(r"^\| ([^|`]+) \| (\d[^|]* \([^|]*\) \|.*) \|$", page("docs/evaluate.md"), re.M)
    places = list(itertools.product(FLOWS, quality_table.MAIN))
    found = {}
    for name, cells in rows:
        found[name] = [[over_equal(*place, names.get(name, name), judge) for judge in (0, 1)] for place in places]
        assert cells == " | ".join(f"{first:.2f} ({second:.2f})" for first, second in found[name]), name
    assert found.keys() == {"SAG", "SAG in one pass", "PAG", "SEG", "skipping a block", "SAG + PAG"}
    text = flat("docs/evaluate.md")
    assert all(over < 1 for name in ("SEG", "skipping a block") for place in found[name] for over in place)  # "everywhere"
    one, pag, both = found["SAG in one pass"], found["PAG"], found["SAG + PAG"]
    assert all(over < 0.95 for place in one[::2] for over in place) and all(over < 1 for place in one[1::2] for over in place)
    most = 100 * (1 - min(over for place in one[1::2] for over in place))
    assert f"SAG in one pass does so too, but by at most {most:.0f} % with `dpmpp_2m`." in text
    assert all(over < 0.98 for place in pag[:2] for over in place) and all(
        0.96 < over < 1.02 for place in pag[2:] for over in place
    )
    assert all(
        second > first for i in range(4) for first, second in zip(pag[i], both[i], strict=True)
    )  # "gains less than PAG alone"
    for name in "SEG", "skipping a block":
        assert all(found[name][i][1] < pag[i][1] for i in range(4))  # by the second judge
    apart = [
        max(100 * abs(math.log(places[i + 2][judge] / places[i][judge])) for places in found.values() for i in (0, 1))
        for judge in (0, 1)
    ]
    apart = [100 * (math.exp(percent / 100) - 1) for percent in apart]
    assert "by up to {:.0f} %, and by up to {:.0f} % by the second judge.".format(*apart) in text


def blocks(model):
    """By block and method: FD over that of plain sampling at equal evaluations, with both samplers."""
    lines = quality_table.block_table(RESULTS, CHOICE, model).splitlines()
    cells = [line.strip(" |").split(" | ")[1:] for line in lines[2:]]
    return [[tuple(map(float, cell.split(", "))) for cell in row] for row in cells]


def test_the_page_says_what_the_blocks_of_the_transformers_do():
    def helps(model, column):  # averaged over both samplers
        return [block for block, row in enumerate(found[model]) if statistics.mean(row[column]) < 1]

    found = {model: blocks(model) for model in FLOWS}
    (first, second), text = FLOWS, flat("docs/evaluate.md")
    _, one, pag, seg, skipping = range(5)  # the columns
    assert (
        "PAG at 0.3 helps in blocks {} and {} of the first transformer and in no block of the second.".format(*helps(first, pag))
        in text
    )
    assert not helps(second, pag) and sorted({*helps(first, seg)} & {*helps(second, seg)}) == [2, 4]
    assert "SEG at 0.3 helps in blocks 2 and 4 of both" in text
    assert "SAG in one pass at 1.4 helps in every block of the first, and hardly in any of the second." in text
    assert helps(first, one) == [*range(8)] and min(statistics.mean(row[one]) for row in found[second]) > 0.98
    for rows in found.values():
        assert sum(row[seg][1] > 1 for row in rows) > 4  # with dpmpp_2m "in most blocks"
        for column in pag, seg, skipping:  # "in the last block"
            assert max(range(8), key=lambda block, rows=rows, column=column: sum(rows[block][column])) == 7
        assert statistics.mean(rows[4][seg]) < 1 < min(rows[4][pag])  # "middle"


def test_the_page_says_how_the_settings_were_chosen():
    tried = {model: {name: method["tried"] for name, method in CHOICE[model]["methods"].items()} for model in CHOICE}
    text = flat("docs/evaluate.md")
    assert (
        set(tried["emoji"].values()) == {4} and "the same for each method: four on the UNet and twelve on each transformer." in text
    )
    exceptions = "SAG + PAG, with ten on the first transformer and six on the second, and exact SAG on the second, with eleven"
    assert [tried[model].pop("SAG + PAG") for model in FLOWS] == [10, 6] and tried["emoji-flow-2"].pop("SAG") == 11
    assert exceptions in text and all(set(tried[model].values()) == {12} for model in FLOWS)
    worse = {name for name, method in CHOICE["emoji-flow-2"]["methods"].items() if method["score"] > 0}
    assert worse == {"SAG", "SAG + PAG"}  # "no setting of exact SAG or of SAG + PAG was better"


def test_the_page_says_how_long_the_report_takes():
    models = "emoji", "emoji-flow-2"
    seconds = {model: [RESULTS[row]["seconds"] for row in to_sample(row for row in RESULTS if row.model == model and row.seeds > 1)]
               for model in models}  # fmt: skip
    unet, flow = (sum(map(sum, of_rows)) / 60 for of_rows in seconds.values())
    of_choice = sum(sum(result["seconds"]) for row, result in RESULTS.items() if row.model in models and row.seeds == 1) / 60
    of_report = f"{unet + flow:.0f} for the report: {unet:.0f} for the UNet and {flow:.0f} for the transformer"
    assert f"sampling takes {of_choice:.0f} minutes for the choice and {of_report}" in flat("docs/evaluate.md")


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
