"""What made a picture, as the text that A1111's and ComfyUI's readers parse.

a cat
Negative prompt: blurry
Steps: 24, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 3, Size: 512x512, …
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ksag import __version__
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
    >>> text(2.0), text((0.0, float("inf"))), text(0.1), text(True), text("middle")
    ('2', '0-inf', '0.1', 'True', 'middle')
    """
    if callable(value):
        return shown(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "-".join(map(text, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def sag_fields(settings: Mapping[str, Any]) -> dict[str, str]:
    """`SAGDenoiser`'s settings, as far as they matter to the picture.

    >>> sag_fields({"sag_scale": 0.5, "blur_sigma": 2.0})
    {'SAG scale': '0.5', 'SAG blur sigma': '2'}
    >>> sag_fields({"sag_scale": 0.0, "blur_sigma": 2.0})
    {'SAG scale': '0'}
    """
    names = ("sag_scale", "cfg_rule") if settings["sag_scale"] == 0 else [name for name in settings if name != "batch_cond"]
    label = {"sag_scale": "SAG scale", "cfg_rule": "CFG rule"}
    return {label.get(name, f"SAG {name.replace('_', ' ')}"): text(settings[name]) for name in names if name in settings}


def sampling_fields(model: Model, sag: Mapping[str, Any], sampler: str, steps: int, schedule: str) -> dict[str, str]:
    """All that makes the model's pictures, but for the seed."""
    return {
        "Steps": str(steps),
        "Sampler": SAMPLER_NAMES[sampler],
        "Schedule type": model.own_schedule if schedule == "model" else schedule.capitalize(),
        "CFG scale": text(model.cond_scale),
        **model.fields,
        **sag_fields(sag),
    }


def infotext(prompt: str, negative_prompt: str | None, fields: Mapping[str, str], seed: int) -> str:
    """Quotes a value that holds a separator, as A1111 does. ComfyUI's reader wants the line of the negative prompt, empty or not.

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
