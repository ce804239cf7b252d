"""Helpers for tests of the commands: calling them, reading their files, and small models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import k_diffusion as K
import torch
from click.testing import CliRunner
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ksag import zoo
from ksag.commands.cli import main
from tests.models import randomise


def invoke(*args, code=0):
    """The command's output, in one line of single spaces."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


def process(*args, launcher=(), env=(), **options):
    """The command as a separate process, under a launcher or not."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(env)}
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "ksag", *map(str, args)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=Path(__file__).parent.parent, **streams, **options)


def pixels(path):
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB")).float()


def text(path):
    with Image.open(path) as image:
        return image.text["parameters"]


def a1111(infotext):
    """A1111's parse_generation_parameters, in short."""
    *lines, last = infotext.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    start = next(i for i, line in enumerate(lines) if line.startswith("Negative prompt:"))
    return "\n".join(lines[:start]), "\n".join(lines[start:])[16:].strip(), dict(pairs)


def comfyui(infotext):
    """ComfyUI's importA1111, in short."""
    at, before = infotext.rindex("\nSteps:"), infotext.rindex("\nNegative prompt:")
    found = re.findall(r'\s*([^:]+:\s*([^"\{].*?|".*?"|\{.*?\}))\s*(?:,|$)', infotext[at + 1 :].split("\n")[0])
    return infotext[:before], infotext[before + 18 : at], dict(pair.split(": ", 1) for pair, _ in found)


READERS = [a1111, comfyui]


def save_small_transformer(path):
    """As k-diffusion's own training makes a class-conditional model: `class_cond` is the class's number."""
    config = {
        "model": {
            "type": "image_transformer_v1", "input_channels": 3, "input_size": [16, 16], "patch_size": [4, 4], "depth": 2,
            "width": 64, "sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 80.0,
            "sigma_sample_density": {"type": "lognormal", "mean": -1.2, "std": 1.2},
        },
        "dataset": {"type": "imagefolder", "location": "", "num_classes": 3},
    }  # fmt: skip
    torch.manual_seed(0)
    model = randomise(K.config.make_model(K.config.load_config(json.loads(json.dumps(config)))), std=0.2)
    zoo.save(model.state_dict(), path, config)
    return path


def save_small_model(path, classes=("bird", "cat", "dog")):
    """A small k-diffusion model with random weights. Its pictures depend on every input."""
    config = {
        "model": {
            "type": "image_v1", "input_channels": 3, "input_size": [16, 16], "mapping_out": 32, "mapping_cond_dim": len(classes),
            "depths": [1, 1], "channels": [16, 32], "self_attn_depths": [False, True], "sigma_data": 0.5, "sigma_min": 0.01,
            "sigma_max": 80.0, "sigma_sample_density": {"type": "lognormal", "mean": -1.2, "std": 1.2}, "augment_wrapper": False,
        },
        "dataset": {"type": "imagefolder", "location": "", "num_classes": len(classes), "classes": list(classes)},
    }  # fmt: skip
    torch.manual_seed(0)
    model = randomise(K.config.make_model(K.config.load_config(json.loads(json.dumps(config)))), std=0.2)
    zoo.save(model.state_dict(), path, config)
    return path
