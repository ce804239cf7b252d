"""scripts/make_emoji.py and scripts/train_emoji.py, from npm packages to a model that samples, on a few icons drawn here."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import k_diffusion as K
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from skimage import transform
from torch import nn

from ksag import zoo

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import make_emoji  # noqa: E402
import train_emoji  # noqa: E402

CONFIG = json.loads((ROOT / "scripts/emoji.json").read_text())
ICONS = {  # name: fill, category
    "dog": ("#ff0000", "Animals & Nature"),
    "man-cook": ("#00ff00", "People & Body"),
    "woman-cook": ("#00aa00", "People & Body"),
    "pizza": ("#0000ff", "Food & Drink"),
    "plus": ("#ff00ff", "Symbols"),
    "alarm-clock": ("#00ffff", "Travel & Places"),
}


def icon(fill, left=0):
    """Its left half is filled; `left` moves the view box along, so that the picture stays the same."""
    return {"body": f'<rect fill="{fill}" x="{left}" width="8" height="16"/>'} | ({"left": left} if left else {})


def write_package(folder, icons, categories, aliases=None, chars=None):
    folder.mkdir(parents=True)
    by_category = {c: [name for name in categories if categories[name] == c] for c in sorted(set(categories.values()))}
    files = {
        "icons": {"prefix": folder.name, "width": 16, "height": 16, "icons": icons, "aliases": aliases or {}},
        "metadata": {"categories": by_category} if by_category else {},
        "chars": chars or {},
        "info": {"author": {"name": "A. Painter"}, "license": {"spdx": "MIT"}},
        "package": {"version": "1.2.3", "license": "MIT"},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def packages(tmp_path):
    """All seven packages: each has the same six icons, and some what is to be left out, or other names."""
    icons = {name: icon(fill, left=4 * i) for i, (name, (fill, _)) in enumerate(ICONS.items())}
    categories = {name: category for name, (_, category) in ICONS.items()}
    for style in make_emoji.STYLES:
        folder = tmp_path / "node_modules/@iconify-json" / style
        if style == "noto":
            more = {
                "man-cook-dark-skin-tone": icon("#111111"),
                "old-name": icon("#222222") | {"hidden": True},
                "flag-france": icon("#333333"),
                "blank": icon("#ffffff"),
                "hound": icon("#ff0000"),
            }
            sorts = dict.fromkeys(more, "Animals & Nature") | {"flag-france": "Flags"}
            write_package(folder, icons | more, categories | sorts, {"puppy": {"parent": "dog"}}, {"1f355": "pizza"})
        elif style == "fxemoji":
            own = {"sliceofpizza": icon("#0000aa"), "poo": icon("#964b00"), "puppy": icon("#aa0000")}
            write_package(folder, own, {"sliceofpizza": "Objects", "poo": "Nature", "puppy": "Objects"})
        elif style == "fluent-emoji":
            write_package(folder, icons | {"man-cook-dark": icon("#444444")}, {})
        else:
            write_package(folder, icons, categories)
    return tmp_path / "node_modules"


@pytest.fixture
def data(tmp_path, packages):
    """The data set of those packages, with the dog held out."""
    command = [sys.executable, ROOT / "scripts/make_emoji.py", "--packages", packages, "--out", tmp_path / "emoji"]
    made = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert made.returncode == 0 and "40 pictures of 6 emoji in 7 styles" in made.stdout, made.stdout + made.stderr
    index = json.loads((tmp_path / "emoji/index.json").read_text())
    for described in index["pictures"].values():
        for picture in described:
            picture["held_out"] = picture["emoji"] == "dog"
    (tmp_path / "emoji/index.json").write_text(json.dumps(index))
    return tmp_path / "emoji"


def pictures_of(data, style):
    return {p["name"]: p for p in json.loads((data / "index.json").read_text())["pictures"][style]}


def test_every_picture_is_its_icon(data):
    for style in set(make_emoji.STYLES) - {"fxemoji"}:
        sheet = np.asarray(Image.open(data / f"{style}.webp").convert("RGB"))
        for i, name in enumerate(pictures_of(data, style)):
            cell = sheet[:, 64 * i : 64 * (i + 1)]
            fill = "#ff0000" if name == "hound" else ICONS[name][0]
            expected = np.full((64, 64, 3), 255)
            expected[:, :32] = [int(fill[j : j + 2], 16) for j in (1, 3, 5)]
            assert np.array_equal(cell, expected), (style, name)


def test_flags_tones_hidden_and_blank_icons_are_left_out(data):
    assert set(pictures_of(data, "noto")) == set(ICONS) | {"hound"}
    assert set(pictures_of(data, "fluent-emoji")) == set(ICONS)


def test_one_emoji_has_one_name_in_all_styles(data):
    noto, fxemoji, twemoji = (pictures_of(data, style) for style in ("noto", "fxemoji", "twemoji"))
    assert noto["man-cook"]["emoji"] == noto["woman-cook"]["emoji"] == twemoji["man-cook"]["emoji"]
    assert fxemoji["sliceofpizza"]["emoji"] == noto["pizza"]["emoji"]  # by Unicode's name of its code point
    assert fxemoji["puppy"]["emoji"] == noto["dog"]["emoji"]  # by another package's alias
    assert noto["hound"]["emoji"] == noto["dog"]["emoji"]  # by the pictures: they are equal
    assert len({p["emoji"] for p in noto.values()}) == 5


def test_categories_are_those_of_unicode(data):
    noto, fxemoji = pictures_of(data, "noto"), pictures_of(data, "fxemoji")
    assert {name: noto[name]["category"] for name in ICONS} == {name: category for name, (_, category) in ICONS.items()}
    assert fxemoji["sliceofpizza"]["category"] == "Food & Drink"  # not its own package's, as others know better
    assert fxemoji["poo"]["category"] == "Animals & Nature"  # nobody else has it


def test_symbols_and_clocks_are_not_mirrored(data):
    may = {name: picture["mirror"] for name, picture in pictures_of(data, "noto").items() if name in ICONS}
    assert [name for name in may if not may[name]] == ["plus", "alarm-clock"]


def test_about_one_emoji_in_twenty_is_held_out():
    held_out = [make_emoji.is_held_out(f"emoji {i}") for i in range(4000)]
    assert abs(np.mean(held_out) - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 4000)


def test_near_pairs():
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    images[5] = images[2] // 2 * 2  # differs by at most 1 of 255
    assert list(make_emoji.near_pairs(images, 0.05, block=3)) == [(2, 5)]


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
