"""A picture's settings, as text that A1111 and ComfyUI can read.

a cat
Negative prompt: blurry
Steps: 24, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 3, Size: 512x512, …
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ksag import Direction, GuidedDenoiser, __version__
from ksag.commands.model import Model
from ksag.guidance.cfg import shown

SAMPLER_NAMES = {
    "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "dpm_2": "DPM2", "dpm_2_ancestral": "DPM2 a", "lms": "LMS",
    "dpm_fast": "DPM fast", "dpm_adaptive": "DPM adaptive", "dpmpp_2s_ancestral": "DPM++ 2S a", "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE",
}  # fmt: skip
"""k-diffusion's names → A1111's."""


def text(value: Any) -> str:
    """
    >>> text(2.0), text((0.0, float("inf"))), text(0.1), text(True), text(["mid.0", "up.1"])
    ('2', '0-inf', '0.1', 'True', 'mid.0, up.1')
    """
    if callable(value):
        return shown(value)
    if isinstance(value, (tuple, list)):
        return ("-" if isinstance(value, tuple) else ", ").join(map(text, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def guidance_fields(directions: Sequence[Direction], cfg_rule: Any) -> dict[str, str]:
    """The settings of directions that are switched on.

    >>> from ksag import PAG, cfg
    >>> guidance_fields([PAG(1.5, ["mid.0", "up.1"], every=2)], cfg.plain)  # doctest: +NORMALIZE_WHITESPACE
    {'CFG rule': 'plain', 'PAG scale': '1.5', 'PAG attention': 'mid.0, up.1', 'PAG sigma range': '0-inf', 'PAG every': '2'}
    >>> guidance_fields([], cfg.plain)
    {'CFG rule': 'plain', 'SAG scale': '0'}
    """
    fields = {"CFG rule": text(cfg_rule), **({} if directions else {"SAG scale": "0"})}
    for direction in directions:
        for name in direction.shown:
            fields[f"{direction.name} {name.replace('_', ' ')}"] = text(getattr(direction, name))
    return fields


def sampling_fields(model: Model, guided: GuidedDenoiser, sampler: str, steps: int, schedule: str) -> dict[str, str]:
    """All settings of the model's pictures, except the seed."""
    return {
        "Steps": str(steps),
        "Sampler": SAMPLER_NAMES[sampler],
        "Schedule type": model.own_schedule if schedule == "model" else schedule.capitalize(),
        "CFG scale": text(model.cond_scale),
        **model.fields,
        **guidance_fields(guided.directions, guided.cfg_rule),
    }


def infotext(prompt: str, negative_prompt: str | None, fields: Mapping[str, str], seed: int) -> str:
    """Values with a separator are quoted, as in A1111. ComfyUI needs the line of the negative prompt even if it is empty.

    >>> print(infotext("a cat", "blurry", {"Steps": "24", "Model": "a, b"}, seed=7))  # doctest: +ELLIPSIS
    a cat
    Negative prompt: blurry
    Steps: 24, Model: "a, b", Seed: 7, Version: ksag ...
    """
    all_fields = {**fields, "Seed": str(seed), "Version": f"ksag {__version__}"}
    quoted = {
        name: json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value for name, value in all_fields.items()
    }
    return f"{prompt}\nNegative prompt: {negative_prompt or ''}\n" + ", ".join(f"{name}: {value}" for name, value in quoted.items())
