"""The options that commands share, and the directions that they describe. The library's own checks validate their values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import click
import torch
from click.core import ParameterSource

from ksag import PAG, SAG, SEG, Direction
from ksag.guidance import cfg
from ksag.samplers import SAMPLERS

RULES: dict[str, Callable[..., cfg.Rule]] = {"plain": lambda: cfg.plain, "rescale": cfg.rescale, "apg": cfg.apg}
SCHEDULES = ("model", "karras", "exponential")
MAX_STEPS = 10**5

Function = TypeVar("Function", bound=Callable[..., Any])


# Types of values, as functions


def device(value: str) -> torch.device:
    """A device that can be used here; auto is a GPU if there is one."""
    if value == "auto":
        value = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(value)
    except RuntimeError as error:
        raise click.BadParameter(f"{value!r} is not a device of PyTorch.") from error
    # counted, because a tensor for a trial would make every process take memory of the first GPU
    count = getattr(getattr(torch, found.type, None), "device_count", lambda: 0)()
    if (found.index or 0) >= count:
        raise click.BadParameter(f"{value!r} cannot be used here: PyTorch sees {count} devices of this kind.")
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


def rule(value: str) -> cfg.Rule:
    """A rule of `ksag.cfg`: plain, or one with its numbers, such as rescale:0.7."""
    name, _, numbers = value.partition(":")
    if name not in RULES:
        raise click.BadParameter(f"{value!r} is not one of {', '.join(RULES)}.")
    try:
        return RULES[name](*(float(number) for number in numbers.split(",") if numbers))
    except TypeError as error:
        raise click.BadParameter(f"{value!r} has too many numbers.") from error
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from error


# Guidance


DEFAULTS: dict[type[SAG | PAG | SEG], Direction] = {SAG: SAG(), PAG: PAG(0.0), SEG: SEG(0.0)}
"""The library's, but PAG and SEG are off."""


class Option(NamedTuple):
    kind: type[SAG | PAG | SEG]
    setting: str
    help: str


EVERY = "Compute {} only at every n-th model call, and reuse it at the calls after."
RANGE = "The lowest and the highest sigma at which {} acts."
SCALE = "Strength of {}; 0 switches it off."
OPTIONS = {
    "sag_scale": Option(SAG, "scale", SCALE.format("Self-Attention Guidance")),
    "blur_sigma": Option(SAG, "blur_sigma", "Blur of the regions that the model attends to, in latent pixels."),
    "blur_kernel_size": Option(SAG, "blur_kernel_size", "Width of the blur, an odd number of latent pixels."),
    "mask_threshold": Option(SAG, "mask_threshold", "Tokens with more than this many times the average attention are blurred."),
    "attention": Option(SAG, "attention", "The self-attention layer that SAG reads: middle, or a dotted path."),
    "sigma_range": Option(SAG, "sigma_range", RANGE.format("SAG")),
    "one_pass": Option(
        SAG, "one_pass",
        "Approximate SAG in one model call per step. Saves time where the model's batch of three costs less than two calls "
        "(mostly on a GPU with small batches); on a CPU use --every.",
    ),
    "every": Option(SAG, "every", EVERY.format("SAG")),
    "pag_scale": Option(PAG, "scale", SCALE.format("Perturbed-Attention Guidance")),
    "pag_attention": Option(PAG, "attention", "A self-attention layer that PAG perturbs; give several for several layers."),
    "pag_sigma_range": Option(PAG, "sigma_range", RANGE.format("PAG")),
    "pag_every": Option(PAG, "every", EVERY.format("PAG")),
    "seg_scale": Option(SEG, "scale", SCALE.format("Smoothed Energy Guidance")),
    "seg_blur_sigma": Option(SEG, "blur_sigma", "Blur of the queries, in tokens; inf replaces them by their mean."),
    "seg_attention": Option(SEG, "attention", "A self-attention layer that SEG blurs; give several for several layers."),
    "seg_sigma_range": Option(SEG, "sigma_range", RANGE.format("SEG")),
    "seg_every": Option(SEG, "every", EVERY.format("SEG")),
}  # fmt: skip
"""Name → the setting of a direction."""


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def guidance_options(command: Function) -> Function:
    """Adds an option for each of `OPTIONS`, and for the wrapper."""
    batch_cond = "Evaluate all predictions of a step in one batch, or one by one in less memory."
    cfg_rule = "How --cond-scale acts: plain, rescale[:PHI], or apg[:ETA,NORM_THRESHOLD,MOMENTUM]."
    command = click.option("--batch-cond/--no-batch-cond", default=True, help=batch_cond)(command)
    command = click.option("--cfg-rule", type=rule, default="plain", help=cfg_rule)(command)
    for name, (kind, setting, words) in reversed(OPTIONS.items()):
        flag, value = flag_of(name), getattr(DEFAULTS[kind], setting)
        several = setting == "attention" and kind is not SAG
        command = click.option(
            f"{flag}/--no-{flag[2:]}" if isinstance(value, bool) else flag,
            default=[value] if several else value,
            multiple=several,
            nargs=2 if setting == "sigma_range" else 1,
            metavar={"attention": "PATH", "sigma_range": "LOW HIGH"}.get(setting),
            help=words,
        )(command)
    return command


def directions(options: dict[str, Any], recommended: Sequence[Direction] = ()) -> list[Direction]:
    """The directions that the options of a command describe and switch on.

    Args:
        options: all options of the command; those in `OPTIONS` are removed.
        recommended: replace the library's defaults where no option is given. Their scales do so only where no scale is given.

    Raises:
        click.UsageError: settings of a direction that is off, without its scale.
        ValueError: a value out of its range.
    """
    context, values = click.get_current_context(), {name: options.pop(name) for name in OPTIONS}
    given = [name for name in OPTIONS if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    scaled = any(OPTIONS[name].setting == "scale" for name in given)
    made: list[Direction] = []
    for kind, default in DEFAULTS.items():
        names = [name for name, option in OPTIONS.items() if option.kind is kind]
        start = next((direction for direction in recommended if type(direction) is kind), default)
        settings = {OPTIONS[name].setting: getattr(start, OPTIONS[name].setting) for name in names}
        if scaled:
            settings["scale"] = default.scale
        own = [name for name in names if name in given]
        settings |= {OPTIONS[name].setting: values[name] for name in own}
        if isinstance(settings["attention"], tuple):  # of an option that was given several times
            settings["attention"] = list(settings["attention"])
        if settings["scale"] != 0:
            made.append(kind(**settings))
        elif own and names[0] not in own:
            raise click.UsageError(f"{flag_of(own[0])} needs {flag_of(names[0])}: {default.name} is off.")
    return made


def sampling_options(sampler: str = "euler", steps: int = 24) -> Callable[[Function], Function]:
    """Adds the sampler's options and the device."""

    def add(command: Function) -> Function:
        for option in reversed((
            click.option("--sampler", type=click.Choice(SAMPLERS), default=sampler, help="Of k-diffusion."),
            click.option("--steps", type=click.IntRange(2, MAX_STEPS), default=steps,
                         help="Sampling steps; model calls for dpm_fast; dpm_adaptive chooses its own."),
            click.option("--device", type=device, default="auto", help="cpu, cuda, mps, or auto: a GPU if there is one."),
        )):  # fmt: skip
            command = option(command)
        return command

    return add
