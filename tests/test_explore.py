import copy
import gc
import html
import io
import re
import subprocess
import sys
import threading
import weakref
from dataclasses import replace

import k_diffusion as K
import pytest
import torch
from ipywidgets.widgets.widget import _instances
from PIL import Image

import ksag
from ksag import zoo
from ksag.explore import Newest, Session, Settings, explore
from ksag.samplers import SAMPLERS, sample

SHAPE = (3, 16, 16)
SIGMAS = K.sampling.get_sigmas_karras(4, 0.1, 20.0)
STEPS = len(SIGMAS) - 1
CLASSES = {"classes": zoo.CLASSES, "conditioning": zoo.conditioning}


@pytest.fixture
def guided(denoiser):
    return ksag.SAGDenoiser(denoiser, 1.5, 2.5, mask_threshold=0.9, cond_key="mapping_cond")


@pytest.fixture
def calls(denoiser):
    """The batch sizes of the model's calls."""
    sizes: list[int] = []
    denoiser.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


@pytest.fixture
def opened(guided):
    """Opens widgets, and closes them at the end."""
    widgets = []

    def open_(**options):
        widgets.append(explore(guided, SHAPE, SIGMAS, **{"sampler": "euler", **options}))
        return widgets[-1]

    yield open_
    for widget in widgets:
        widget.close()


def settled(widget):
    assert widget.wait(60)
    return widget


def pictures(row):
    return [picture.value for picture in row.pictures]


def error(widget):
    return html.unescape(re.sub("<[^>]*>", "", widget._error.value))


# What it shows


def test_the_controls_start_from_the_wrappers_own_settings(opened):
    widget = settled(opened(seed=3, **CLASSES))
    assert widget.settings == Settings(1.5, 2.5, 0.9, "euler", 3, cond_scale=1.0, classes=("airplane", "automobile"))
    assert widget.result.settings == widget.settings and not error(widget)


def test_extra_args_come_first_even_beyond_the_sliders(opened):
    widget = opened(extra_args={"cond_scale": 30, "sag_scale": -3.0}, **CLASSES)
    assert widget.settings.cond_scale == 30.0 and widget.settings.sag_scale == -3.0


def test_the_sliders_win_over_extra_args(opened):
    widget = opened(extra_args={"sag_scale": 3.0}, **CLASSES)
    settled(widget).controls["sag_scale"].value = 0.0
    assert torch.equal(settled(widget).result.guided, widget.result.plain)


def test_it_shows_plain_and_guided_from_the_same_noise(opened, guided):
    widget = settled(opened(**CLASSES))
    cond, uncond = zoo.conditioning(["airplane", "automobile"])
    args = {"cond": cond, "uncond": uncond}
    assert torch.equal(widget.result.plain, sample("euler", guided, SHAPE, SIGMAS, [0, 1], {**args, "sag_scale": 0.0}))
    with guided.trace() as steps:
        assert torch.equal(widget.result.guided, sample("euler", guided, SHAPE, SIGMAS, [0, 1], args))
    assert torch.equal(widget.result.mask, torch.stack([step.mask for step in steps]).mean(0))
    assert not torch.equal(widget.result.plain, widget.result.guided)


def test_the_pictures_are_large_and_show_every_sample(opened):
    widget = settled(opened(n=3))
    images = [Image.open(io.BytesIO(png)) for png in pictures(widget._now)]
    assert [image.size for image in images] == [(326, 326)] * 3
    for image in images:  # two rows of two, the last place empty
        alphas = [image.getpixel(place)[3] for place in ((80, 80), (240, 80), (80, 240), (240, 240))]
        assert alphas == [255, 255, 255, 0]


def test_moving_a_slider_samples_anew_and_changes_the_picture(opened):
    widget = settled(opened(**CLASSES))
    before = pictures(widget._now)
    widget.controls["sag_scale"].value = 4.0
    plain, with_sag, mask = pictures(settled(widget)._now)
    assert widget.result.settings.sag_scale == 4.0
    assert plain == before[0] and with_sag != before[1] and mask != before[2]


@pytest.mark.parametrize(
    ("name", "value"), [("blur_sigma", 0.5), ("mask_threshold", 1.2), ("cond_scale", 3.0), ("sampler", "heun"), ("seed", 9)]
)
def test_every_control_changes_the_samples(opened, name, value):
    widget = settled(opened(**CLASSES))
    before = widget.result
    widget.controls[name].value = value
    assert not torch.equal(settled(widget).result.guided, before.guided)
    assert torch.equal(widget.result.plain, before.plain) == (name in ("blur_sigma", "mask_threshold"))


def test_the_last_setting_stays_for_comparison(opened):
    widget = settled(opened(**CLASSES))
    assert widget._before.box.layout.display == "none"
    first = pictures(widget._now)
    widget.controls["blur_sigma"].value = 1.0
    assert pictures(settled(widget)._before) == first and widget._before.box.layout.display != "none"
    assert "<b>blur_sigma 2.5</b>" in widget._before.label.value and "<b>sag_scale" not in widget._before.label.value
    assert "blur_sigma 1.0" in widget._now.label.value


def test_a_setting_that_comes_back_leaves_the_comparison(opened):
    widget = settled(opened())
    first = pictures(widget._now)
    widget.controls["seed"].value = 5
    settled(widget)
    widget._ask()
    assert pictures(settled(widget)._before) == first


def test_the_classes_menu(opened):
    widget = settled(opened(n=1, **CLASSES))
    assert widget.settings.classes == ("airplane",) and len(widget.result.guided) == 1
    widget.controls["classes"].value = ("cat", "ship", "truck")
    assert len(settled(widget).result.guided) == 3 and "cat, ship, truck" in widget._now.label.value
    alone = explore(widget._session.guided, SHAPE, SIGMAS, n=1, seed=1, sampler="euler", **CLASSES)
    alone.controls["classes"].value = ("ship",)
    assert torch.allclose(settled(alone).result.guided[0], widget.result.guided[1], atol=1e-4)
    alone.close()


def test_fewer_classes_than_samples_take_turns(opened):
    widget = opened(n=5, **CLASSES)
    widget.controls["classes"].value = ("cat", "dog")
    assert widget._session.names(widget.settings) == ["cat", "dog", "cat", "dog", "cat"]
    assert len(settled(widget).result.guided) == 5


def test_an_unconditional_model(opened, calls):
    widget = settled(opened())
    assert list(widget.controls) == ["sag_scale", "blur_sigma", "mask_threshold", "sampler", "seed"]
    assert set(calls) == {2} and not error(widget)
    assert 0 < widget.result.mask.mean() < 1


def test_conditioning_in_extra_args(opened):
    cond, uncond = zoo.conditioning(["cat", "dog"])
    widget = settled(opened(extra_args={"cond": cond, "uncond": uncond, "cond_scale": 2.0}))
    assert widget.settings.cond_scale == 2.0 and "classes" not in widget.controls and not error(widget)


def test_latents_are_decoded(opened):
    widget = settled(opened(decode=lambda latents: latents.repeat_interleave(4, 2).repeat_interleave(2, 3)))
    assert widget.result.guided.shape == (2, 3, 64, 32) and widget.result.mask.shape == (2, 1, 16, 16)
    assert Image.open(io.BytesIO(pictures(widget._now)[2])).size == (2 * 160 + 6, 320)


def test_nothing_is_masked_where_sag_never_acts(opened):
    widget = settled(opened())
    widget.controls["sag_scale"].value = 0.0
    settled(widget)
    assert torch.equal(widget.result.plain, widget.result.guided) and not widget.result.mask.any()


# One run at a time


def test_plain_is_sampled_again_only_where_it_changes(opened, calls):
    widget = settled(opened(**CLASSES))
    assert len(calls) == 3 * STEPS
    for name, value in (("sag_scale", 2.0), ("blur_sigma", 1.0), ("mask_threshold", 1.1)):
        calls.clear()
        widget.controls[name].value = value
        settled(widget)
        assert calls == [4, 2] * STEPS
    calls.clear()
    widget.controls["seed"].value = 1
    settled(widget)
    assert len(calls) == 3 * STEPS


@pytest.fixture
def gate(denoiser):
    """Holds the model's next call, and those after it, until it is opened."""
    entered, opened = threading.Event(), threading.Event()

    def hold(module, args):
        entered.set()
        assert opened.wait(60)

    denoiser.register_forward_pre_hook(hold)
    yield entered, opened
    opened.set()


def test_the_newest_setting_wins_and_stale_runs_end(opened, calls, gate):
    entered, open_gate = gate
    widget = opened(**CLASSES)
    assert entered.wait(60)
    for value in (2.0, 2.1, 2.2, 2.3):
        widget.controls["sag_scale"].value = value
    open_gate.set()
    settled(widget)
    # One call of the first run, none of those between, and all of the last
    assert len(calls) == 1 + 3 * STEPS
    assert widget.result.settings.sag_scale == 2.3 and widget._before.box.layout.display == "none" and not error(widget)


def test_closing_ends_the_run_and_the_thread(opened, calls, gate, guided):
    entered, open_gate = gate
    widget = opened(**CLASSES)
    thread = widget._newest._thread
    assert entered.wait(60) and thread.is_alive()
    widget.close()
    open_gate.set()
    thread.join(60)
    assert not thread.is_alive() and len(calls) == 1 and widget.result is None and not error(widget)
    widget.controls["seed"].value = 8
    assert widget.wait(0) and len(calls) == 1
    assert guided(torch.randn(1, *SHAPE), torch.ones(1)).isfinite().all()


def test_closing_leaves_nothing_behind(denoiser):
    models = set(_instances)
    guided = ksag.SAGDenoiser(denoiser, cond_key="mapping_cond")
    widget = settled(explore(guided, SHAPE, SIGMAS, sampler="euler", **CLASSES))
    left = [weakref.ref(widget), weakref.ref(guided), weakref.ref(widget._newest)]
    thread = widget._newest._thread
    widget.close()
    thread.join(60)
    assert set(_instances) == models
    del widget, guided
    gc.collect()
    assert [ref() for ref in left] == [None] * 3


@pytest.mark.slow
def test_python_ends_well_in_the_middle_of_a_run():
    code = """
import time
import k_diffusion as K, ksag, ksag.zoo
from ksag.explore import explore
guided = ksag.SAGDenoiser(ksag.zoo.load())
widget = explore(guided, (3, 32, 32), K.sampling.get_sigmas_karras(1000, 0.002, 80.0))
while not widget._bar.value:
    time.sleep(0.01)
print(widget._status.value)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (0, "sampling: plain\n", "")


def test_newest_drops_what_is_overtaken():
    begun, go, done = threading.Event(), threading.Event(), []

    def work(request):
        begun.set()
        assert go.wait(60)
        done.append(request)

    newest = Newest(work)
    newest.ask(1)
    assert begun.wait(60) and not newest.wait(0.01)
    newest.ask(2)
    newest.ask(3)
    go.set()
    assert newest.wait(60) and done == [1, 3]
    newest.close()
    newest.ask(4)
    newest._thread.join(60)
    assert done == [1, 3] and not newest._thread.is_alive()


def test_two_widgets_on_one_wrapper_do_not_disturb_each_other(opened, guided):
    with guided.trace() as steps:
        all_, none = opened(), opened()
        all_.controls["mask_threshold"].value = 0.0
        none.controls["mask_threshold"].value = 3.0
        settled(all_), settled(none)
    assert torch.equal(all_.result.mask, torch.ones(2, 1, 16, 16)) and not none.result.mask.any()
    assert not steps  # nor do they what a cell traces


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_progress_goes_from_nothing_to_the_end(guided, sampler):
    reports = []
    session = Session(guided, SHAPE, SIGMAS, None, {}, 1, None)
    session.run(Settings(1.0, 2.0, 1.0, sampler, 0), lambda name, done: reports.append((name, done)))
    for name in ("plain", "with SAG"):
        shares = [done for run, done in reports if run == name]
        assert shares[0] == 0 and shares == sorted(shares) and len(shares) > 2 and 0.5 <= shares[-1] <= 1


# Errors


def test_an_error_is_shown_and_the_next_change_recovers(opened):
    widget = settled(opened(**CLASSES))
    shown = pictures(widget._now)
    widget.controls["classes"].value = ()
    assert "No class is chosen" in error(settled(widget)) and widget._bar.bar_style == "danger"
    assert pictures(widget._now) == shown
    widget.controls["classes"].value = ("frog",)
    assert not error(settled(widget)) and widget._bar.bar_style == "success"
    assert pictures(widget._now) != shown and pictures(widget._before) == shown


def test_an_error_of_the_users_own_function(opened):
    def conditioning(names):
        if "<b>" in names:
            raise KeyError("<i>no such prompt</i>")
        return zoo.conditioning([0] * len(names))

    widget = settled(opened(n=1, classes=["<b>", "a cat"], conditioning=conditioning))
    assert "KeyError: '<i>no such prompt</i>'" in error(widget) and "<i>" not in widget._error.value
    assert widget.result is None and widget._now.box.layout.display == "none"
    widget.controls["classes"].value = ("a cat",)
    assert not error(settled(widget)) and widget.result is not None


def test_samples_that_diverged(opened, denoiser):
    widget = settled(opened())
    handle = denoiser.register_forward_hook(lambda module, args, output: output * float("nan"))
    widget.controls["seed"].value = 1
    assert "The plain samples hold NaN or infinite values" in error(settled(widget))
    handle.remove()
    widget.controls["seed"].value = 2
    assert not error(settled(widget))


def test_a_decode_that_returns_no_pictures(opened):
    assert "decode must return pixels (b, 1 or 3, H, W), got (2, 3)" in error(settled(opened(decode=lambda x: x.mean((2, 3)))))


def test_a_closed_wrapper(opened, guided):
    guided.close()
    assert "This SAGDenoiser was closed" in error(settled(opened()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"classes": ["cat"]}, "give both, or neither. Got classes, and no conditioning"),
        ({"conditioning": zoo.conditioning}, "give both, or neither. Got no classes, and conditioning"),
        ({"shape": (4, 16, 16)}, r"with 1 or 3 channels unless decode.*got \(4, 16, 16\)"),
        ({"shape": (2, 3, 16, 16)}, r"shape is \(c, h, w\) of a sample"),
        ({"n": 0}, "n is the number of samples, 1 or more, got 0"),
        ({"sampler": "dpm++"}, r"sampler must be one of euler, .*got 'dpm\+\+'"),
    ],
)
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_bad_arguments(guided, wrong, message):
    with pytest.raises(ValueError, match=message):
        explore(guided, **{"shape": SHAPE, "sigmas": SIGMAS, **wrong})


def test_without_ipywidgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "ksag.explore")
    with pytest.raises(ImportError, match=r"pip install 'ksag\[notebook\]'"):
        import ksag.explore  # noqa: F401


# The code


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        CLASSES,
        {
            "classes": ["it's a cat", '"dog"'],
            "conditioning": lambda names: zoo.conditioning([3 if "cat" in n else 5 for n in names]),
        },
        {"extra_args": {"mapping_cond": zoo.one_hot([2, 4])}},
        {"decode": lambda latents: latents.repeat_interleave(2, 2)},
    ],
    ids=["unconditional", "function of a module", "function of a cell", "extra_args", "decode"],
)
def test_the_code_gives_the_same_images(opened, guided, sampler, given):
    widget = settled(opened(**given))
    controls = widget.controls
    controls["sampler"].value, controls["seed"].value, controls["blur_sigma"].value = sampler, 4, 0.1 + 0.2
    if "classes" in controls:
        controls["classes"].value, controls["cond_scale"].value = controls["classes"].options[1:], 2.7
    assert not error(settled(widget))
    assert html.escape(widget.code) in widget._code.value

    names = {"guided": guided, "sigmas": SIGMAS, **copy.copy(given)}
    if given is CLASSES:
        del names["conditioning"]
    with torch.no_grad():
        exec(widget.code, names)
    assert torch.equal(names["images"], widget.result.guided)
    assert replace(widget.settings, blur_sigma=0.3) == widget.settings
