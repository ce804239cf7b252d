"""The options that commands share, and the directions that they describe. The library's own checks validate their values."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import click
import torch

from ksag import PAG, SAG, SEG, Direction, GuidedDenoiser
from ksag.commands.model import Model
from ksag.guidance import cfg
from ksag.model.parameters import CHECKS
from ksag.samplers import SAMPLERS

RULES: dict[str, Callable[..., cfg.Rule]] = {"plain": lambda: cfg.plain, "rescale": cfg.rescale, "apg": cfg.apg}
SCHEDULES = ("model", "karras", "exponential")

Function = TypeVar("Function", bound=Callable[..., Any])


def nearest(word: str, words: Sequence[str]) -> str:
    """
    >>> nearest("kat", ["Cat", "Dog"])
    "'Cat'"
    """
    lower = {known.lower(): known for known in words}
    found = [lower[near] for near in difflib.get_close_matches(word.lower(), lower, n=3, cutoff=0.4)]
    return " or ".join(map(repr, found or words))


# Types of values, as functions


def sampler(value: str) -> str:
    if value not in SAMPLERS:
        raise click.BadParameter(f"{value!r} is not a sampler of k-diffusion. Did you mean {nearest(value, SAMPLERS)}?")
    return value


def device(value: str) -> torch.device:
    """A device that can be used here; auto is a GPU if there is one."""
    if value == "auto":
        value = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(value)
    except RuntimeError as error:
        raise click.BadParameter(f"{value!r} is not a device of PyTorch: {str(error).splitlines()[0]}") from error
    # counted, because a tensor for a trial would make every process take memory of the first GPU
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (found.index or 0) >= counts.get(found.type, 1):
        usable = ", ".join(name if count == 1 else f"{name}:0 to {name}:{count - 1}" for name, count in counts.items() if count)
        raise click.BadParameter(f"{value!r} cannot be used here. PyTorch sees {usable}.")
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


def rule(value: str) -> cfg.Rule:
    """A rule of `ksag.cfg`: plain, or one with its numbers, such as rescale:0.7."""
    name, _, numbers = value.partition(":")
    if name not in RULES:
        raise click.BadParameter(f"{value!r} is not a rule. Did you mean {nearest(name, list(RULES))}?")
    try:
        return RULES[name](*(float(number) for number in numbers.split(",") if numbers))
    except (TypeError, ValueError) as error:
        raise click.BadParameter(f"{value!r}: {error}") from error


def layers(value: str) -> list[str]:
    """
    >>> layers("mid.0, up.1")
    ['mid.0', 'up.1']
    """
    return [path.strip() for path in value.split(",")]


# Guidance


class Option(NamedTuple):
    owner: type[Direction] | type[GuidedDenoiser]
    setting: str
    """The parameter of `owner`."""
    type: Any
    help: str


EVERY = "Compute {} only at every n-th model call, and reuse it at the calls after."
RANGE = "The lowest and the highest sigma at which {} acts."
OPTIONS = {
    "sag_scale": Option(SAG, "scale", float, "Strength of Self-Attention Guidance; 0 switches it off."),
    "blur_sigma": Option(SAG, "blur_sigma", float, "Blur of the regions that the model attends to, in latent pixels."),
    "blur_kernel_size": Option(SAG, "blur_kernel_size", int, "Width of the blur, an odd number of latent pixels."),
    "mask_threshold": Option(
        SAG, "mask_threshold", float, "Tokens with more than this many times the average attention are blurred."
    ),
    "attention": Option(SAG, "attention", str, "The self-attention layer that SAG reads: middle, or a dotted path."),
    "sigma_range": Option(SAG, "sigma_range", (float, float), RANGE.format("SAG")),
    "one_pass": Option(
        SAG, "one_pass", bool,
        "Approximate SAG in one model call per step. Saves time where the model's batch of three costs less than two calls "
        "(mostly on a GPU with small batches); on a CPU use --every.",
    ),
    "every": Option(SAG, "every", int, EVERY.format("SAG")),
    "pag_scale": Option(PAG, "scale", float, "Strength of Perturbed-Attention Guidance; 0 switches it off."),
    "pag_attention": Option(
        PAG, "attention", layers, "The self-attention layers that PAG perturbs: middle, or dotted paths, separated by commas."
    ),
    "pag_sigma_range": Option(PAG, "sigma_range", (float, float), RANGE.format("PAG")),
    "pag_every": Option(PAG, "every", int, EVERY.format("PAG")),
    "seg_scale": Option(SEG, "scale", float, "Strength of Smoothed Energy Guidance; 0 switches it off."),
    "seg_blur_sigma": Option(SEG, "blur_sigma", float, "Blur of the queries, in tokens; inf replaces them by their mean."),
    "seg_attention": Option(
        SEG, "attention", layers, "The self-attention layers that SEG blurs: middle, or dotted paths, separated by commas."
    ),
    "seg_sigma_range": Option(SEG, "sigma_range", (float, float), RANGE.format("SEG")),
    "seg_every": Option(SEG, "every", int, EVERY.format("SEG")),
    "cfg_rule": Option(
        GuidedDenoiser, "cfg_rule", rule, "How --cond-scale acts: plain, rescale[:PHI], or apg[:ETA,NORM_THRESHOLD,MOMENTUM]."
    ),
    "batch_cond": Option(
        GuidedDenoiser, "batch_cond", bool, "Evaluate all predictions of a step in one batch, or one by one in less memory."
    ),
}  # fmt: skip
"""Name → what it sets."""

LEFT_OUT = {
    "inner_model": "the model", "directions": "the other options", "cond_key": "chosen for each kind of model",
    "shared_kwargs": "no model here takes a tensor that all samples share", "check_attention": "checking costs next to nothing",
    "blur_time": "no model here makes videos",
}  # fmt: skip
"""Parameters of `GuidedDenoiser` and the directions without an option → why."""


def default(name: str) -> Any:
    """The library's default; PAG and SEG are off."""
    owner, setting, *_ = OPTIONS[name]
    if setting == "scale" and owner is not SAG:
        return 0.0
    return inspect.signature(owner).parameters[setting].default


def directions(given: Mapping[str, Any], recommended: Iterable[Direction] = ()) -> list[Direction]:
    """The directions that the options describe and switch on.

    Args:
        given: values of options; the others are missing or None.
        recommended: replace the library's defaults. A scale of 0 recommends the other settings of a direction that is off.

    Raises:
        click.UsageError: settings of a direction that is off by default, without its scale.
        ValueError: a value out of its range.
    """
    made: list[Direction] = []
    for kind in (SAG, PAG, SEG):
        names = [name for name, option in OPTIONS.items() if option.owner is kind]
        own = {OPTIONS[name].setting: given[name] for name in names if given.get(name) is not None}
        start = {OPTIONS[name].setting: default(name) for name in names}
        for known in recommended:
            if type(known) is kind:
                start |= {name: getattr(known, name) for name in known.shown}
        direction = kind(**{**start, **own})
        if direction.scale != 0:
            made.append(direction)
        elif own and "scale" not in own:
            first = next(name for name in names if given.get(name) is not None)
            raise click.UsageError(f"{flag_of(first)} needs {flag_of(names[0])}: {kind.name} is off by default.")
    return made


def wrapped(model: Model, given: Mapping[str, Any], recommended: Iterable[Direction]) -> GuidedDenoiser:
    """The model's denoiser, wrapped as the options say; see `directions`."""
    own = {name: given.get(name, default(name)) for name, option in OPTIONS.items() if option.owner is GuidedDenoiser}
    return GuidedDenoiser(model.denoiser, directions(given, recommended), cond_key=model.cond_key, **own)


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """By the library's own check, so that a bad value is an error before the model is loaded."""
    if param.multiple:
        value = [path for paths in value for path in paths] or None
    owner, setting, *_ = OPTIONS[str(param.name)]
    check = CHECKS.get(setting, getattr(getattr(owner, setting, None), "check", None))
    try:
        return value if value is None or check is None else check(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _guidance_option(name: str) -> Callable[[Function], Function]:
    option, flag = OPTIONS[name], flag_of(name)
    value = default(name)
    shown = {"cfg_rule": "plain"}.get(name, " ".join(f"{end:g}" for end in value) if isinstance(value, tuple) else str(value))
    if option.type is bool:
        flag, shown = f"{flag}/--no-{flag[2:]}", flag[2:] if value else f"no-{flag[2:]}"
    metavar = {"sigma_range": "LOW HIGH", "attention": "PATHS" if option.type is layers else "PATH"}.get(option.setting)
    return click.option(
        flag,
        type=option.type,
        default=None,
        multiple=option.type is layers,
        callback=_check,
        metavar=metavar,
        show_default=shown,
        help=option.help,
    )


def guidance_options(command: Function) -> Function:
    """Adds an option for each of `OPTIONS`; None if it is not given."""
    for name in reversed(OPTIONS):
        command = _guidance_option(name)(command)
    return command


def sampling_options(sampler_name: str = "euler", steps: int = 24) -> Callable[[Function], Function]:
    """Adds the sampler's options and the device."""

    def add(command: Function) -> Function:
        for option in reversed((
            click.option("--sampler", type=sampler, default=sampler_name, help=f"One of {', '.join(SAMPLERS)}."),
            click.option("--steps", type=click.IntRange(2), default=steps,
                         help="Sampling steps; model calls for dpm_fast; dpm_adaptive chooses its own."),
            click.option("--schedule", type=click.Choice(SCHEDULES), default="model",
                         help="Noise levels: the model's own (Karras's for a k-diffusion model), or another's."),
            click.option("--device", type=device, default="auto", help="cpu, cuda, mps, or auto: a GPU if there is one."),
        )):  # fmt: skip
            command = option(command)
        return command

    return add
