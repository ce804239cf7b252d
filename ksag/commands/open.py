"""The options that choose a model and its pictures, and the model that they describe."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from ksag.commands.model import Model
from ksag.commands.options import Function

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def size(value: str) -> tuple[int, int]:
    """
    >>> size("768x512")  # (height, width)
    (512, 768)
    """
    sides = value.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise click.BadParameter(f"{value!r} is not a size: give WIDTHxHEIGHT in pixels, such as 768x512.")
    return int(sides[1]), int(sides[0])


CATEGORY = click.option("--category", show_default="all",
                        help="Categories of emoji: names, parts of names, or any; each seed takes the next.")  # fmt: skip
STYLE = click.option("--style", show_default="any", help="Styles of emoji, such as noto,twemoji; each seed takes the next.")
COND_SCALE = click.option("--cond-scale", type=float, show_default="1; 7.5 with --pipeline, 4.5 for SD 3, 3.5 for Flux dev",
                          help="Strength of classifier-free guidance; 1 is none. Flux dev takes it as an input.")  # fmt: skip
CHECKPOINT_OPTIONS = (
    click.option("--weights", type=FILE, show_default="the bundled model of emoji",
                 help="A k-diffusion model as safetensors, with its config in the metadata."),
    CATEGORY,
    STYLE,
    click.option("--classes", show_default="all", help="Classes of --weights: names or any; each seed takes the next."),
)  # fmt: skip
PIPELINE_OPTIONS = (
    click.option("--pipeline", metavar="PATH_OR_ID",
                 help="Stable Diffusion 1.x, 2.x, XL or 3, or Flux: a folder of diffusers, a hub id, or a .safetensors file."),
    click.option("--prompt", multiple=True, help="What to show. Give several for several pictures; each seed takes the next."),
    click.option("--prompts", type=FILE, help="A text file with a prompt on each line."),
    click.option("--negative-prompt", help="What not to show."),
    click.option("--size", type=size, metavar="WIDTHxHEIGHT", show_default="what the model was trained at", help="In pixels."),
    click.option("--shift", type=click.FloatRange(0, min_open=True), show_default="the model's",
                 help="For flow matching (Stable Diffusion 3, Flux): more means more steps at high noise."),
    click.option("--image", type=FILE, help="Start from this picture."),
    click.option("--strength", type=click.FloatRange(0, 1, min_open=True), show_default="0.75",
                 help="How much of --image to change: 1 is all."),
    click.option("--mask", type=FILE, help="White where --image is repainted, black where it stays."),
    click.option("--clip-skip", type=click.IntRange(1), show_default="the model's",
                 help="The text encoder's layer to use, counted from the end as in A1111: 1 is the last; XL uses 2."),
    click.option("--config", help="A folder or hub id with the model's configuration, for a .safetensors file without the hub."),
    click.option("--offload", is_flag=True, help="Keep on the GPU only the part of the model that is in use."),
)  # fmt: skip


def model_options(command: Function) -> Function:
    for option in reversed((*CHECKPOINT_OPTIONS, *PIPELINE_OPTIONS, COND_SCALE)):
        command = option(command)
    return command


def open_model(options: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Model:
    """The model that the options describe.

    Raises:
        click.UsageError: options of two kinds of model.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False and value != ()}
    weights, pipeline, cond_scale = (given.pop(name, None) for name in ("weights", "pipeline", "cond_scale"))
    if cond_scale is not None and not -float("inf") < cond_scale < float("inf"):
        raise click.UsageError(f"--cond-scale must be a finite number, got {cond_scale}.")
    if weights and pipeline:
        raise click.UsageError("--weights is a k-diffusion model and --pipeline another: give one of them.")
    for name in given:
        flag = f"--{name.replace('_', '-')}"
        if bool(pipeline) == (name in ("category", "style", "classes")):
            raise click.UsageError(f"{flag} is for k-diffusion models." if pipeline else f"{flag} needs --pipeline.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # clip, imported by k-diffusion
        if pipeline:
            from ksag.commands.pipeline import Pipeline

            return Pipeline(pipeline, device, dtype, cond_scale=cond_scale, **given)
        from ksag.commands.checkpoint import Checkpoint

        return Checkpoint(weights, device, dtype, cond_scale=cond_scale, **given)
