"""The widget samples what its controls say, one run at a time, and its code gives the same images."""

import base64
import copy
import gc
import io
import re
import sys
import threading
import weakref

import k_diffusion as K
import nbformat
import pytest
import torch
import traitlets
from nbconvert import HTMLExporter
from PIL import Image

import ksag
import ksag.explore
from ksag.explore import VIEW, Result, Sampling, explore
from ksag.samplers import sample
from tests.models import CLASSES as NUMBER_OF_CLASSES
from tests.models import hooks

SHAPE = (3, 16, 16)
SIGMAS = K.sampling.get_sigmas_karras(3, 0.1, 20.0)
STEPS = len(SIGMAS) - 1
LONG = K.sampling.get_sigmas_karras(8, 0.1, 20.0)  # enough steps for a preview
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
    directions = [ksag.SAG(1.5, 2.5, mask_threshold=0.9), ksag.PAG(0.75), ksag.SEG(0.5)]
    return ksag.GuidedDenoiser(denoiser, directions, cond_key="mapping_cond")


@pytest.fixture
def calls(denoiser):
    """The batch sizes of the model's calls."""
    sizes: list[int] = []
    denoiser.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


@pytest.fixture
def opened(guided, monkeypatch):
    """Opens widgets, and closes them at the end. Only with `draw` do they draw a picture, which takes longer than the samples."""
    widgets = []

    def open_(wrapper=guided, sigmas=SIGMAS, draw=False, **options):
        if not draw:
            monkeypatch.setattr(Sampling, "picture", lambda self, result: repr(result).encode())
        widgets.append(explore(wrapper, SHAPE, sigmas, **{"sampler": "euler", **options}))
        return widgets[-1]

    yield open_
    for widget in widgets:
        widget.close()


def settled(widget):
    assert widget.wait(60)
    return widget


def sampling(guided, sigmas=SIGMAS, **options):
    given = {"menus": (), "conditioning": None, "extra_args": {}, "n": 2, "decode": None, **options}
    return Sampling(guided, SHAPE, sigmas, **given)


def ignore(name, done):
    pass


# Controls and samples


def test_each_keyword_of_the_directions_has_a_slider_that_starts_from_the_wrappers_value(opened):
    widget = settled(opened(**CHOICES))
    assert widget.settings == {
        "sag_scale": 1.5, "blur_sigma": 2.5, "mask_threshold": 0.9, "pag_scale": 0.75, "seg_scale": 0.5, "cond_scale": 1.0,
        "sampler": "euler", "seed": 0, "animal": "cat",
    }  # fmt: skip
    assert widget.result.settings == widget.settings and not widget.error


def test_a_direction_that_the_wrapper_does_not_have_has_no_slider(opened, denoiser):
    widget = settled(opened(ksag.GuidedDenoiser(denoiser, ksag.PAG(), cond_key="mapping_cond")))
    assert list(widget.controls) == ["pag_scale", "sampler", "seed"] and not widget.error


def test_a_users_own_direction_has_sliders_too(opened, denoiser):
    class Halved(ksag.Direction):
        name, keywords = "Halved", {"half_scale": "scale"}

        def direction(self, call, answers):
            return call.g / 2

    widget = settled(opened(ksag.GuidedDenoiser(denoiser, Halved(0.3), cond_key="mapping_cond")))
    assert widget.settings["half_scale"] == 0.3 and not torch.equal(widget.result.plain, widget.result.guided)


def test_extra_args_come_first_even_beyond_the_sliders(opened):
    widget = opened(extra_args={"cond_scale": 30, "sag_scale": -3.0}, **CHOICES)
    assert widget.settings["cond_scale"] == 30.0 and widget.settings["sag_scale"] == -3.0


def test_plain_and_guided_are_from_the_same_noise(opened, guided):
    widget = settled(opened(**CHOICES))
    cond, uncond = conditioning(["cat", "cat"])
    args, off = {"cond": cond, "uncond": uncond}, {"sag_scale": 0.0, "pag_scale": 0.0, "seg_scale": 0.0}
    with torch.no_grad():
        assert torch.equal(widget.result.plain, sample("euler", guided, SHAPE, SIGMAS, [0, 1], {**args, **off}))
        assert torch.equal(widget.result.guided, sample("euler", guided, SHAPE, SIGMAS, [0, 1], args))
    assert not torch.equal(widget.result.plain, widget.result.guided)


CHANGES = {
    "sag_scale": 4.0, "blur_sigma": 0.5, "mask_threshold": 1.2, "pag_scale": 2.0, "seg_scale": 2.0, "cond_scale": 3.0,
    "sampler": "heun", "seed": 9, "animal": "hen",
}  # fmt: skip


@pytest.mark.slow
def test_every_control_changes_the_samples_and_the_picture(opened, calls):
    widget = settled(opened(**CHOICES))
    assert set(CHANGES) == set(widget.controls)
    for name, value in CHANGES.items():
        before, picture, _ = widget.result, widget._image.value, calls.clear()
        widget.controls[name].value = value
        now = settled(widget).result
        assert now.settings[name] == value and not torch.equal(now.guided, before.guided) and widget._image.value != picture
        # plain samples are taken again only if they change
        of_a_direction = name in list(CHANGES)[:5]
        assert (now.plain is before.plain) == of_a_direction
        if of_a_direction:
            assert len(calls) == 2 * STEPS  # SAG takes a second call


def test_the_wrapper_stays_as_it_was(opened, guided):
    before, x, sigma = copy.deepcopy([vars(direction) for direction in guided.directions]), torch.randn(1, *SHAPE), torch.ones(1)
    guided(x, sigma)
    with guided.trace() as steps:
        widget = opened(**CHOICES)
        widget.controls["sag_scale"].value = 3.0
        settled(widget)
    assert not steps  # of this thread
    assert [vars(direction) for direction in guided.directions] == before


def test_two_widgets_on_one_wrapper_do_not_disturb_each_other(opened, guided):
    guided.directions[0].every = 2
    alone = settled(opened()).result.guided
    first, second = opened(), opened()
    second.controls["seed"].value = 7
    assert torch.equal(settled(first).result.guided, alone) and not torch.equal(settled(second).result.guided, alone)


def test_an_unconditional_model(opened, calls):
    widget = settled(opened())
    assert "cond_scale" not in widget.controls and not widget.error
    assert calls == [2] * STEPS + [6, 2] * STEPS  # plain; u with PAG's and SEG's predictions, then SAG's


def test_conditioning_in_extra_args(opened):
    cond, uncond = conditioning(["cat", "dog"])
    widget = settled(opened(extra_args={"cond": cond, "uncond": uncond, "cond_scale": 2.0}))
    assert widget.settings["cond_scale"] == 2.0 and not widget.error


def test_any_in_a_menu(opened):
    seen = []

    def recorded(animals, sizes):
        seen.append((animals, sizes))
        return conditioning(animals, sizes)

    widget = settled(opened(n=3, choices={"animal": ANIMALS, "size": SIZES}, conditioning=recorded))
    widget.controls["animal"].value = "any"
    assert not settled(widget).error and seen == [(["cat"] * 3, ["small"] * 3), ([None] * 3, ["small"] * 3)]
    assert len(widget.result.guided) == 3


def test_latents_are_decoded(opened):
    widget = settled(opened(decode=lambda latents: latents.repeat_interleave(4, 2).repeat_interleave(2, 3)))
    assert widget.result.guided.shape == widget.result.plain.shape == (2, 3, 64, 32) and not widget.error


@pytest.mark.parametrize("spatial", [(40,), (8, 12), (5, 8, 12)])
def test_a_picture_of_samples_with_any_number_of_dimensions(guided, spatial):
    x = torch.rand(2, 3, *spatial) * 2 - 1
    png = sampling(guided).picture(Result({"sampler": "euler", "seed": 0}, None, x, None, is_preview=True))
    assert min(Image.open(io.BytesIO(png)).size) > 100


# Previews


@torch.no_grad()
def two_steps(guided, i, args):
    """A plain Euler step from LONG[0] to LONG[i], then a guided one to 0."""
    middle = sample("euler", guided, SHAPE, LONG[[0, i]], [0, 1], {**args, "sag_scale": 0.0, "pag_scale": 0.0, "seg_scale": 0.0})
    return guided(middle, LONG[i].expand(2), **args)


def test_a_preview_then_plain_samples_then_guided_ones(guided):
    session = sampling(guided, LONG, menus=("animal",), conditioning=conditioning)
    settings = {**session.start(), "sampler": "heun", "seed": 0, "animal": "cat"}
    names: list[str] = []
    preview, plain, whole = session.run(settings, None, lambda name, done: names.append(name))
    assert list(dict.fromkeys(names)) == ["preview", "plain", "guided"]
    assert [result.is_preview for result in (preview, plain, whole)] == [True, True, False]
    assert preview.plain is None and plain.guided is preview.guided and whole.plain is plain.plain
    cond, uncond = conditioning(["cat", "cat"])
    assert torch.equal(preview.guided, two_steps(guided, 4, {"cond": cond, "uncond": uncond}))
    # with other settings of a direction the plain samples stay
    again = list(session.run({**settings, "pag_scale": 2.0}, whole, ignore))
    assert [result.is_preview for result in again] == [True, False] and all(result.plain is plain.plain for result in again)
    assert again[0].middle is whole.middle and not torch.equal(again[0].guided, preview.guided)


def test_a_preview_has_a_step_at_which_a_direction_acts(guided):
    for direction in guided.directions:
        direction.sigma_range = float(LONG[6]), float(LONG[6])
    session = sampling(guided, LONG)
    preview, *_ = session.run({**session.start(), "sampler": "euler", "seed": 0}, None, ignore)
    assert torch.equal(preview.guided, two_steps(guided, 6, {}))
    assert not torch.equal(preview.guided, two_steps(guided, 6, {"pag_scale": 0.0}))


@pytest.mark.parametrize(("steps", "previews"), [(3, 0), (4, 2)])
def test_a_short_run_has_no_preview(guided, steps, previews):
    session = sampling(guided, K.sampling.get_sigmas_karras(steps, 0.1, 20.0))
    results = session.run({**session.start(), "sampler": "euler", "seed": 0}, None, ignore)
    assert [result.is_preview for result in results].count(True) == previews


# One run at a time


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
    assert entered.wait(60) and not widget.wait(0.01)
    for value in (2.0, 2.1, 2.2, 2.3):
        widget.controls["sag_scale"].value = value
    open_gate.set()
    settled(widget)
    assert len(calls) == 1 + 3 * STEPS  # one call of the first run, none of those between, and all of the last
    assert widget.result.settings["sag_scale"] == 2.3 and not widget.error


def test_closing_ends_the_run_and_the_thread(opened, calls, gate, guided):
    entered, open_gate = gate
    widget = opened(**CHOICES)
    assert entered.wait(60)
    widget.close()
    open_gate.set()
    widget._thread.shutdown()
    assert len(calls) == 1 and widget.result is None and not widget.error
    widget.controls["seed"].value = 8
    assert widget.wait(0) and len(calls) == 1
    assert guided(torch.randn(1, *SHAPE), torch.ones(1)).isfinite().all()


def test_closing_releases_the_wrapper(denoiser):
    guided = ksag.SAGDenoiser(denoiser, cond_key="mapping_cond")
    widget = settled(explore(guided, SHAPE, SIGMAS, sampler="euler", **CHOICES))
    left, thread = [weakref.ref(widget), weakref.ref(guided)], widget._thread
    widget.close()
    thread.shutdown()
    del widget, guided
    gc.collect()
    assert [ref() for ref in left] == [None, None] and not hooks(denoiser)


@pytest.mark.parametrize("sampler", ["heun", "dpm_fast", "dpm_adaptive", "dpmpp_2m"])
def test_progress_goes_from_nothing_to_the_end(guided, sampler):
    reports = []
    session = sampling(guided, K.sampling.get_sigmas_karras(4, 0.1, 20.0), n=1)
    assert list(session.run({**session.start(), "sampler": sampler, "seed": 0}, None, lambda *report: reports.append(report)))
    for name in ("plain", "guided"):
        shares = [done for run, done in reports if run == name]
        assert shares[0] == 0 and shares == sorted(shares) and len(shares) > 2 and 0.5 <= shares[-1] <= 1


# Errors


def test_an_error_of_a_users_function_is_shown_and_the_next_change_recovers(opened):
    def prompts(names):
        if None in names:
            raise KeyError("<i>no such prompt</i>")
        return conditioning(["cat"] * len(names))

    widget = settled(opened(n=1, choices={"prompt": ["<b>", "a cat"]}, conditioning=prompts))
    shown, result = widget._image.value, widget.result
    widget.controls["prompt"].value = "any"
    assert settled(widget).error == "KeyError: '<i>no such prompt</i>'" and widget._progress.bar_style == "danger"
    error, code = widget._text.outputs
    assert error["name"] == "stderr" and widget.error in error["text"] and widget.code in code["data"]["text/plain"]
    assert widget._image.value == shown and widget.result is result
    widget.controls["seed"].value, widget.controls["prompt"].value = 7, "a cat"
    assert not settled(widget).error and widget._progress.bar_style == "success" and len(widget._text.outputs) == 1
    assert widget._image.value != shown


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (lambda x: x * torch.nan, "ValueError: .* holds NaN or infinite values"),
        (lambda x: x.mean((1, 2, 3)), r"TypeError: .* must be a floating point tensor .* of shape \(2,\)"),
        (lambda x: x.repeat(1, 2, 1, 1), r"ValueError: plain has shape \(2, 6, 16, 16\), but pictures have 1 or 3 channels"),
    ],
)
def test_samples_that_cannot_be_shown(opened, decode, message):
    assert re.match(message, settled(opened(draw=True, decode=decode)).error)


def test_a_closed_wrapper(opened, guided):
    guided.close()
    assert "This GuidedDenoiser was closed" in settled(opened()).error


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"choices": {"animal": ANIMALS}}, ValueError, "both choices and conditioning"),
        ({"conditioning": conditioning}, ValueError, "both choices and conditioning"),
        ({"sampler": "dpm++"}, traitlets.TraitError, "Invalid selection"),
    ],
)
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_bad_arguments(guided, wrong, error, message):
    with pytest.raises(error, match=message):
        explore(guided, SHAPE, SIGMAS, **wrong)


def test_without_ipywidgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "ksag.explore")
    with pytest.raises(ImportError, match=r"pip install '\.\[notebook\]'"):
        import ksag.explore  # noqa: F401


# The code


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
    ids=["unconditional", "one menu", "two menus", "extra_args", "decode"],
)
def test_the_code_gives_the_same_images(opened, guided, given):
    widget = opened(**given)
    controls = widget.controls
    controls["sampler"].value, controls["seed"].value, controls["blur_sigma"].value = "dpmpp_2m_sde", 4, 0.1 + 0.2
    if menus := given.get("choices"):
        controls["cond_scale"].value = 2.7
        for menu, options in menus.items():
            controls[menu].value = options[1]
    assert not settled(widget).error
    (shown,) = widget._text.outputs
    assert shown["data"] == {"text/plain": widget.code, "text/markdown": f"```python\n{widget.code}\n```"}

    names = {"guided": guided, "sigmas": SIGMAS, **copy.copy(given)}
    with torch.no_grad():
        exec(widget.code, names)
    assert torch.equal(names["images"], widget.result.guided)
    assert widget.settings["blur_sigma"] == 0.3


# Without a kernel


def test_a_notebook_without_a_kernel_shows_the_last_picture(opened, monkeypatch):
    """The two outputs of a cell that shows the widget: the widget, and a picture that replaces it on a page without a kernel."""
    outputs = []

    class Handle:
        def update(self, data, raw):
            outputs[-1] = data

    def display(data, raw, display_id=None):
        outputs.append(data)
        return Handle() if display_id else None

    monkeypatch.setattr(ksag.explore, "display", display)
    widget = settled(opened(draw=True))
    widget._ipython_display_()
    assert [output[VIEW]["model_id"] for output in outputs] == [widget.model_id, widget._hidden.model_id]
    widget.controls["seed"].value = 5
    settled(widget)
    assert base64.b64decode(outputs[1]["image/png"]) == widget._image.value and "[5, 6]" in outputs[1]["text/plain"]

    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", output) for output in outputs])
    page, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert page.count("<img") == 1 and outputs[1]["image/png"].replace("\n", "")[:60] in page and "widget-view" not in page
