"""A notebook widget with a slider for each setting of a wrapper's directions; needs the extra `ksag[notebook]`.

from ksag.explore import explore
choices = {"category": ksag.zoo.CATEGORIES, "style": ksag.zoo.STYLES}
explore(guided, (3, 64, 64), sigmas, choices=choices, conditioning=ksag.zoo.conditioning)
"""

import base64
import concurrent.futures
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ksag import plot
from ksag.denoiser import GuidedDenoiser
from ksag.model.conditioning import Conditioning
from ksag.samplers import SAMPLERS, sample

try:
    import ipywidgets as widgets
    from IPython.display import display
except ImportError as error:
    raise ImportError("ksag.explore needs ipywidgets. In a clone of ksag: pip install '.[notebook]'") from error

Settings = dict[str, Any]  # the values of the controls, by name
RANGES = {"blur_sigma": (0.0, 10.0, 0.1), "mask_threshold": (0.0, 3.0, 0.05), "cond_scale": (0.0, 15.0, 0.1)}
ANY = "any"  # in a menu: no choice
VIEW = "application/vnd.jupyter.widget-view+json"


class Result(NamedTuple):
    """Samples at some settings, decoded, on the CPU: (b, c, *spatial) each, from the same noise."""

    settings: Settings
    plain: Tensor | None  # every scale at 0; None before it is sampled
    guided: Tensor
    middle: Tensor | None  # after one plain Euler step to a sigma at which a direction acts; where previews start
    is_preview: bool


@dataclass(frozen=True)
class Sampling:
    """The arguments of `explore` that decide what is sampled; `menus` are the names of its `choices`."""

    guided: GuidedDenoiser
    shape: tuple[int, ...]
    sigmas: Tensor
    menus: tuple[str, ...]
    conditioning: Callable[..., tuple[Conditioning, Conditioning]] | None
    extra_args: dict[str, Any]
    n: int
    decode: Callable[[Tensor], Tensor] | None

    def keywords(self) -> Settings:
        """The directions' keywords for a call, and the values that they replace."""
        return {word: getattr(direction, name) for direction in self.guided.directions for word, name in direction.keywords.items()}

    def start(self) -> Settings:
        """The keywords that have a slider, and the values to start from."""
        cfg = {"cond_scale": 1.0} if self.conditioning is not None or self.extra_args.get("uncond") is not None else {}
        return {word: self.extra_args.get(word, value) for word, value in {**self.keywords(), **cfg}.items()}

    def seeds(self, settings: Settings) -> list[int]:
        return list(range(settings["seed"], settings["seed"] + self.n))

    def names(self, settings: Settings) -> list[list[str | None]]:
        return [[None if settings[menu] == ANY else settings[menu]] * self.n for menu in self.menus]

    @torch.no_grad()
    def run(self, settings: Settings, last: Result | None, report: Callable[[str, float], None]) -> Iterator[Result]:
        """Yields a preview, then plain samples with it, then the whole result. Plain samples of the last result that fit are kept.

        `report` is called with the name and the progress, 0 to 1, of a part; an error that it raises ends the run.
        """
        args, directions = {**self.extra_args, **{word: settings[word] for word in self.start()}}, self.guided.directions
        if self.conditioning is not None:
            args["cond"], args["uncond"] = self.conditioning(*self.names(settings))
        off = {word: 0.0 for direction in directions for word, name in direction.keywords.items() if name == "scale"}

        def sampled(label: str, sampler: str, sigmas: Tensor, **scales: float) -> Tensor:
            def step(info: dict[str, Any]) -> None:
                # by sigma, because not every sampler takes a step for each of the sigmas
                report(label, float((sigmas[:-1] >= float(info["sigma"])).float().mean()))

            report(label, 0.0)
            return sample(sampler, self.guided.run(), self.shape, sigmas, self.seeds(settings), {**args, **scales}, step)

        decode = self.decode or (lambda x: x)
        kept = last is not None and all(last.settings[k] == settings[k] for k in settings.keys() - self.keywords().keys())
        plain, middle, preview = (last.plain, last.middle, None) if last is not None and kept else (None, None, None)
        if len(self.sigmas) > 4:
            inner = self.sigmas[1:-1].tolist()
            ranges = [direction.sigma_range for direction in directions]
            acting = [i for i, sigma in enumerate(inner, 1) if any(low <= sigma <= high for low, high in ranges)] or [1]
            two = self.sigmas[[0, acting[len(acting) // 2]]]
            middle = sampled("preview", "euler", two, **off) if middle is None else middle
            preview = decode(self.guided.run()(middle, two[1].expand(self.n), **args)).cpu()
            yield Result(settings, plain, preview, middle, is_preview=True)
        if plain is None:
            plain = decode(sampled("plain", settings["sampler"], self.sigmas, **off)).cpu()
            if preview is not None:
                yield Result(settings, plain, preview, middle, is_preview=True)
        yield Result(settings, plain, decode(sampled("guided", settings["sampler"], self.sigmas)).cpu(), middle, is_preview=False)

    def code(self, settings: Settings) -> str:
        """Python code that samples `Result.guided` at these settings, bit for bit, as `images`."""
        given = {"conditioning": self.conditioning, "extra_args": self.extra_args, "decode": self.decode}
        names = ["guided", "sigmas", *(name for name, value in given.items() if value)]
        lines, args = [f"# {', '.join(names)}: as given to explore", "from ksag.samplers import sample"], []
        if self.extra_args:
            args.append("**extra_args")
        if self.conditioning is not None:
            lines.append(f"cond, uncond = conditioning({', '.join(map(repr, self.names(settings)))})")
            args.append('"cond": cond, "uncond": uncond')
        args.append(", ".join(f'"{word}": {settings[word]!r}' for word in self.start()))
        call = f'sample("{settings["sampler"]}", guided, {self.shape}, sigmas, {self.seeds(settings)}, args)'
        lines += ["args = {", *(f"    {part}," for part in args if part), "}"]
        lines.append(f"images = {call if self.decode is None else f'decode({call})'}")
        return "\n".join(lines)

    def picture(self, result: Result) -> bytes:
        """A PNG: a row of plain samples and a row of guided ones under the settings."""
        label = "with " + " + ".join(direction.name for direction in self.guided.directions)
        rows = {"plain": torch.zeros_like(result.guided) if result.plain is None else result.plain, label: result.guided}
        figure = plot.compare(rows, names=[f"seed {i}" for i in self.seeds(result.settings)])
        values = [f"{name} {value}" for name, value in result.settings.items() if name not in ("seed", *self.menus)]
        values += [f"{menu}: {result.settings[menu]}" for menu in self.menus] + ["preview"] * result.is_preview
        figure.suptitle(", ".join(values), fontsize=plot.FONT, wrap=True)
        return figure._repr_png_()


class explore(widgets.VBox):  # type: ignore[misc]
    """Controls for the directions of a wrapper, and samples without and with them, from the same noise.

    A change ends a run that is under way, and samples again in the background: first a preview of two steps, then plain samples,
    then samples with the directions. Errors are shown in the widget, and the Python code for the settings. A notebook without
    a kernel shows a picture of the last samples.

    Args:
        guided: the wrapper; it is not changed, and may be used elsewhere at the same time. Each keyword that its directions take
            in a call has a slider: `sag_scale`, `blur_sigma` and `mask_threshold` for SAG, `pag_scale`, `seg_scale`.
        shape: (c, *spatial) of a sample.
        sigmas: (steps + 1,) noise levels, as `ksag.samplers.sample` takes them, on the model's device.
        choices: menus, such as {"category": ksag.zoo.CATEGORIES} or {"prompt": ["a cat", "a dog"]}; needs `conditioning`.
        conditioning: called with a list for each menu, the chosen name (None for "any") for each sample; returns cond and uncond.
        extra_args: passed at every call; the sliders start from its values. An uncond in it adds a slider for cond_scale.
        n: number of samples.
        sampler: one of `ksag.samplers.SAMPLERS`.
        decode: latents → pixels, for a model that samples latents; see `ksag.plot`.

    Attributes:
        controls: the sliders and menus by name; code may assign their `value`.
        result: the last complete `Result`; None before the first.
        error: the message of the last run if it failed, or "".

    Raises:
        ValueError: `choices` without `conditioning` or the reverse.
    """

    def __init__(
        self,
        guided: GuidedDenoiser,
        shape: Sequence[int],
        sigmas: Tensor,
        *,
        choices: Mapping[str, Sequence[str]] | None = None,
        conditioning: Callable[..., tuple[Conditioning, Conditioning]] | None = None,
        extra_args: dict[str, Any] | None = None,
        n: int = 2,
        sampler: str = "dpmpp_2m",
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        if bool(choices) != (conditioning is not None):
            raise ValueError(
                "Give both choices and conditioning, which maps a list of names for each menu to cond and uncond, or neither."
            )
        menus, args = dict(choices or {}), dict(extra_args or {})
        self._sampling = Sampling(guided, tuple(shape), sigmas, tuple(menus), conditioning, args, n, decode)
        self.controls = _controls(self._sampling, menus, sampler)
        self.result: Result | None = None
        self.error = ""
        self._last: Result | None = None
        self._wanted: Settings | None = None
        self._progress = widgets.FloatProgress(max=1.0, style={"description_width": "initial"})
        self._image = widgets.Image(layout={"align_self": "flex-start", "max_width": "calc(100% - 4px)"})
        self._text = widgets.Output()
        self._hidden, self._static = widgets.Box(layout={"display": "none"}), None
        left = widgets.VBox(list(self.controls.values()), layout={"flex": "1 1 300px", "max_width": "400px"})
        right = widgets.VBox([self._progress, self._image], layout={"flex": "1 1 400px"})
        super().__init__([widgets.HBox([left, right], layout={"flex_flow": "row wrap"}), self._text])
        self.add_class("ksag-explore")
        # one thread for all runs, because CUDA graphs are captured for each thread
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ksag.explore")
        for control in self.controls.values():
            control.observe(self._changed, "value")
        self._changed()

    @property
    def settings(self) -> Settings:
        """The values of the controls, by name."""
        values = {name: control.value for name, control in self.controls.items()}
        return {name: round(v, 6) if isinstance(v, float) else v for name, v in values.items()}  # not 0.30000000000000004

    @property
    def code(self) -> str:
        """Python code that samples the same images as the controls' settings, bit for bit, as `images`."""
        return self._sampling.code(self.settings)

    def wait(self, timeout: float | None = None) -> bool:
        """Until the controls' settings are sampled, or have failed; False if that takes longer than `timeout` seconds."""
        return not concurrent.futures.wait([self._run], timeout).not_done

    def close(self) -> None:
        """Ends the run that is under way, takes the widget off the page, and releases `guided`.

        Python waits for a run that is under way when it ends.
        """
        if hasattr(self, "_thread"):  # not if an argument was refused: a widget is closed when it is deleted, too
            self._wanted = None
            self._thread.shutdown(wait=False, cancel_futures=True)
            for part in (*self.controls.values(), self._progress, self._image, self._text, self._hidden):
                part.unobserve_all()
                part.close()
        super().close()

    def _changed(self, _: Any = None) -> None:
        data = {"text/markdown": f"```python\n{self.code}\n```", "text/plain": self.code}
        self._text.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)
        self._wanted = settings = self.settings
        self._run = self._thread.submit(self._sample, settings)

    def _sample(self, settings: Settings) -> None:
        def report(name: str, done: float) -> None:
            if settings is not self._wanted:
                raise concurrent.futures.CancelledError
            self._progress.value, self._progress.description = done, name

        start, self.error, self._progress.bar_style = time.monotonic(), "", "info"
        try:
            for result in self._sampling.run(settings, self._last, report):
                self._last, self._image.value = result, self._sampling.picture(result)
        except Exception as error:
            if settings is not self._wanted:
                return
            self.error = f"{type(error).__name__}: {error}"
            shown = {"output_type": "stream", "name": "stderr", "text": f"{self.error}\nChange a setting to try again.\n"}
            self._text.outputs = (shown, *self._text.outputs)
            self._progress.bar_style, self._progress.description = "danger", "failed"
        else:
            self.result = self._last
            self._progress.bar_style, self._progress.value = "success", 1.0
            self._progress.description = f"{time.monotonic() - start:.1f} s"
            if self._static is not None:
                self._static.update(self._without_a_kernel(), raw=True)

    def _without_a_kernel(self) -> dict[str, Any]:
        """An output that is empty as long as a kernel shows the widget, and a picture without one."""
        picture = {"image/png": base64.b64encode(self._image.value).decode()} if self._image.value else {}
        return {VIEW: self._hidden._repr_mimebundle_()[VIEW], "text/plain": self.code, **picture}

    def _ipython_display_(self) -> None:
        self.wait(1)
        display({VIEW: self._repr_mimebundle_()[VIEW], "text/plain": ""}, raw=True)  # type: ignore[no-untyped-call]
        self._static = display(self._without_a_kernel(), raw=True, display_id=True)  # type: ignore[no-untyped-call]


def _controls(sampling: Sampling, menus: dict[str, Sequence[str]], sampler: str) -> dict[str, Any]:
    """Sliders, the sampler, the seed and menus, by name."""
    options = {"style": {"description_width": "110px"}, "layout": {"width": "auto"}}
    controls = {}
    for name, value in sampling.start().items():
        low, high, step = RANGES.get(name, (-2.0, 8.0, 0.05))
        limits = {"min": min(low, float(value)), "max": max(high, float(value)), "step": step, "continuous_update": False}
        controls[name] = widgets.FloatSlider(float(value), description=name, **limits, **options)
    controls["sampler"] = widgets.Dropdown(value=sampler, options=SAMPLERS, description="sampler", **options)
    controls["seed"] = widgets.BoundedIntText(0, min=0, max=2**53, description="seed", continuous_update=False, **options)
    for menu, names in menus.items():
        controls[menu] = widgets.Dropdown(value=names[0], options=[ANY, *names], description=menu, **options)
    return controls
