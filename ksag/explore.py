"""A notebook widget: move a slider, and see what Self-Attention Guidance makes of it; needs the extra `ksag[notebook]`.

from ksag.explore import explore
choices = {"category": ksag.zoo.CATEGORIES, "style": ksag.zoo.STYLES}
explore(guided, (3, 64, 64), sigmas, choices=choices, conditioning=ksag.zoo.conditioning)
"""

import atexit
import base64
import html
import io
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ksag.denoiser import SAGDenoiser
from ksag.images import overlay, to_image
from ksag.model.conditioning import Conditioning
from ksag.model.parameters import PARAMETERS, PER_CALL
from ksag.samplers import SAMPLERS, sample

try:
    import ipywidgets as widgets
except ImportError as error:
    raise ImportError("ksag.explore needs ipywidgets. In a clone of ksag: pip install '.[notebook]'") from error

# Settings → pictures

Settings = dict[str, Any]
"""What the controls say, by name: parameters of `SAGDenoiser`, cond_scale if there is an uncond, sampler, seed, and what is
chosen in each menu of `choices`."""


class Result(NamedTuple):
    """What was sampled at some settings; pixels are (b, 1 or 3, H, W) in [-1, 1], on the CPU; None is still to come."""

    settings: Settings
    plain: Tensor | None
    """Pixels at sag_scale 0."""
    guided: Tensor | None
    """Pixels from the same noise, with SAG."""
    mask: Tensor | None
    """(b, 1, h, w) share of the guided calls in which a pixel of the latent was under the mask; zeros if SAG never acted."""
    steps: int
    """How many guided was sampled with: a preview has few."""


Report = Callable[[str, float], None]
"""Is told which run is on its way, and how much of it is done, 0 to 1; what it raises ends that run."""


@dataclass
class Session:
    """Settings → pictures, for one wrapper. See `explore` for the fields; `choices` has the names of the menus."""

    guided: SAGDenoiser
    shape: tuple[int, ...]
    sigmas: Tensor
    choices: tuple[str, ...]
    conditioning: Callable[..., tuple[Conditioning, Conditioning]] | None
    extra_args: dict[str, Any]
    n: int
    decode: Callable[[Tensor], Tensor] | None
    preview: int
    _own: SAGDenoiser | None = field(default=None, init=False)
    _plain: tuple[Settings, Tensor] | None = field(default=None, init=False)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def seeds(self, settings: Settings) -> list[int]:
        """One for each sample: n of them, or more if more is chosen in a menu."""
        return list(range(settings["seed"], settings["seed"] + max(self.n, *(len(settings[menu]) for menu in self.choices), 0)))

    def names(self, settings: Settings) -> list[list[Any]]:
        """For each menu the samples' names: the chosen ones in turn, or None where none is chosen."""
        samples = range(len(self.seeds(settings)))
        return [[chosen[i % len(chosen)] if chosen else None for i in samples] for chosen in map(settings.get, self.choices)]

    def keeps_plain(self, settings: Settings) -> bool:
        """Whether only SAG's own settings differ from the last run's, so that its plain samples stay."""
        return self._plain is not None and self._plain[0] == _without_sag(settings)

    def run(self, settings: Settings, report: Report) -> Iterator[Result]:
        """Samples without and with SAG; what there is so far after each run: a preview with SAG, plain, and with SAG."""
        args = {**self.extra_args, **_guidance(settings)}
        if self.conditioning is not None:
            args["cond"], args["uncond"] = self.conditioning(*self.names(settings))
        wrapper = self._wrapper(settings)
        plain = self._plain[1] if self._plain is not None and self.keeps_plain(settings) else None
        guided, mask, steps = None, None, 0
        if 0 < self.preview <= self.steps // 2:
            some = self._few_sigmas(*wrapper.sigma_range)
            steps = len(some) - 1
            guided, mask = self._with_sag(wrapper, {**settings, "sampler": "euler"}, args, "preview", report, some)
            yield Result(settings, plain, guided, mask, steps)
        if plain is None:
            plain = self._sample(wrapper, settings, {**args, "sag_scale": 0.0}, "plain", report, self.sigmas)
            self._plain = _without_sag(settings), plain
            yield Result(settings, plain, guided, mask, steps)
        guided, mask = self._with_sag(wrapper, settings, args, "with SAG", report, self.sigmas)
        yield Result(settings, plain, guided, mask, self.steps)

    def _few_sigmas(self, low: float, high: float) -> Tensor:
        """Those of a preview: the first, some of those at which SAG acts, and 0."""
        inner = range(1, self.steps)
        acting = [i for i in inner if low <= float(self.sigmas[i]) <= high] or inner
        between = dict.fromkeys(acting[len(acting) * i // self.preview] for i in range(1, self.preview))
        return self.sigmas[[0, *between, self.steps]]

    def _wrapper(self, settings: Settings) -> SAGDenoiser:
        """guided, or where it would have to be altered, which may be in use elsewhere, one that differs in just that."""
        if all(getattr(self.guided, name) == value for name, value in _of_wrapper(settings).items()):
            return self.guided
        if self._own is None:
            self._own = SAGDenoiser(self.guided.inner_model, attention=self.guided.tap.layer)
        for name in PARAMETERS:
            setattr(self._own, name, settings.get(name, getattr(self.guided, name)))
        return self._own

    def _with_sag(
        self, wrapper: SAGDenoiser, settings: Settings, args: dict[str, Any], name: str, report: Report, sigmas: Tensor
    ) -> tuple[Tensor, Tensor]:
        with wrapper.trace() as trace:
            pixels = self._sample(wrapper, settings, args, name, report, sigmas)
        masks = [step.mask for step in trace] or [torch.zeros(len(pixels), 1, *self.shape[1:])]
        return pixels, torch.stack(masks).mean(0)

    @torch.no_grad()
    def _sample(
        self, wrapper: SAGDenoiser, settings: Settings, args: dict[str, Any], name: str, report: Report, sigmas: Tensor
    ) -> Tensor:
        def step(info: dict[str, Any]) -> None:
            # by sigma, because not every sampler takes a step for each of the sigmas
            report(name, float((sigmas[:-1] >= float(info["sigma"])).float().mean()))

        report(name, 0.0)
        try:
            x = sample(settings["sampler"], wrapper, self.shape, sigmas, self.seeds(settings), args, step)
        except BaseException:
            wrapper.reset()  # given up between two calls
            raise
        pixels = x if self.decode is None else self.decode(x)
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(f"decode must return pixels (b, 1 or 3, H, W), got {tuple(pixels.shape)} for {tuple(x.shape)}.")
        if not bool(pixels.isfinite().all()):
            raise ValueError(f"The {name} samples hold NaN or infinite values: the sampling diverged. Try lower scales.")
        return pixels.cpu()

    def code(self, settings: Settings) -> str:
        """The Python code that samples `Result.guided` at these settings, bit for bit."""
        given, lines, args = ["guided", "sigmas"], ["from ksag.samplers import sample"], []
        if self.extra_args:
            given.append("extra_args")
            args.append("**extra_args")
        if self.conditioning is not None:
            module, name = (getattr(self.conditioning, key, "") for key in ("__module__", "__name__"))
            if module != "__main__" and getattr(sys.modules.get(module), name, None) is self.conditioning:
                lines.append(f"from {module} import {name}")
            else:
                name = "conditioning"
                given.append(name)
            lines.append(f"cond, uncond = {name}({', '.join(map(repr, self.names(settings)))})")
            args.append('"cond": cond, "uncond": uncond')
        args.append(", ".join(f'"{name}": {value!r}' for name, value in _guidance(settings).items()))
        lines += [
            *(f"guided.{name} = {value!r}" for name, value in _of_wrapper(settings).items()),
            "args = {",
            *(f"    {part}," for part in args),
            "}",
            f'images = sample("{settings["sampler"]}", guided, {self.shape}, sigmas, {self.seeds(settings)}, args)',
        ]
        if self.decode is not None:
            given.append("decode")
            lines.append("images = decode(images)")
        return "\n".join([f"# {', '.join(given)}: as given to explore", *lines])

    def close(self) -> None:
        """Lets go of the wrapper of its own, whose hooks go with it once no run is left that uses it."""
        self._own = None


def _guidance(settings: Settings) -> dict[str, float]:
    """The part that goes into a sampler's extra_args."""
    return {name: settings[name] for name in ("cond_scale", *PER_CALL) if name in settings}


def _of_wrapper(settings: Settings) -> Settings:
    """The part that is set on a wrapper, since a call cannot give it."""
    return {name: settings[name] for name in PARAMETERS if name in settings and name not in PER_CALL}


def _without_sag(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name not in PARAMETERS}


# One run at a time


class Newest:
    """Works on what was asked for last, in one thread of its own; what is overtaken is dropped.

    Args:
        work: is called with a request (anything but None), and raises no error.
    """

    def __init__(self, work: Callable[[Any], None]):
        self._work = work
        self._changed = threading.Condition()
        self._waiting: Any = None
        self._busy = self._closed = False
        # One thread for all runs, because CUDA graphs are captured for each thread; a daemon, so as not to hold up the kernel's end
        self._thread = threading.Thread(target=self._loop, name="ksag.explore", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def ask(self, request: Any) -> None:
        with self._changed:
            self._waiting = None if self._closed else request
            self._changed.notify_all()

    def check(self) -> None:
        """Raises CancelledError if what is being worked on is no longer wanted."""
        if self._waiting is not None or self._closed:
            raise CancelledError

    def wait(self, timeout: float | None = None) -> bool:
        """Until there is nothing left to do; False if that takes longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and self._waiting is None, timeout)

    def close(self) -> None:
        with self._changed:
            self._closed, self._waiting = True, None
            self._changed.notify_all()

    def _end(self) -> None:
        # Python would take the thread out of the middle of the model's call, which aborts the process
        self.close()
        self._thread.join(10)

    def _loop(self) -> None:
        while (request := self._next()) is not None:
            self._work(request)
        atexit.unregister(self._end)

    def _next(self) -> Any:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            request, self._waiting = self._waiting, None
            self._busy = request is not None
            return request


# What is seen

RANGES: dict[str, tuple[float, float, float]] = {
    "sag_scale": (-2.0, 5.0, 0.1),
    "blur_sigma": (0.0, 10.0, 0.1),
    "mask_threshold": (0.0, 3.0, 0.05),
    "cond_scale": (0.0, 15.0, 0.1),
    "every": (1, 8, 1),
}
"""The sliders: lowest and highest value, and the step. One whose step is an int has whole numbers."""

SHOWN = ("sag_scale", "blur_sigma", "mask_threshold", "one_pass", "every")
"""The parameters of `SAGDenoiser` that have a control."""

PANEL = 320
"""Pixels that the samples of one kind take side by side at least; three kinds fit a notebook's usual width."""

GAP = 6
KINDS = {"plain": "plain", "guided": "with SAG", "mask": "mask: where SAG blurred"}
LABEL = {"description_width": "110px"}
TEXT = "font-size: 13px; line-height: 1.4; padding: 6px 0 2px"
CODE = "user-select: all; padding: 8px; background: var(--jp-layout-color2, #8883)"
ERROR = "font-family: var(--jp-ui-font-family, sans-serif); color: var(--jp-error-color1, #d32f2f)"
STYLE = """<style>
.ksag-kind { transition: opacity .15s; }
.ksag-old { opacity: .35; }
.ksag-kind .widget-html-content, .ksag-kind figure { margin: 0; line-height: 1.3; }
.ksag-kind img { display: block; width: 100%; height: auto; border-radius: 3px; }
.ksag-kind figcaption { font-size: 11px; opacity: .8; padding: 2px 1px 4px; overflow-wrap: break-word; }
</style>"""


class explore(widgets.VBox):
    """Controls for SAG, and below them samples without and with it, from the same noise, which follow the controls.

    A change samples anew, in the background, and ends a run that is on its way. Old pictures are dim until the new ones are
    there: first a preview of few steps with SAG, then plain, then with SAG. The mask glows the more, the more of the guided
    calls blurred that place. The row "before" keeps what the last other settings gave. What goes wrong is said in the
    widget, and the next change tries again. The text at the end is the code for the settings; a click selects it.

    Args:
        guided: the wrapper; its own settings are what the controls start from, where `extra_args` has no others. It is not
            altered, and may be used elsewhere at the same time.
        shape: (c, h, w) of a sample.
        sigmas: (steps + 1,) noise levels, as `ksag.samplers.sample` takes them, on the model's device.
        choices: menus by name, such as {"category": ksag.zoo.CATEGORIES, "style": ksag.zoo.STYLES} or {"prompt": ["a cat",
            "a dog"]}; needs `conditioning`. The samples take what is chosen in a menu in turn.
        conditioning: maps a list for each menu, with a name for each sample, to cond and uncond, a row each. Where nothing is
            chosen in a menu, the names are None.
        extra_args: passed to the model at every call; where it holds an uncond, there is a slider for cond_scale.
        n: number of samples; more if more is chosen in a menu.
        seed: of the first sample; the others' are those that follow.
        sampler: one of `ksag.samplers.SAMPLERS`.
        decode: latents (b, c, h, w) → pixels (b, 3, H, W) in [-1, 1], for a model that samples latents.
        preview: steps of the preview, at most, always by euler; 0 is none, nor is there one of more than half of all steps.

    Attributes:
        controls: the sliders and menus by name; their `value` can be set from code as well.

    Raises:
        ValueError: `choices` without `conditioning` or the reverse, latents without `decode`, no such sampler.

    >>> import k_diffusion as K
    >>> import ksag.zoo
    >>> guided = ksag.SAGDenoiser(ksag.zoo.load(), cond_key="mapping_cond", **ksag.zoo.SETTINGS)
    >>> sigmas = K.sampling.get_sigmas_karras(2, 0.1, 80.0)
    >>> choices = {"category": ksag.zoo.CATEGORIES, "style": ksag.zoo.STYLES}
    >>> widget = explore(guided, (3, 64, 64), sigmas, choices=choices, conditioning=ksag.zoo.conditioning, n=1)
    >>> widget.controls["blur_sigma"].value = 3.0
    >>> widget.wait()
    True
    >>> exec(widget.code)
    >>> torch.equal(images, widget.result.guided)
    True
    >>> widget.close()
    """

    def __init__(
        self,
        guided: SAGDenoiser,
        shape: Sequence[int],
        sigmas: Tensor,
        *,
        choices: Mapping[str, Sequence[str]] | None = None,
        conditioning: Callable[..., tuple[Conditioning, Conditioning]] | None = None,
        extra_args: dict[str, Any] | None = None,
        n: int = 2,
        seed: int = 0,
        sampler: str = "dpmpp_2m",
        decode: Callable[[Tensor], Tensor] | None = None,
        preview: int = 2,
    ):
        choices = dict(choices or {})
        _check(shape, choices, conditioning, n, sampler, decode)
        args = dict(extra_args or {})
        self._session = Session(guided, tuple(shape), sigmas, tuple(choices), conditioning, args, n, decode, preview)
        self._result: Result | None = None

        self.controls = _controls(self._session, choices, seed, sampler)
        self._bar = widgets.FloatProgress(min=0.0, max=1.0, layout=widgets.Layout(width="200px"))
        self._status = widgets.HTML().add_class("ksag-status")
        self._error = widgets.HTML().add_class("ksag-error")
        self._now, self._before = _Row("ksag-now"), _Row("ksag-before")
        self._code = widgets.HTML().add_class("ksag-code")
        super().__init__([
            widgets.HTML(STYLE, layout=widgets.Layout(display="none")),
            _columns(self.controls),
            widgets.HBox([self._bar, self._status], layout=widgets.Layout(overflow="hidden")),
            self._error,
            self._now.box,
            self._before.box,
            self._code,
        ], layout=widgets.Layout(overflow="visible"))  # fmt: skip
        self.add_class("ksag-explore")

        self._newest = Newest(self._show)
        for control in self.controls.values():
            control.observe(self._ask, "value")
        self._ask()

    @property
    def settings(self) -> Settings:
        """What the controls say now, by name."""
        values = {name: control.value for name, control in self.controls.items()}
        # The browser's steps add up to 0.30000000000000004
        return values | {name: round(value, 6) for name, value in values.items() if isinstance(value, float)}

    @property
    def result(self) -> Result | None:
        """What was sampled last, all of it; None before the first."""
        return self._result

    @property
    def code(self) -> str:
        """Python code that gives the same images as what the controls say now, bit for bit, as `images`."""
        return self._session.code(self.settings)

    def wait(self, timeout: float | None = None) -> bool:
        """Until what the controls say is sampled, or has failed; False if that takes longer than `timeout` seconds."""
        return self._newest.wait(timeout)

    def close(self) -> None:
        """Ends the run that is on its way, takes the widget off the page, and lets go of `guided`, which stays as it is."""
        if hasattr(self, "_newest"):  # not where an argument was refused: a widget is closed when it is deleted, too
            self._newest.close()
            self._session.close()
            for part in _parts(self):
                part.close()
        super().close()

    def _ask(self, _: Any = None) -> None:
        settings = self.settings
        self._code.value = _pre(self._session.code(settings), CODE)
        self._dim(settings)
        self._newest.ask(settings)

    def _show(self, settings: Settings) -> None:
        self._bar.bar_style, self._error.value = "info", ""
        self._dim(settings)  # again, since the run before may have shown something in the meantime
        start = time.monotonic()
        try:
            for result in self._session.run(settings, self._report):
                self._draw(result)
        except CancelledError:
            return
        except Exception as error:
            self._bar.bar_style, self._status.value = "danger", "failed"
            self._error.value = _pre(f"{type(error).__name__}: {error}\n\nChange a setting to try again.", ERROR)
        else:
            self._result = result
            self._bar.bar_style, self._bar.value = "success", 1.0
            self._status.value = f"done in {time.monotonic() - start:.1f} s"

    def _dim(self, settings: Settings) -> None:
        self._now.dim("guided", "mask", *(() if self._session.keeps_plain(settings) else ("plain",)))

    def _report(self, name: str, done: float) -> None:
        self._newest.check()
        self._bar.value, self._status.value = done, f"sampling: {name}"

    def _draw(self, result: Result) -> None:
        names = self._session.names(result.settings)
        if self._result is not None and self._result.settings != result.settings:
            self._before.fill("before", self._result, result.settings, self._session.names(self._result.settings))
        self._now.fill("now", result, result.settings, names, preview=result.steps < self._session.steps)


def _check(
    shape: Sequence[int],
    choices: dict[str, Sequence[str]],
    conditioning: Any,
    n: int,
    sampler: str,
    decode: Callable[[Tensor], Tensor] | None,
) -> None:
    if bool(choices) != (conditioning is not None):
        raise ValueError(
            "choices are menus of names, and conditioning maps a list of names for each menu to cond and uncond: give both, or "
            f"neither. Got {'no ' if not choices else ''}choices, and {'no ' if conditioning is None else ''}conditioning."
        )
    for menu, names in choices.items():
        if isinstance(names, str) or not names:
            raise ValueError(f"choices[{menu!r}] is a list of one or more names, got {names!r}.")
        if menu in (*SHOWN, "cond_scale", "sampler", "seed"):
            raise ValueError(f"choices has a menu {menu!r}, and that is another control's name: call it otherwise.")
    if len(shape) != 3 or (decode is None and shape[0] not in (1, 3)):
        raise ValueError(
            f"shape is (c, h, w) of a sample, with 1 or 3 channels unless decode, latents → pixels, is given; got {tuple(shape)}."
        )
    if n < 1:
        raise ValueError(f"n is the number of samples, 1 or more, got {n}.")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")


def _controls(session: Session, choices: dict[str, Sequence[str]], seed: int, sampler: str) -> dict[str, Any]:
    """The widgets, by the names in `Settings`."""
    args = session.extra_args
    start = {name: args.get(name, getattr(session.guided, name)) for name in PARAMETERS if name in SHOWN}
    if session.conditioning is not None or args.get("uncond") is not None:
        start["cond_scale"] = args.get("cond_scale", 1.0)
    controls = {name: _control(name, value) for name, value in start.items()}
    controls["sampler"] = widgets.Dropdown(value=sampler, options=SAMPLERS, description="sampler", style=LABEL)
    controls["seed"] = widgets.BoundedIntText(seed, min=0, max=2**53, description="seed", continuous_update=False, style=LABEL)
    for menu, names in choices.items():
        first = tuple(names[: session.n])
        controls[menu] = widgets.SelectMultiple(value=first, options=names, rows=4, description=menu, style=LABEL)
    return controls


def _control(name: str, value: Any) -> Any:
    if isinstance(value, bool):
        return widgets.Checkbox(value, description=name, style=LABEL)
    if isinstance(value, Tensor):
        raise ValueError(f"{name} is one for all samples here, got a tensor of shape {tuple(value.shape)}: give a number.")
    low, high, step = RANGES[name]
    kind = widgets.IntSlider if isinstance(step, int) else widgets.FloatSlider
    return kind(value, min=min(low, value), max=max(high, value), step=step, description=name, continuous_update=False, style=LABEL)


def _columns(controls: dict[str, Any]) -> widgets.HBox:
    """Sliders and switches on the left, menus on the right."""
    left = [control for name, control in controls.items() if name in RANGES or name in SHOWN]
    right = [control for control in controls.values() if control not in left]
    for control in controls.values():
        control.layout.width, control.layout.margin = "auto", "2px 0"
    layouts = [widgets.Layout(flex="1 1 250px", min_width="0", max_width="460px", overflow="visible") for _ in range(2)]
    boxes = [widgets.VBox(column, layout=layout) for column, layout in zip((left, right), layouts, strict=True)]
    return widgets.HBox(boxes, layout=widgets.Layout(flex_flow="row wrap", overflow="visible", grid_gap="0 12px"))


class _Row:
    """A line that says the settings, above a panel of pictures of each kind."""

    def __init__(self, name: str):
        self.label = widgets.HTML(layout=widgets.Layout(margin="0"))
        self.panels = {kind: _panel(title) for kind, title in KINDS.items()}
        wrapped = widgets.Layout(flex_flow="row wrap", grid_gap=f"0 {3 * GAP}px", overflow="visible")
        grid = widgets.HBox(list(self.panels.values()), layout=wrapped)
        self.box = widgets.VBox([self.label, grid], layout=widgets.Layout(display="none", overflow="visible")).add_class(name)

    def dim(self, *kinds: str) -> None:
        for kind in kinds:
            self.panels[kind].add_class("ksag-old")

    def fill(self, title: str, result: Result, other: Settings, names: list[list[Any]], preview: bool = False) -> None:
        """Shows what there is of a result; what differs from the other settings is in bold."""
        captions = [", ".join("any" if name is None else str(name) for name in of_sample) for of_sample in zip(*names, strict=True)]
        for kind, images in _images(result).items():
            columns = math.ceil(len(images) ** 0.5)
            note = f" (preview, {result.steps} steps)" if preview and kind == "guided" else ""
            panel = self.panels[kind]
            panel.value = _titled(KINDS[kind] + note, images, columns, captions or [""] * len(images))
            panel.layout.max_width = f"{columns * (images[0].width + GAP)}px"
            panel.remove_class("ksag-old")
        self.label.value = f'<div style="{TEXT}"><b>{title}</b>: {_said(result.settings, other)}</div>'
        self.box.layout.display = "flex"


def _panel(title: str) -> widgets.HTML:
    return widgets.HTML(_titled(title), layout=widgets.Layout(flex="1 1 130px", min_width="0", margin="0")).add_class("ksag-kind")


def _images(result: Result) -> dict[str, list[Image.Image]]:
    """The pictures of each kind that there are, all of one size."""
    some = next(pixels for pixels in (result.plain, result.guided) if pixels is not None)
    scale = math.ceil(PANEL / math.ceil(len(some) ** 0.5) / some.shape[3])
    images = {}
    if result.plain is not None:
        images["plain"] = [to_image(x, scale) for x in result.plain]
    if result.guided is not None and result.mask is not None:
        images["guided"] = [to_image(x, scale) for x in result.guided]
        images["mask"] = [overlay(*pair) for pair in zip(images["guided"], result.mask, strict=True)]
    return images


def _titled(title: str, images: Sequence[Image.Image] = (), columns: int = 1, captions: Sequence[str] = ()) -> str:
    """HTML of pictures under a title, each above its caption; it suits a light page and a dark one, and any width."""
    figures = [
        f'<figure><img alt="{html.escape(title)} {html.escape(caption)}" src="{_source(image)}">'
        + (f"<figcaption>{html.escape(caption)}</figcaption></figure>" if caption else "</figure>")
        for image, caption in zip(images, captions, strict=True)
    ]
    grid = f"display: grid; gap: {GAP}px; grid-template-columns: repeat({columns}, minmax(0, 1fr))"
    return f'<div style="{TEXT}">{html.escape(title)}</div><div style="{grid}">{"".join(figures)}</div>'


def _source(image: Image.Image) -> str:
    png = io.BytesIO()
    image.save(png, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def _said(settings: Settings, other: Settings) -> str:
    """The settings in a line of HTML."""
    parts = []
    for name, value in settings.items():
        text = ", ".join(value) or f"any {name}" if isinstance(value, tuple) else value if name == "sampler" else f"{name} {value}"
        text = html.escape(text)
        parts.append(text if value == other[name] else f"<b>{text}</b>")
    return " · ".join(parts)


def _parts(widget: widgets.Widget) -> Iterator[widgets.Widget]:
    """Children, layouts and styles: ipywidgets keeps each of them, and with it what observes it, until it is closed itself."""
    for name in ("layout", "style"):
        if hasattr(widget, name):
            yield getattr(widget, name)
    for child in getattr(widget, "children", ()):
        yield from _parts(child)
        yield child


def _pre(text: str, style: str) -> str:
    wrapped = "white-space: pre-wrap; word-break: normal; overflow-wrap: anywhere; line-height: 1.3"
    return f'<pre style="{wrapped}; {style}">{html.escape(text)}</pre>'
