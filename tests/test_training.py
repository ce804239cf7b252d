"""Does scripts/train_emoji.py train what its config says, from a data set to a model that samples?"""

import json
import math
import os
import subprocess
import sys
from collections import Counter

import k_diffusion as K
import numpy as np
import pytest
import torch
import train_emoji
from safetensors import safe_open
from skimage import transform
from torch import nn

from ksag import zoo
from tests.emoji_packages import ROOT, make_data

CONFIG = json.loads((ROOT / "scripts/emoji.json").read_text())


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path)


def test_loads_what_was_made(data):
    dataset = CONFIG["dataset"]
    training, held_out = train_emoji.load_pictures(data, dataset["categories"], dataset["styles"])
    assert len(training) + len(held_out) == 40
    assert Counter(held_out.styles.tolist()) == {0: 2, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
    assert set(held_out.categories.tolist()) == {dataset["categories"].index("Animals & Nature")}
    assert torch.equal(held_out.images[0, :, 0, 0], torch.tensor([255, 0, 0], dtype=torch.uint8))
    assert not training.mirror[training.categories == dataset["categories"].index("Symbols")].any()


def test_refuses_data_without_held_out_pictures(data):
    index = json.loads((data / "index.json").read_text())
    for described in index["pictures"].values():
        for picture in described:
            picture["held_out"] = False
    (data / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="holds out 0 of 40 pictures"):
        train_emoji.load_pictures(data, CONFIG["dataset"]["categories"], CONFIG["dataset"]["styles"])


def test_condition_drops_category_style_and_both():
    n = 20_000
    labels = torch.zeros(n, dtype=torch.long)
    pictures = train_emoji.Pictures(torch.zeros(n, 1), labels + 3, labels + 5, labels.bool())
    cond = train_emoji.condition(pictures, CONFIG["dataset"])
    assert cond.shape == (n, 15) and set(cond.nonzero()[:, 1].tolist()) == {3, 8 + 5}
    seen = Counter((bool(category), bool(style)) for category, style in cond[:, [3, 13]].tolist())
    category, style, both = 1 - 0.1, 1 - 0.3, 1 - 0.2
    for (has_category, has_style), expected in {
        (True, True): both * category * style,
        (True, False): both * category * (1 - style),
        (False, True): both * (1 - category) * style,
        (False, False): 1 - both * (1 - (1 - category) * (1 - style)),
    }.items():
        assert abs(seen[has_category, has_style] / n - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_augments_as_k_diffusion_says():
    """Its own matrices and skimage's warp, put together from what `aug_cond` says, give the same pictures."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    smooth = torch.stack([torch.sin(3 * x + y), torch.cos(2 * y - x), x * y])
    images, said = train_emoji.augment(smooth.repeat(24, 1, 1, 1), torch.ones(24), prob=0.5)
    assert (said.abs().amax(0) > 0.1).all()
    for image, (a0, a1, a2, cos, sin, a5_cos, a5_sin, a6, a7) in zip(images, said, strict=True):
        centre, turn, axis = 31.5, torch.atan2(sin, cos + 1), torch.atan2(a5_sin, a5_cos)
        differences = []
        for stretch, along in ((torch.hypot(a5_cos, a5_sin), axis), (-torch.hypot(a5_cos, a5_sin), axis + math.pi)):
            pipeline = K.augmentation.KarrasAugmentationPipeline()
            matrix = (
                K.augmentation.translate2d(centre, centre)
                @ K.augmentation.scale2d(1 - 2 * a0, 1 - 2 * a1)
                @ K.augmentation.scale2d(pipeline.a_scale**a2, pipeline.a_scale**a2)
                @ K.augmentation.rotate2d(-turn)
                @ K.augmentation.rotate2d(along)
                @ K.augmentation.scale2d(pipeline.a_aniso**stretch, pipeline.a_aniso**-stretch)
                @ K.augmentation.rotate2d(-along)
                @ K.augmentation.translate2d(pipeline.a_trans * 64 * a6, pipeline.a_trans * 64 * a7)
                @ K.augmentation.translate2d(-centre, -centre)
            )
            warp = transform.AffineTransform(matrix.numpy().astype(np.float64)).inverse
            expected = transform.warp(smooth.movedim(0, 2).numpy(), warp, order=3, mode="symmetric", clip=False)
            differences.append((image.movedim(0, 2) - torch.from_numpy(expected)).abs().mean())
        assert min(differences) < 0.01  # two cubic kernels, and two ways to mirror the edge, differ a little


def test_leaves_pictures_alone_that_may_not_be_mirrored():
    images = torch.randn(8, 3, 64, 64)
    augmented, said = train_emoji.augment(images, torch.zeros(8), prob=0.0)
    torch.testing.assert_close(augmented, images, atol=1e-4, rtol=0)  # float32 grid coordinates
    assert not said.any()


def test_inference_weights_are_the_model_with_no_augmentation():
    config = json.loads(json.dumps(CONFIG))
    config["model"] |= SMALL | {"augment_wrapper": True, "dropout_rate": 0.5}
    model = K.config.make_model(K.config.load_config(config)).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
        if isinstance(module, K.layers.SelfAttention2d):
            module.dropout.p = 0.0  # which k-diffusion would apply at inference too
    inference = K.config.make_model(K.config.load_config(train_emoji.inference_config(config))).eval()
    inference.load_state_dict(train_emoji.inference_weights(model))
    x, sigma, cond = torch.randn(3, 3, 64, 64), torch.rand(3) + 0.1, torch.eye(3, 15)
    expected = model(x, sigma, aug_cond=torch.zeros(3, 9), mapping_cond=cond)
    torch.testing.assert_close(inference(x, sigma, mapping_cond=cond), expected, atol=1e-5, rtol=1e-5)
    assert (model(x, sigma, aug_cond=torch.full((3, 9), 10.0), mapping_cond=cond) - expected).abs().max() > 1e-2


SMALL = {"channels": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "mapping_out": 32}


@pytest.fixture
def config(tmp_path):
    config = json.loads(json.dumps(CONFIG))
    config["model"] |= SMALL | {"augment_wrapper": True, "augment_prob": 0.12, "dropout_rate": 0.1}
    config["lr_sched"]["warmup_steps"] = 1
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def train(*args, launcher=()):
    command = [sys.executable, *launcher, ROOT / "scripts/train_emoji.py", "--batch-size", 4, "--no-compile", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)


def check_weights(path, steps, processes):
    denoiser = zoo.load(path)
    config = zoo.load_config(path)
    assert config["dataset"]["categories"] == CONFIG["dataset"]["categories"]
    assert config["dataset"]["styles"] == CONFIG["dataset"]["styles"]
    assert not config["model"]["augment_wrapper"] and config["model"]["dropout_rate"] == 0
    x, cond = torch.randn(2, 3, 64, 64), torch.eye(2, 15)
    denoised = denoiser(x, torch.ones(2), mapping_cond=cond)
    assert denoised.isfinite().all() and torch.equal(denoised, denoiser(x, torch.ones(2), mapping_cond=cond))
    assert denoiser.inner_model.proj_out.weight.abs().max() > 1e-4  # it starts as zeros
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["training"])
    assert (record["steps"], record["processes"], record["batch_size"]) == (steps, processes, 4)
    assert record["augment_prob"] == 0.12 and record["dropout_rate"] == 0.1
    return record


@pytest.mark.slow
def test_pauses_goes_on_and_ends_in_a_model(tmp_path, data, config):
    args = "--data", data, "--config", config, "--out", tmp_path / "run", "--steps", 6
    paused = train(*args, "--pause-after", 0)
    assert paused.returncode == 0 and "paused at step 1" in paused.stdout + paused.stderr, paused.stderr
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 1
    ended = train(*args, "--save-every", 2)
    assert ended.returncode == 0 and "going on from step 1" in ended.stdout + ended.stderr, ended.stderr

    record = check_weights(tmp_path / "run/emoji.safetensors", steps=6, processes=1)
    curve = json.loads((tmp_path / "run/curve.json").read_text())
    assert [point["step"] for point in curve] == [1, 2, 4, 6]
    losses = {(point["step"], float(name)): loss for point in curve for name, loss in point["held_out_loss"].items()}
    best = record["best"]
    assert losses[best["step"], best["ema_sigma_rel"]] == min(losses.values())
    assert best["held_out_loss"] == round(min(losses.values()), 5)


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path, data, config):
    args = "--data", data, "--config", config, "--out", tmp_path / "run", "--steps", 3
    ended = train(*args, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2))
    assert ended.returncode == 0, ended.stderr
    check_weights(tmp_path / "run/emoji.safetensors", steps=3, processes=2)
