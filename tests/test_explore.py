"""Does the widget show what its controls say, one run at a time, and does its code give the same images?"""

import base64
import copy
import gc
import html
import io
import re
import subprocess
import sys
import threading
import weakref

import k_diffusion as K
import pytest
import torch
from ipywidgets.widgets.widget import _instances
from PIL import Image

import ksag
from ksag.explore import PER_CALL, SHOWN, Newest, Session, explore
from ksag.model.parameters import PARAMETERS
from ksag.samplers import SAMPLERS, sample
from tests.models import CLASSES as NUMBER_OF_CLASSES
from tests.models import hooks

SHAPE = (3, 16, 16)
SIGMAS = K.sampling.get_sigmas_karras(4, 0.1, 20.0)
STEPS = len(SIGMAS) - 1
ANIMALS, SIZES = ("cat", "dog", "frog", "hen"), ("small", "large")


def conditioning(animals, sizes=None):
    """Classes of the small random model for each animal, and a size beside them; None is any."""
    cond = torch.zeros(len(animals), NUMBER_OF_CLASSES)
    for row, animal, size in zip(cond, animals, sizes or [None] * len(animals), strict=True):
        if animal is not None:
            row[ANIMALS.index(animal)] = 1.0
        if size is not None:
            row[4 + SIZES.index(size)] = 1.0
    return cond, torch.zeros_like(cond)


CHOICES = {"choices": {"animal": ANIMALS}, "conditioning": conditioning}


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
        widgets.append(explore(guided, SHAPE, SIGMAS, **{"sampler": "euler", "preview": 0, **options}))
        return widgets[-1]

    yield open_
    for widget in widgets:
        widget.close()


def settled(widget):
    assert widget.wait(60)
    return widget


def pictures(row):
    """What the panels of plain, with SAG and mask show: the pictures' bytes."""
    return [
        [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', panel.value)]
        for panel in row.panels.values()
    ]


def captions(row):
    return [re.findall("<figcaption>(.*?)</figcaption>", panel.value) for panel in row.panels.values()]


def is_old(row):
    return [name for name, panel in row.panels.items() if "ksag-old" in panel._dom_classes]


def error(widget):
    return html.unescape(re.sub("<[^>]*>", "", widget._error.value))


# What it shows


def test_the_controls_start_from_the_wrappers_own_settings(opened):
    widget = settled(opened(seed=3, **CHOICES))
    assert widget.settings == {
        "sag_scale": 1.5, "blur_sigma": 2.5, "mask_threshold": 0.9, "one_pass": False, "every": 1, "cond_scale": 1.0,
        "sampler": "euler", "seed": 3, "animal": ("cat", "dog"),
    }  # fmt: skip
    assert widget.result.settings == widget.settings and not error(widget)


def test_every_parameter_of_a_call_has_a_control_as_have_those_that_pace_sag():
    assert {*PER_CALL, "one_pass", "every"} == set(SHOWN) <= set(PARAMETERS)


def test_extra_args_come_first_even_beyond_the_sliders(opened):
    widget = opened(extra_args={"cond_scale": 30, "sag_scale": -3.0}, **CHOICES)
    assert widget.settings["cond_scale"] == 30.0 and widget.settings["sag_scale"] == -3.0


def test_the_sliders_win_over_extra_args(opened):
    widget = opened(extra_args={"sag_scale": 3.0}, **CHOICES)
    settled(widget).controls["sag_scale"].value = 0.0
    assert torch.equal(settled(widget).result.guided, widget.result.plain)


def test_it_shows_plain_and_guided_from_the_same_noise(opened, guided):
    widget = settled(opened(**CHOICES))
    cond, uncond = conditioning(["cat", "dog"])
    args = {"cond": cond, "uncond": uncond}
    assert torch.equal(widget.result.plain, sample("euler", guided, SHAPE, SIGMAS, [0, 1], {**args, "sag_scale": 0.0}))
    with guided.trace() as steps:
        assert torch.equal(widget.result.guided, sample("euler", guided, SHAPE, SIGMAS, [0, 1], args))
    assert torch.equal(widget.result.mask, torch.stack([step.mask for step in steps]).mean(0))
    assert not torch.equal(widget.result.plain, widget.result.guided)


def test_the_pictures_are_large_and_show_every_sample(opened):
    widget = settled(opened(n=3))
    for images in pictures(widget._now):
        assert [Image.open(io.BytesIO(png)).size for png in images] == [(160, 160)] * 3
    assert captions(widget._now) == [[], [], []]


def test_the_captions_say_what_each_sample_is_of(opened):
    menus = {"animal": ANIMALS, "size <2>": SIZES}
    widget = settled(opened(n=3, choices=menus, conditioning=conditioning))
    assert captions(widget._now)[0] == ["cat, small", "dog, large", "frog, small"]
    widget.controls["animal"].value = ("dog",)
    widget.controls["size <2>"].value = ()
    assert captions(settled(widget)._now) == [["dog, any"] * 3] * 3
    assert "dog · any size &lt;2&gt;" in widget._now.label.value and not error(widget)
    assert widget._now.panels["mask"].value.count('alt="mask: where SAG blurred dog, any"') == 3


def test_moving_a_slider_samples_anew_and_changes_the_picture(opened):
    widget = settled(opened(**CHOICES))
    before = pictures(widget._now)
    widget.controls["sag_scale"].value = 4.0
    plain, with_sag, mask = pictures(settled(widget)._now)
    assert widget.result.settings["sag_scale"] == 4.0
    assert plain == before[0] and with_sag != before[1] and mask != before[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blur_sigma", 0.5), ("mask_threshold", 1.2), ("one_pass", True), ("every", 2), ("cond_scale", 3.0), ("sampler", "heun"),
        ("seed", 9), ("animal", ("hen",)),
    ],
)  # fmt: skip
def test_every_control_changes_the_samples(opened, name, value):
    widget = settled(opened(**CHOICES))
    before = widget.result
    widget.controls[name].value = value
    assert not torch.equal(settled(widget).result.guided, before.guided)
    assert torch.equal(widget.result.plain, before.plain) == (name in SHOWN)


def test_the_last_setting_stays_for_comparison(opened):
    widget = settled(opened(**CHOICES))
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


def test_a_menu(opened):
    widget = settled(opened(n=1, **CHOICES))
    assert widget.settings["animal"] == ("cat",) and len(widget.result.guided) == 1
    widget.controls["animal"].value = ("cat", "frog", "hen")
    assert len(settled(widget).result.guided) == 3 and "cat, frog, hen" in widget._now.label.value
    alone = explore(widget._session.guided, SHAPE, SIGMAS, n=1, seed=1, sampler="euler", **CHOICES)
    alone.controls["animal"].value = ("frog",)
    assert torch.allclose(settled(alone).result.guided[0], widget.result.guided[1], atol=1e-4)
    alone.close()


def test_fewer_names_than_samples_take_turns_in_each_menu(opened):
    widget = opened(n=5, choices={"animal": ANIMALS, "size": SIZES}, conditioning=conditioning)
    widget.controls["animal"].value = ("frog", "dog")
    widget.controls["size"].value = ("large",)
    assert widget._session.names(widget.settings) == [["frog", "dog", "frog", "dog", "frog"], ["large"] * 5]
    assert len(settled(widget).result.guided) == 5


def test_a_wrapper_is_not_altered_by_what_a_call_cannot_give(opened, guided):
    widget = settled(opened(**CHOICES))
    at_start = dict(vars(guided))
    widget.controls["one_pass"].value, widget.controls["every"].value = True, 3
    settled(widget)
    assert (guided.one_pass, guided.every) == (False, 1) and vars(guided).keys() == at_start.keys() and not error(widget)
    guided.blur_kernel_size = 3  # and what is set on it counts there, too
    before = widget.result.guided
    widget.controls["every"].value = 2
    widget.controls["every"].value = 3
    assert not torch.equal(settled(widget).result.guided, before)


def test_an_unconditional_model(opened, calls):
    widget = settled(opened())
    assert list(widget.controls) == ["sag_scale", "blur_sigma", "mask_threshold", "one_pass", "every", "sampler", "seed"]
    assert set(calls) == {2} and not error(widget)
    assert 0 < widget.result.mask.mean() < 1


def test_conditioning_in_extra_args(opened):
    cond, uncond = conditioning(["cat", "dog"])
    widget = settled(opened(extra_args={"cond": cond, "uncond": uncond, "cond_scale": 2.0}))
    assert widget.settings["cond_scale"] == 2.0 and "animal" not in widget.controls and not error(widget)


def test_latents_are_decoded(opened):
    widget = settled(opened(decode=lambda latents: latents.repeat_interleave(4, 2).repeat_interleave(2, 3)))
    assert widget.result.guided.shape == (2, 3, 64, 32) and widget.result.mask.shape == (2, 1, 16, 16)
    assert [Image.open(io.BytesIO(png)).size for png in pictures(widget._now)[2]] == [(160, 320)] * 2


def test_nothing_is_masked_where_sag_never_acts(opened):
    widget = settled(opened())
    widget.controls["sag_scale"].value = 0.0
    settled(widget)
    assert torch.equal(widget.result.plain, widget.result.guided) and not widget.result.mask.any()


# What is shown meanwhile


LONG = K.sampling.get_sigmas_karras(12, 0.1, 20.0)


def test_a_preview_then_plain_then_with_sag(guided):
    session = Session(guided, SHAPE, LONG, ("animal",), conditioning, {}, 2, None, preview=3)
    settings = {"sag_scale": 1.0, "sampler": "heun", "seed": 0, "animal": ("cat",)}
    names = []
    preview, plain, whole = session.run(settings, lambda name, done: names.append(name))
    assert list(dict.fromkeys(names)) == ["preview", "plain", "with SAG"]
    assert (preview.steps, plain.steps, whole.steps) == (3, 3, 12)
    assert preview.plain is None and plain.guided is preview.guided and whole.plain is plain.plain
    cond, uncond = conditioning(["cat", "cat"])
    args = {"cond": cond, "uncond": uncond, "sag_scale": 1.0}
    with torch.no_grad():
        assert torch.equal(preview.guided, sample("euler", guided, SHAPE, LONG[[0, 4, 8, 12]], [0, 1], args))
        assert torch.equal(whole.guided, sample("heun", guided, SHAPE, LONG, [0, 1], args))
    # with other settings of SAG plain stays
    again = list(session.run({**settings, "sag_scale": 2.0}, lambda name, done: None))
    assert [result.steps for result in again] == [3, 12] and all(result.plain is plain.plain for result in again)


def test_a_preview_has_a_step_at_which_sag_acts(guided):
    guided.sigma_range = float(LONG[10]), float(LONG[8])
    session = Session(guided, SHAPE, LONG, (), None, {}, 2, None, preview=2)
    preview, *_ = session.run({"sag_scale": 2.0, "sampler": "euler", "seed": 0}, lambda name, done: None)
    assert preview.mask.any() and preview.steps == 2
    with torch.no_grad():
        assert torch.equal(preview.guided, sample("euler", guided, SHAPE, LONG[[0, 9, 12]], [0, 1], {"sag_scale": 2.0}))


@pytest.mark.parametrize(("preview", "previews"), [(0, 0), (2, 1), (3, 0)])
def test_a_preview_has_at_most_half_of_the_steps(guided, preview, previews):
    session = Session(guided, SHAPE, SIGMAS, (), None, {}, 1, None, preview)
    results = list(session.run({"sampler": "euler", "seed": 0}, lambda name, done: None))
    assert [result.steps < STEPS for result in results].count(True) - 1 == previews or not preview
    assert len(results) == 2 + previews


def test_old_pictures_are_dim_until_the_new_ones_are_there(opened, denoiser):
    """Seen at each call of the model: what is old, and what is a preview."""
    seen = []
    widget = settled(opened(preview=2, **CHOICES))
    assert not is_old(widget._now)
    old = pictures(widget._now)

    def look(module, args):
        now = widget._now
        seen.append(
            (widget._status.value.removeprefix("sampling: "), is_old(now), "preview, 2 steps" in now.panels["guided"].value)
        )

    denoiser.register_forward_pre_hook(look)
    widget.controls["seed"].value = 4
    settled(widget)
    assert list(dict.fromkeys(map(str, seen))) == [
        str(("preview", ["plain", "guided", "mask"], False)),
        str(("plain", ["plain"], True)),
        str(("with SAG", [], True)),
    ]
    assert not is_old(widget._now) and "preview" not in widget._now.panels["guided"].value and pictures(widget._before) == old
    seen.clear()
    widget.controls["sag_scale"].value = 0.5
    settled(widget)
    assert {what for what, *_ in seen} == {"preview", "with SAG"} and seen[0][1] == ["guided", "mask"]


# One run at a time


def test_plain_is_sampled_again_only_where_it_changes(opened, calls):
    widget = settled(opened(**CHOICES))
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
    widget = opened(**CHOICES)
    assert entered.wait(60)
    for value in (2.0, 2.1, 2.2, 2.3):
        widget.controls["sag_scale"].value = value
    open_gate.set()
    settled(widget)
    # One call of the first run, none of those between, and all of the last
    assert len(calls) == 1 + 3 * STEPS
    assert widget.result.settings["sag_scale"] == 2.3 and widget._before.box.layout.display == "none" and not error(widget)


def test_closing_ends_the_run_and_the_thread(opened, calls, gate, guided):
    entered, open_gate = gate
    widget = opened(**CHOICES)
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
    widget = settled(explore(guided, SHAPE, SIGMAS, sampler="euler", **CHOICES))
    before = hooks(denoiser)
    widget.controls["every"].value = 2
    assert hooks(settled(widget)._session.guided.inner_model) > before
    left = [weakref.ref(widget), weakref.ref(guided), weakref.ref(widget._newest)]
    thread = widget._newest._thread
    widget.close()
    thread.join(60)
    assert set(_instances) == models and hooks(denoiser) == before
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
widget = explore(guided, (3, 64, 64), K.sampling.get_sigmas_karras(1000, 0.32, 160.0))
while not widget._bar.value:
    time.sleep(0.01)
print(widget._status.value)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (0, "sampling: preview\n", "")


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
    session = Session(guided, SHAPE, SIGMAS, (), None, {}, 1, None, preview=0)
    assert list(session.run({"sampler": sampler, "seed": 0}, lambda name, done: reports.append((name, done))))
    for name in ("plain", "with SAG"):
        shares = [done for run, done in reports if run == name]
        assert shares[0] == 0 and shares == sorted(shares) and len(shares) > 2 and 0.5 <= shares[-1] <= 1


# Errors


def test_an_error_of_the_users_own_function_is_shown_and_the_next_change_recovers(opened):
    def prompts(names):
        if None in names:
            raise KeyError("<i>no such prompt</i>")
        return conditioning(["cat"] * len(names))

    widget = settled(opened(n=1, choices={"prompt": ["<b>", "a cat"]}, conditioning=prompts))
    shown = pictures(widget._now)
    widget.controls["prompt"].value = ()
    assert "KeyError: '<i>no such prompt</i>'" in error(settled(widget)) and "<i>" not in widget._error.value
    assert widget._bar.bar_style == "danger" and pictures(widget._now) == shown and is_old(widget._now)
    widget.controls["prompt"].value = ("a cat",)
    widget.controls["seed"].value = 7
    assert not error(settled(widget)) and widget._bar.bar_style == "success" and not is_old(widget._now)
    assert pictures(widget._now) != shown and pictures(widget._before) == shown


def test_a_given_up_run_leaves_no_run_behind(guided):
    """Its momentum, and one_pass's, begin anew, though the next sigma is close to the last."""
    guided.one_pass = True
    session = Session(guided, SHAPE, SIGMAS, (), None, {}, 2, None, preview=0)

    def give_up(name, done):
        if done > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(session.run({"one_pass": True, "every": 1, "sampler": "euler", "seed": 0, "sag_scale": 1.0}, give_up))
    x, sigma = torch.randn(2, *SHAPE), torch.full((2,), float(SIGMAS[1]))
    first, second = guided(x, sigma), guided(x, sigma)
    plain = guided(x, sigma, sag_scale=0.0)
    torch.testing.assert_close(first, plain, atol=1e-5, rtol=1e-5)  # a run's first call has no SAG
    assert (second - plain).abs().max() > 1e-3


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
        ({"choices": {"animal": ANIMALS}}, "give both, or neither. Got choices, and no conditioning"),
        ({"conditioning": conditioning}, "give both, or neither. Got no choices, and conditioning"),
        (
            {"choices": {"animal": "cat"}, "conditioning": conditioning},
            r"choices\['animal'\] is a list of one or more names, got 'cat'",
        ),
        (
            {"choices": {"animal": ()}, "conditioning": conditioning},
            r"choices\['animal'\] is a list of one or more names, got \(\)",
        ),
        ({"choices": {"seed": ANIMALS}, "conditioning": conditioning}, "choices has a menu 'seed'.*another control's name"),
        ({"extra_args": {"sag_scale": torch.ones(2)}}, r"sag_scale is one for all samples here, got a tensor of shape \(2,\)"),
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
    with pytest.raises(ImportError, match=r"pip install '\.\[notebook\]'"):
        import ksag.explore  # noqa: F401


# The code


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        CHOICES,
        {
            "choices": {"prompt": ["it's a cat", '"dog"', "hen"], "size": SIZES},
            "conditioning": lambda names, sizes: conditioning(["cat" if "cat" in n else "hen" for n in names], sizes),
        },
        {"extra_args": {"mapping_cond": conditioning(["cat", "hen"])[0]}},
        {"decode": lambda latents: latents.repeat_interleave(2, 2)},
    ],
    ids=["unconditional", "function of a module", "function of a cell", "extra_args", "decode"],
)
def test_the_code_gives_the_same_images(opened, guided, sampler, given):
    widget = settled(opened(**given))
    controls = widget.controls
    controls["sampler"].value, controls["seed"].value, controls["blur_sigma"].value = sampler, 4, 0.1 + 0.2
    controls["one_pass"].value, controls["every"].value = sampler == "dpmpp_2m", 2
    if menus := given.get("choices"):
        controls["cond_scale"].value = 2.7
        for menu in menus:
            controls[menu].value = controls[menu].options[1:]
    assert not error(settled(widget))
    assert html.escape(widget.code) in widget._code.value

    names = {"guided": guided, "sigmas": SIGMAS, **copy.copy(given)}
    if given is CHOICES:
        del names["conditioning"]
    with torch.no_grad():
        exec(widget.code, names)
    assert torch.equal(names["images"], widget.result.guided)
    assert widget.settings["blur_sigma"] == 0.3
