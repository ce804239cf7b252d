"""scripts/train_cifar10.py, from a data set to a model that samples, on a few random pictures."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ksag import zoo

ROOT = Path(__file__).parents[1]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.tar.xz"
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(path, "w:xz") as tar:
        for split in "train", "test":
            for i, name in enumerate(["cat", "dog"] * 4):
                file = io.BytesIO()
                pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(file, format="JPEG")
                member = tarfile.TarInfo(f"{split}/{name}/{i:04d}.jpg")
                member.size = file.tell()
                file.seek(0)
                tar.addfile(member, file)
    return path


@pytest.fixture
def config(tmp_path):
    config = json.loads(zoo.CIFAR10.with_suffix(".json").read_text())
    config["model"] |= {"channels": [32, 64], "depths": [1, 1], "self_attn_depths": [False, True], "mapping_out": 32}
    config["model"]["mapping_cond_dim"] = config["dataset"]["num_classes"] = 2
    config["dataset"]["classes"] = ["cat", "dog"]
    config["lr_sched"]["warmup_steps"] = 1
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def train(*args):
    command = [sys.executable, ROOT / "scripts/train_cifar10.py", "--batch-size", 4, "--no-compile", *args]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.mark.slow
def test_pauses_goes_on_and_ends_in_a_model(tmp_path, data, config):
    args = "--data", data, "--config", config, "--out", tmp_path / "run", "--steps", 6
    paused = train(*args, "--pause-after", 0)
    assert paused.returncode == 0 and "paused at step 1 of 6" in paused.stdout + paused.stderr, paused.stderr
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 1
    ended = train(*args)
    assert ended.returncode == 0 and "going on from step 1" in ended.stdout + ended.stderr, ended.stderr

    weights = tmp_path / "run/cifar10.safetensors"
    denoiser = zoo.load(weights)
    x = torch.randn(2, 3, 32, 32)
    assert denoiser(x, torch.ones(2), mapping_cond=zoo.one_hot([0, 1], 2)).isfinite().all()
    with safe_open(weights, "pt") as file:
        record = json.loads(file.metadata()["training"])
    assert record["steps"] == 6 and record["batch_size"] == 4 and set(record["held_out_loss"]) == {"0.02", "0.05", "0.1"}
    assert denoiser.inner_model.proj_out.weight.abs().max() > 1e-4  # it starts as zeros
