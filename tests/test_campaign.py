"""Random models, shapes, dtypes, nestings and settings against the formulas. scripts/campaign.py runs more cases."""

import inspect
import itertools

import pytest
import torch

import ksag.attention.edit
import ksag.guidance.pag
import ksag.guidance.sag
import ksag.guidance.seg
from ksag import cfg
from tests import campaign

SEED, CASES = 0, 1000
FAST, SLOW = 30, 200


@pytest.mark.parametrize("numbers", [range(FAST), pytest.param(range(FAST, SLOW), marks=pytest.mark.slow)], ids=["few", "many"])
def test_each_case_is_the_reference(numbers):
    outcomes = [campaign.run(SEED, number) for number in numbers]
    failed = [outcome.message for outcome in outcomes if outcome.kind == campaign.FAILED]
    assert not failed, "\n".join(failed)
    assert any(outcome.kind.startswith("PAG") for outcome in outcomes)


def test_the_cases_meet_everything():
    cases = [campaign.case(SEED, number) for number in range(CASES)]
    scenes, drawn = [case.scene for case in cases], [direction for case in cases for direction in case.directions]
    met = {(scene.name, path) for case, scene in zip(cases, scenes, strict=True) for d in case.directions for path in d.layers}
    assert met == {(name, path) for name in campaign.MODELS for path in campaign.layers(name)}
    assert {scene.dtype for scene in scenes} == set(campaign.TOLERANCE)
    assert {scene.nesting for scene in scenes if scene.cond is not None} == set(campaign.NESTINGS)
    assert {name for scene in scenes for name in scene.keywords} == {"shift", "residuals", "table"}
    assert {cfg.shown(case.settings["cfg_rule"]).partition("(")[0] for case in cases} == {"plain", "rescale", "apg", "own_rule"}
    assert {side % 2 for scene in scenes for side in scene.x.shape[2:]} == {0, 1}
    assert any(len(set(scene.sigma.tolist())) > 1 for scene in scenes)
    assert {tuple(sorted(d.kind for d in case.directions)) for case in cases} == {
        tuple(sorted(kinds)) for kinds in campaign.COMBINATIONS
    }
    assert {(case.handle, case.calls) for case in cases} >= {(h, n) for h in ("direct", "run", "interleaved") for n in (1, 2, 5)}
    given = {"inner_model", "directions", "check_attention", *cases[0].settings}
    assert given == inspect.signature(ksag.GuidedDenoiser).parameters.keys()
    for kind, cls in campaign.KINDS.items():
        settings = {name for d in drawn if d.kind == kind for name in d.settings}
        assert settings | {"attention"} == inspect.signature(cls).parameters.keys()


CHEAP = ("k-diffusion, one level", "k-diffusion transformer v1", "sequences", "videos", "Stable Diffusion 3", "Flux")


def failures(kind, count, wanted=lambda direction: True):
    """The failing cases among the first `count` of small models with such a direction."""
    cases = (campaign.case(SEED, number) for number in range(CASES))
    cheap = (c for c in cases if c.scene.name in CHEAP and c.scene.dtype in (torch.float32, torch.float64))
    with_it = (c.number for c in cheap if any(d.kind == kind and wanted(d) for d in c.directions))
    return [number for number in itertools.islice(with_it, count) if campaign.run(SEED, number).kind == campaign.FAILED]


def exact(direction):
    """Whether it acts with a mask of its own."""
    settings = direction.settings
    return settings["scale"] and settings["sigma_range"][0] == 0 and 0.5 < settings.get("mask_threshold", 1) < 1.5


def test_a_mask_with_another_threshold_fails(monkeypatch):
    mask = ksag.guidance.sag.attention_mask
    monkeypatch.setattr(
        ksag.guidance.sag, "attention_mask", lambda saliency, threshold, size: mask(saliency, threshold + 0.1, size)
    )
    assert len(failures("SAG", 8, exact)) > 2


def test_a_saliency_that_is_a_thousandth_off_fails(monkeypatch):
    saliency = ksag.attention.edit.saliency
    monkeypatch.setattr(ksag.attention.edit, "saliency", lambda *args, **kwargs: saliency(*args, **kwargs) * 1.001)
    assert len(failures("SAG", 6, exact)) > 2


def test_a_blur_that_is_a_ten_thousandth_off_fails(monkeypatch):
    degrade = ksag.guidance.sag.degrade
    monkeypatch.setattr(ksag.guidance.sag, "degrade", lambda *args: degrade(*args) * (1 + 1e-4))
    assert len(failures("SAG", 16, exact)) > 2


def test_a_perturbed_attention_that_is_a_thousandth_off_fails(monkeypatch):
    monkeypatch.setattr(ksag.guidance.pag, "identity", lambda attention: attention.image_values * 1.001)
    assert len(failures("PAG", 6, exact)) > 2


def test_queries_with_another_blur_fail(monkeypatch):
    monkeypatch.setattr(ksag.guidance.seg, "kernel_sizes", lambda sigma, grid: (3,) * len(grid))
    assert len(failures("SEG", 8, lambda d: exact(d) and 1 <= d.settings["blur_sigma"] < 20)) > 2


def test_an_error_is_a_failure_and_prints_the_line_that_runs_the_case_again(monkeypatch):
    monkeypatch.setattr(ksag.guidance.sag, "degrade", lambda *args: 1 / 0)
    number = failures("SAG", 5)[0]
    outcome = campaign.run(SEED, number)
    assert (
        "ZeroDivisionError" in outcome.message and f"again: python scripts/campaign.py --seed 0 --case {number}" in outcome.message
    )


def test_a_case_is_the_same_each_time():
    first, _ = campaign.image(campaign.case(SEED, 7))
    campaign.scene.cache_clear()
    campaign.wrapper.cache_clear()
    again, _ = campaign.image(campaign.case(SEED, 7))
    assert torch.equal(first, again)


def test_the_report_counts_outcomes_and_takes_the_largest_error_of_each_dtype():
    cases = [campaign.case(SEED, number) for number in range(2)]
    dtype = cases[0].scene.dtype
    outcomes = [campaign.Outcome("plain", 1e-7), campaign.Outcome("plain", 3e-7)]
    assert campaign.report(zip(cases, outcomes, strict=True)) == f"     2 plain\nlargest relative error: 3.0e-07 in {dtype}"
