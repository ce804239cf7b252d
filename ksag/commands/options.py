"""The options that commands share. Those of SAG come from `ksag.model.parameters.PARAMETERS`, which also checks them."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch

from ksag import SAGDenoiser
from ksag.guidance import cfg
from ksag.model.parameters import PARAMETERS
from ksag.samplers import SAMPLERS

RULES: dict[str, Callable[..., cfg.Rule]] = {"plain": lambda: cfg.plain, "rescale": cfg.rescale, "apg": cfg.apg}
SCHEDULES = ("model", "karras", "exponential")


def nearest(word: str, words: Sequence[str]) -> str:
    """
    >>> nearest("kat", ["Cat", "Dog"])
    "'Cat'"
    """
    lower = {known.lower(): known for known in words}
    found = [lower[near] for near in difflib.get_close_matches(word.lower(), lower, n=3, cutoff=0.4)]
    return " or ".join(map(repr, found or words))


class Sampler(click.ParamType):
    """A sampler's name; an unknown one gets the nearest ones."""

    name = "name"

    def convert(self, value: str, param: Any, ctx: Any) -> str:
        if value not in SAMPLERS:
            self.fail(f"{value!r} is not a sampler of k-diffusion. Did you mean {nearest(value, SAMPLERS)}?", param, ctx)
        return value


class Device(click.ParamType):
    """A device that works here; auto picks a GPU where there is one."""

    name = "device"

    def convert(self, value: Any, param: Any, ctx: Any) -> torch.device:
        if isinstance(value, torch.device):
            return value
        if value == "auto":
            value = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            device = torch.device(value)
        except RuntimeError as error:
            self.fail(f"{value!r} is not a device of PyTorch: {str(error).splitlines()[0]}", param, ctx)
        # counted, because a tensor for a trial would make every process take memory of the first GPU
        counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (device.index or 0) >= counts.get(device.type, 1):
            usable = ", ".join(name if count == 1 else f"{name}:0 to {name}:{count - 1}" for name, count in counts.items() if count)
            self.fail(f"{value!r} cannot be used here. PyTorch sees {usable}.", param, ctx)
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


class Rule(click.ParamType):
    """A rule of `ksag.cfg`: plain, or one with its numbers, such as rescale:0.7."""

    name = "rule"

    def convert(self, value: Any, param: Any, ctx: Any) -> cfg.Rule:
        if not isinstance(value, str):
            return value
        name, _, numbers = value.partition(":")
        if name not in RULES:
            self.fail(f"{value!r} is not a rule. Did you mean {nearest(name, list(RULES))}?", param, ctx)
        try:
            return RULES[name](*(float(number) for number in numbers.split(",") if numbers))
        except (TypeError, ValueError) as error:
            self.fail(f"{value!r}: {error}", param, ctx)


SAG_OPTIONS: dict[str, tuple[Any, str]] = {
    "sag_scale": (float, "Strength of Self-Attention Guidance; 0 is none."),
    "blur_sigma": (float, "Blur of what the model attends to, in latent pixels; 0 is none."),
    "blur_kernel_size": (int, "What the blur spans: an odd number of latent pixels."),
    "mask_threshold": (float, "Tokens with more than this many times the average attention are blurred."),
    "sigma_range": ((float, float), "The lowest and the highest sigma at which SAG acts."),
    "one_pass": (bool, "Ask the model once a step rather than twice: faster on a GPU, almost the same picture."),
    "every": (int, "Compute SAG at every so many calls of the model, and keep it between."),
    "cfg_rule": (Rule(), "How --cond-scale acts: plain, rescale[:PHI], or apg[:ETA,NORM_THRESHOLD,MOMENTUM]."),
    "batch_cond": (bool, "Evaluate both sides of --cond-scale in one batch, or one after the other in half the memory."),
    "attention": (str, "The self-attention to look at: middle, or a dotted path."),
}
"""`SAGDenoiser`'s parameters → click type and help."""

LEFT_OUT = {
    "cond_key": "each kind of model has its own",
    "shared_kwargs": "no kind of model here takes a tensor that all samples share",
}
"""`SAGDenoiser`'s parameters that are no options → why."""


SAG_DEFAULTS = {name: inspect.signature(SAGDenoiser).parameters[name].default for name in SAG_OPTIONS}


def _check(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """By the library's own check, so that a bad value is said before the model is loaded."""
    if value is None or param.name not in PARAMETERS:
        return value
    try:
        return PARAMETERS[param.name].check(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _sag_option(name: str) -> Callable:
    type_, text = SAG_OPTIONS[name]
    flag = name.replace("_", "-")
    default = SAG_DEFAULTS[name]
    shown = {"cfg_rule": "plain", "sigma_range": "0 inf"}.get(name, str(default))
    return click.option(
        f"--{flag}/--no-{flag}" if type_ is bool else f"--{flag}",
        type=type_,
        default=None,
        callback=_check,
        metavar="LOW HIGH" if name == "sigma_range" else None,
        show_default=(flag if default else f"no-{flag}") if type_ is bool else shown,
        help=text,
    )


def sag_options(command: Callable) -> Callable:
    """Adds an option for each of `SAG_OPTIONS`; None where it is not given."""
    for name in reversed(SAG_OPTIONS):
        command = _sag_option(name)(command)
    return command


def sampling_options(sampler: str = "euler", steps: int = 24) -> Callable:
    """Adds the sampler's options and the device."""

    def add(command: Callable) -> Callable:
        for option in reversed((
            click.option("--sampler", type=Sampler(), default=sampler, help=f"One of {', '.join(SAMPLERS)}."),
            click.option("--steps", type=click.IntRange(2), default=steps,
                         help="Sampling steps; model calls for dpm_fast; dpm_adaptive chooses its own."),
            click.option("--schedule", type=click.Choice(SCHEDULES), default="model",
                         help="Noise levels: the model's own (a k-diffusion model's are Karras's), or another's."),
            click.option("--device", type=Device(), default="auto", help="cpu, cuda, mps, or auto: a GPU where there is one."),
        )):  # fmt: skip
            command = option(command)
        return command

    return add
