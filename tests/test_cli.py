import re

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import pil_to_tensor

from ksag import picture, zoo
from ksag.cli import main
from ksag.samplers import SAMPLERS


def invoke(*args, code=0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def sample(*args, code=0):
    return invoke("sample", "--device", "cpu", "--steps", 2, *args, code=code)


def pixels(path):
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB")).float()


def text(path):
    with Image.open(path) as image:
        return image.text["parameters"]


def test_demo(tmp_path):
    out = tmp_path / "demo.png"
    output = invoke("demo", "--steps", 3, "--n", 2, "--device", "cpu", "--out", out)
    assert str(out) in output
    assert "dpmpp_2m, 3 steps, sag_scale 2, blur_sigma 2, cond_scale 2, seed 100" in output
    assert re.search(r"[\d.]+ s without SAG, [\d.]+ s with SAG", output)
    assert text(out).startswith("airplane, automobile\nSteps: 3, Sampler: dpmpp_2m")
    assert pixels(out)[:, -150:, -150:].std() > 20  # pictures reach the lower right corner


def test_demo_without_guidance_is_refused():
    assert "nothing to compare" in invoke("demo", "--sag-scale", 0, code=2)


def test_sample_writes_a_grid_with_its_parameters(tmp_path):
    out = tmp_path / "new folder" / "grid.png"
    output = sample("--n", 3, "--classes", "cat, 7", "--seed", 5, "--out", out, "--batch-size", 2)
    assert str(out) in output
    assert pixels(out).shape == (3, 34 + 2, 3 * 34 + 2)
    assert text(out) == (
        "cat, horse, cat\nSteps: 2, Sampler: dpmpp_2m, Schedule type: Karras, CFG scale: 2, Seed: 5, Size: 32x32, "
        "Model: cifar10, SAG scale: 2, SAG blur sigma: 2, Version: ksag 0.1.0"
    )


def test_sample_writes_a_folder_of_pngs_and_the_same_seed_gives_the_same_picture(tmp_path):
    sample("--n", 3, "--classes", "dog", "--seed", 3, "--out", tmp_path / "a")
    sample("--n", 1, "--classes", "dog", "--seed", 4, "--out", tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["00003-dog.png", "00004-dog.png", "00005-dog.png"]
    a, b = (pixels(tmp_path / d / "00004-dog.png") for d in "ab")
    assert (a - b).abs().max() <= 1  # of 255: the batch's size changes the rounding
    assert "Seed: 4" in text(tmp_path / "a" / "00004-dog.png")
    sample("--n", 1, "--classes", "dog", "--seed", 4, "--out", tmp_path / "c")
    assert (tmp_path / "b" / "00004-dog.png").read_bytes() == (tmp_path / "c" / "00004-dog.png").read_bytes()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_can_be_asked_for(tmp_path, sampler):
    sample("--n", 1, "--sampler", sampler, "--out", tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").shape == (3, 32, 32)


def test_half_precision(tmp_path):
    sample("--n", 1, "--dtype", "bfloat16", "--out", tmp_path / "x.png")
    low = pixels(tmp_path / "x.png")
    sample("--n", 1, "--out", tmp_path / "y.png")
    full = pixels(tmp_path / "y.png")
    assert 0 < (low - full).abs().mean() < 8


def test_weights_of_ones_own(tmp_path):
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes(zoo.CIFAR10.read_bytes())
    sample("--n", 1, "--weights", weights, "--out", tmp_path / "x.png")
    assert "Model: mine," in text(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sampler", "dpmpp2m"], "Did you mean dpmpp_2m or"),
        (["--sampler", "DDIM"], "is no sampler of k-diffusion"),
        (["--classes", "kat"], "'kat' is no class of cifar10: did you mean cat?"),
        (["--classes", "10"], "'10' is no class of cifar10"),
        (["--blur-sigma", "nan"], "blur_sigma must be a finite number, got nan"),
        (["--blur-sigma", "-1"], "0 (no blur) or more, got -1.0"),
        (["--sag-scale", "inf"], "sag_scale must be a finite number, got inf"),
        (["--device", "cuda:99"], "'cuda:99' cannot be used here"),
        (["--weights", "nowhere.safetensors"], "'nowhere.safetensors' does not exist"),
        (["--n", "0"], "0 is not in the range"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, args, message):
    output = sample(*args, "--out", tmp_path / "x.png", code=2 if "finite" not in message and "no blur" not in message else 1)
    assert message in " ".join(output.split())
    assert not (tmp_path / "x.png").exists()


def test_bad_weights(tmp_path):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(zoo.CIFAR10.read_bytes()[:100_000])
    assert "is cut off, or no safetensors file" in sample("--weights", weights, "--out", tmp_path / "x.png", code=1)
    save_file({"a": torch.zeros(1)}, weights)
    assert "no k-diffusion config" in sample("--weights", weights, "--out", tmp_path / "x.png", code=1)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/x.png", "cannot be written"),
        ("folder.png", "is a folder"),
        ("x.jpg", "must end in .png"),
        ("file/folder", "cannot be written"),
    ],
)
def test_an_out_that_cannot_be_written_is_said_before_sampling(tmp_path, monkeypatch, out, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("ksag.cli.Model", lambda *_: pytest.fail("it went on to sample"))
    for command in "sample", "demo":
        if command == "sample" or "." in out:
            assert message in invoke(command, "--out", tmp_path / out, code=1)
    assert (tmp_path / "file").read_bytes() == b""


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    out = tmp_path / "x.png"
    picture.save(Image.new("RGB", (2, 2)), out, "old")
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        picture.save(Image.new("RGB", (2, 2)), out, "new")
    monkeypatch.undo()
    assert text(out) == "old"


def test_help_is_for_a_person():
    assert "ksag demo" in invoke("--help")
    help_text = invoke("sample", "--help")
    assert all(sampler in help_text for sampler in SAMPLERS) and "taken in turn" in help_text
