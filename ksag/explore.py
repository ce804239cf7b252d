"""A notebook widget: move a slider, and see what Self-Attention Guidance makes of it; needs the extra `ksag[notebook]`.

from ksag.explore import explore
explore(guided, (3, 32, 32), sigmas, classes=ksag.zoo.CLASSES, conditioning=ksag.zoo.conditioning)
"""

import atexit
import html
import io
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ksag.conditioning import Conditioning
from ksag.denoiser import SAGDenoiser
from ksag.parameters import PER_CALL
from ksag.picture import overlay, to_image
from ksag.samplers import SAMPLERS, sample

try:
    import ipywidgets as widgets
except ImportError as error:
    raise ImportError("ksag.explore needs ipywidgets, which is not installed: pip install 'ksag[notebook]'") from error

# Settings → pictures


@dataclass(frozen=True)
class Settings:
    """What the controls say. Without uncond there is no cond_scale; without conditioning there are no classes."""

    sag_scale: float
    blur_sigma: float
    mask_threshold: float
    sampler: str
    seed: int
    cond_scale: float | None = None
    classes: tuple[str, ...] = ()

    def guidance(self) -> dict[str, float]:
        """The part that goes into a sampler's extra_args."""
        names = ("cond_scale", *PER_CALL)
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Result(NamedTuple):
    """What was sampled at some settings; pixels are (b, 1 or 3, H, W) in [-1, 1], on the CPU."""

    settings: Settings
    plain: Tensor
    """Pixels at sag_scale 0."""
    guided: Tensor
    """Pixels from the same noise, with SAG."""
    mask: Tensor
    """(b, 1, h, w) share of the guided calls in which a pixel of the latent was under the mask; zeros if SAG never acted."""


Report = Callable[[str, float], None]
"""Is told which run is on its way, and how much of it is done, 0 to 1; what it raises ends that run."""


@dataclass
class Session:
    """Settings → pictures, for one wrapper. See `explore` for the fields."""

    guided: SAGDenoiser
    shape: tuple[int, ...]
    sigmas: Tensor
    conditioning: Callable[[list[str]], tuple[Conditioning, Conditioning]] | None
    extra_args: dict[str, Any]
    n: int
    decode: Callable[[Tensor], Tensor] | None
    _plain: tuple[Settings, Tensor] | None = field(default=None, init=False)

    def seeds(self, settings: Settings) -> list[int]:
        """One for each sample: n of them, or more if more classes are chosen."""
        return list(range(settings.seed, settings.seed + max(self.n, len(settings.classes))))

    def names(self, settings: Settings) -> list[str]:
        """The samples' classes: the chosen ones in turn."""
        chosen = settings.classes
        return [chosen[i % len(chosen)] for i in range(len(self.seeds(settings)))] if chosen else []

    @torch.no_grad()
    def run(self, settings: Settings, report: Report) -> Result:
        """Samples without and with SAG; the former only if more than SAG's own settings differ from the last run's."""
        args = {**self.extra_args, **settings.guidance()}
        if self.conditioning is not None:
            if not settings.classes:
                raise ValueError("No class is chosen, so there is nothing to sample. Choose one, or several with Ctrl or Shift.")
            args["cond"], args["uncond"] = self.conditioning(self.names(settings))
        of_sag: dict[str, Any] = dict.fromkeys(PER_CALL, 0.0)
        without = replace(settings, **of_sag)
        if self._plain is None or self._plain[0] != without:
            self._plain = without, self._sample(settings, {**args, "sag_scale": 0.0}, "plain", report)
        with self.guided.trace() as steps:
            pixels = self._sample(settings, args, "with SAG", report)

        masks = [step.mask for step in steps] or [torch.zeros(len(pixels), 1, *self.shape[1:])]
        return Result(settings, self._plain[1], pixels, torch.stack(masks).mean(0))

    def _sample(self, settings: Settings, args: dict[str, Any], name: str, report: Report) -> Tensor:
        def step(info: dict[str, Any]) -> None:
            # by sigma, because not every sampler takes a step for each of the sigmas
            report(name, float((self.sigmas[:-1] >= float(info["sigma"])).float().mean()))

        report(name, 0.0)
        x = sample(settings.sampler, self.guided, self.shape, self.sigmas, self.seeds(settings), args, step)
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
            lines.append(f"cond, uncond = {name}({self.names(settings)})")
            args.append('"cond": cond, "uncond": uncond')
        args.append(", ".join(f'"{name}": {value!r}' for name, value in settings.guidance().items()))
        lines += [
            "args = {",
            *(f"    {part}," for part in args),
            "}",
            f'images = sample("{settings.sampler}", guided, {self.shape}, sigmas, {self.seeds(settings)}, args)',
        ]
        if self.decode is not None:
            given.append("decode")
            lines.append("images = decode(images)")
        return "\n".join([f"# {', '.join(given)}: as given to explore", *lines])


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

PANEL = 320
"""Pixels that the samples of one kind take side by side at least; three kinds fit a notebook's usual width."""

GAP = 6
LABEL = {"description_width": "110px"}
CODE = "user-select: all; padding: 8px; background: var(--jp-layout-color2, #eee)"
ERROR = "font-family: var(--jp-ui-font-family, sans-serif); color: var(--jp-error-color1, #d32f2f)"


class _Row(NamedTuple):
    """A line that says the settings, above a picture of each kind."""

    box: widgets.VBox
    label: widgets.HTML
    panels: widgets.GridBox
    pictures: list[widgets.Image]


class explore(widgets.VBox):
    """Controls for SAG, and below them samples without and with it, from the same noise, which follow the controls.

    A change samples anew, in the background, and ends a run that is on its way. The mask glows the more, the more of the
    guided calls blurred that place. The row "before" keeps what the last other settings gave. What goes wrong is said in
    the widget, and the next change tries again. The text at the end is the code for the settings; a click selects it.

    Args:
        guided: the wrapper; its own settings are what the controls start from, where `extra_args` has no others. It may be
            used elsewhere at the same time.
        shape: (c, h, w) of a sample.
        sigmas: (steps + 1,) noise levels, as `ksag.samplers.sample` takes them, on the model's device.
        classes: names, or prompts, to choose from; needs `conditioning`.
        conditioning: maps a list of names out of `classes`, one for each sample, to cond and uncond, a row each.
        extra_args: passed to `guided` at every call; where it holds an uncond, there is a slider for cond_scale.
        n: number of samples; more if more classes are chosen.
        seed: of the first sample; the others' are those that follow.
        sampler: one of `ksag.samplers.SAMPLERS`.
        decode: latents (b, c, h, w) → pixels (b, 3, H, W) in [-1, 1], for a model that samples latents.

    Attributes:
        controls: the sliders and menus by name; their `value` can be set from code as well.

    Raises:
        ValueError: `classes` without `conditioning` or the reverse, latents without `decode`, no such sampler.

    >>> import k_diffusion as K
    >>> import ksag.zoo
    >>> guided = ksag.SAGDenoiser(ksag.zoo.load(), sag_scale=2.0, cond_key="mapping_cond")
    >>> sigmas = K.sampling.get_sigmas_karras(2, 0.1, 80.0)
    >>> widget = explore(guided, (3, 32, 32), sigmas, classes=ksag.zoo.CLASSES, conditioning=ksag.zoo.conditioning)
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
        classes: Sequence[str] = (),
        conditioning: Callable[[list[str]], tuple[Conditioning, Conditioning]] | None = None,
        extra_args: dict[str, Any] | None = None,
        n: int = 2,
        seed: int = 0,
        sampler: str = "dpmpp_2m",
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        _check(shape, classes, conditioning, n, sampler, decode)
        self._session = Session(guided, tuple(shape), sigmas, conditioning, dict(extra_args or {}), n, decode)
        self._result: Result | None = None

        self.controls = _controls(self._session, classes, seed, sampler)
        self._bar = widgets.FloatProgress(min=0.0, max=1.0, layout=widgets.Layout(width="200px"))
        self._status = widgets.HTML().add_class("ksag-status")
        self._error = widgets.HTML().add_class("ksag-error")
        self._now, self._before = _row("ksag-now"), _row("ksag-before")
        self._code = widgets.HTML().add_class("ksag-code")
        super().__init__([
            _columns(self.controls),
            widgets.HBox([self._bar, self._status]),
            self._error,
            self._now.box,
            self._before.box,
            self._code,
        ])  # fmt: skip

        self._newest = Newest(self._show)
        for control in self.controls.values():
            control.observe(self._ask, "value")
        self._ask()

    @property
    def settings(self) -> Settings:
        """What the controls say now."""
        values: dict[str, Any] = {name: control.value for name, control in self.controls.items()}
        # The browser's steps add up to 0.30000000000000004
        values |= {name: round(value, 6) for name, value in values.items() if isinstance(value, float)}
        return Settings(**values)

    @property
    def result(self) -> Result | None:
        """What was sampled last; None before the first."""
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
            for part in _parts(self):
                part.close()
        super().close()

    def _ask(self, _: Any = None) -> None:
        self._code.value = _pre(self.code, CODE)
        self._newest.ask(self.settings)

    def _show(self, settings: Settings) -> None:
        self._bar.bar_style, self._error.value = "info", ""
        start = time.monotonic()
        try:
            self._draw(self._session.run(settings, self._report))
        except CancelledError:
            return
        except Exception as error:
            self._bar.bar_style, self._status.value = "danger", "failed"
            self._error.value = _pre(f"{type(error).__name__}: {error}\n\nChange a setting to try again.", ERROR)
        else:
            self._bar.bar_style, self._bar.value = "success", 1.0
            self._status.value = f"done in {time.monotonic() - start:.1f} s"

    def _report(self, name: str, done: float) -> None:
        self._newest.check()
        self._bar.value, self._status.value = done, f"sampling: {name}"

    def _draw(self, result: Result) -> None:
        if self._result is not None and self._result.settings != result.settings:
            _fill(self._before, "before", self._result, result.settings)
        _fill(self._now, "now", result, result.settings)
        self._result = result


def _check(
    shape: Sequence[int], classes: Sequence[str], conditioning: Any, n: int, sampler: str, decode: Callable[[Tensor], Tensor] | None
) -> None:
    if bool(classes) != (conditioning is not None):
        raise ValueError(
            "classes are names, and conditioning maps a list of them to cond and uncond: give both, or neither. "
            f"Got {'no ' if not classes else ''}classes, and {'no ' if conditioning is None else ''}conditioning."
        )
    if len(shape) != 3 or (decode is None and shape[0] not in (1, 3)):
        raise ValueError(
            f"shape is (c, h, w) of a sample, with 1 or 3 channels unless decode, latents → pixels, is given; got {tuple(shape)}."
        )
    if n < 1:
        raise ValueError(f"n is the number of samples, 1 or more, got {n}.")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")


def _controls(session: Session, classes: Sequence[str], seed: int, sampler: str) -> dict[str, Any]:
    """The widgets, by the names in `Settings`."""
    guided, args = session.guided, session.extra_args

    def slider(name: str, low: float, high: float, step: float, default: float) -> widgets.FloatSlider:
        value = float(args.get(name, default))
        return widgets.FloatSlider(
            value, min=min(low, value), max=max(high, value), step=step, description=name, continuous_update=False, style=LABEL
        )

    controls = {
        "sag_scale": slider("sag_scale", -2.0, 5.0, 0.1, guided.sag_scale),
        "blur_sigma": slider("blur_sigma", 0.0, 10.0, 0.1, guided.blur_sigma),
        "mask_threshold": slider("mask_threshold", 0.0, 3.0, 0.05, guided.mask_threshold),
    }
    if session.conditioning is not None or args.get("uncond") is not None:
        controls["cond_scale"] = slider("cond_scale", 0.0, 15.0, 0.1, 1.0)
    controls["sampler"] = widgets.Dropdown(value=sampler, options=SAMPLERS, description="sampler", style=LABEL)
    controls["seed"] = widgets.BoundedIntText(seed, min=0, max=2**53, description="seed", continuous_update=False, style=LABEL)
    if session.conditioning is not None:
        controls["classes"] = widgets.SelectMultiple(
            value=tuple(classes[: session.n]), options=classes, rows=4, description="classes", style=LABEL
        )
    return controls


def _columns(controls: dict[str, Any]) -> widgets.HBox:
    """Sliders on the left, menus on the right."""
    sliders = [control for control in controls.values() if isinstance(control, widgets.FloatSlider)]
    menus = [control for control in controls.values() if control not in sliders]
    for control in controls.values():
        control.layout.width = "auto"
    boxes = [widgets.VBox(column, layout=widgets.Layout(flex="1 1 300px", max_width="460px")) for column in (sliders, menus)]
    return widgets.HBox(boxes, layout=widgets.Layout(flex_flow="row wrap"))


def _row(name: str) -> _Row:
    pictures = [widgets.Image(format="png", layout=widgets.Layout(width="100%")) for _ in range(3)]
    titles = ("plain", "with SAG", "mask: glows where SAG blurred")
    panels = [widgets.VBox([_line(title), picture]) for title, picture in zip(titles, pictures, strict=True)]
    grid = widgets.GridBox(
        panels, layout=widgets.Layout(grid_template_columns="repeat(3, minmax(0, 1fr))", grid_gap=f"0 {3 * GAP}px")
    )
    label = _line()
    box = widgets.VBox([label, grid], layout=widgets.Layout(display="none")).add_class(name)
    return _Row(box, label, grid, pictures)


def _parts(widget: widgets.Widget) -> Iterator[widgets.Widget]:
    """Children, layouts and styles: ipywidgets keeps each of them, and with it what observes it, until it is closed itself."""
    for name in ("layout", "style"):
        if hasattr(widget, name):
            yield getattr(widget, name)
    for child in getattr(widget, "children", ()):
        yield from _parts(child)
        yield child


def _line(text: str = "") -> widgets.HTML:
    return widgets.HTML(text, layout=widgets.Layout(margin="6px 2px 0"), style={"font_size": "13px"})


def _fill(row: _Row, title: str, result: Result, other: Settings) -> None:
    """Shows a result; what differs from the other settings is in bold."""
    width = result.plain.shape[3]
    columns = math.ceil(len(result.plain) ** 0.5)
    scale = math.ceil(PANEL / columns / width)
    guided = [to_image(x, scale) for x in result.guided]
    kinds = [to_image(x, scale) for x in result.plain], guided, [overlay(*pair) for pair in zip(guided, result.mask, strict=True)]
    for picture, images in zip(row.pictures, kinds, strict=True):
        picture.value = _png(images, columns)
    row.panels.layout.max_width = f"{3 * columns * (width * scale + GAP) + 3 * GAP}px"
    row.label.value = f"<b>{title}</b>: {_said(result.settings, other)}"
    row.box.layout.display = "flex"


def _said(settings: Settings, other: Settings) -> str:
    """The settings in a line of HTML."""
    parts = []
    for name, value in asdict(settings).items():
        if value not in (None, ()):
            text = {"sampler": value, "classes": html.escape(", ".join(settings.classes))}.get(name, f"{name} {value}")
            parts.append(text if value == getattr(other, name) else f"<b>{text}</b>")
    return " · ".join(parts)


def _png(images: list[Image.Image], columns: int) -> bytes:
    """Pictures of one size in rows, on nothing, so that it suits a light page and a dark one."""
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    canvas = Image.new("RGBA", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP))
    for i, image in enumerate(images):
        canvas.paste(image, (i % columns * (width + GAP), i // columns * (height + GAP)))
    png = io.BytesIO()
    canvas.save(png, format="PNG")
    return png.getvalue()


def _pre(text: str, style: str) -> str:
    return f'<pre style="white-space: pre-wrap; line-height: 1.3; {style}">{html.escape(text)}</pre>'
