"""Do the commands do what their options say, and say what is wrong?"""

import importlib
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import k_diffusion as K
import pytest
import torch
from click.core import ParameterSource
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import pil_to_tensor

import ksag
from ksag import images as picture
from ksag import zoo
from ksag.commands.cli import main
from ksag.commands.infotext import SAMPLER_NAMES
from ksag.commands.options import OPTIONS
from ksag.samplers import SAMPLERS
from ksag.samplers import sample as sample_latents
from tests.commands import READERS, invoke, pixels, save_small_model, save_small_transformer, text


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture
def sample(weights):
    """Runs `ksag sample` for a small model with random weights, where the bundled one would only take longer."""

    def run(*args, **options):
        return invoke("sample", "--weights", weights, "--device", "cpu", "--steps", 2, "--n", 1, *args, **options)

    return run


def bundled(*args, **options):
    return invoke("sample", "--device", "cpu", "--steps", 2, *args, **options)


# The demo


@pytest.mark.slow
def test_the_demo_is_plain_sag_and_the_combination_from_the_same_noise(bundled, tmp_path, monkeypatch):
    drawn, draw, out = [], picture.demo, tmp_path / "demo.png"
    monkeypatch.setattr(picture, "demo", lambda rows, *words: drawn.append(dict(rows)) or draw(rows, *words))
    output = invoke("demo", "--steps", 4, "--n", 2, "--seed", 8, "--category", "animals,food", "--device", "cpu", "--out", out)
    sag, pag = zoo.directions()
    shown = f"seeds 8 to 9, euler, 4 steps; strength: SAG {zoo.SETTINGS['sag_scale']:g}, SAG {sag.scale:g} + PAG {pag.scale:g}"
    assert f"The picture is in {out}" in output and shown in output
    assert re.search(r"plain [\d.]+ s, SAG [\d.]+ s, SAG \+ PAG [\d.]+ s", output)
    assert text(out).startswith("Animals & Nature; Food & Drink\nNegative prompt: \nSteps: 4, Sampler: Euler")
    assert f"SAG scale: {sag.scale:g}, " in text(out) and f"PAG scale: {pag.scale:g}, " in text(out)

    cond, _ = zoo.conditioning(["Food & Drink"])  # of the second sample
    config = zoo.load_config()["model"]
    sigmas = K.sampling.get_sigmas_karras(4, config["sigma_min"], config["sigma_max"])

    def sampled(*directions):
        with ksag.GuidedDenoiser(bundled, directions, cond_key="mapping_cond") as guided:
            return sample_latents("euler", guided, (3, 64, 64), sigmas, [9], {"cond": cond})

    expected = {
        "plain": sampled(),
        "SAG": sampled(zoo.directions(sag_scale=zoo.SETTINGS["sag_scale"])[0]),
        "SAG + PAG": sampled(*zoo.directions()),
    }
    rows = {label.partition("\n")[0]: samples for label, samples in drawn[0].items()}
    assert list(rows) == list(expected)
    for label, x in expected.items():
        torch.testing.assert_close(rows[label][1:], x, rtol=0, atol=1e-4)
    assert (expected["SAG"] - expected["plain"]).abs().max() > 1e-2
    assert (expected["SAG + PAG"] - expected["SAG"]).abs().max() > 1e-2


def test_the_demos_picture_has_room_for_its_words():
    x = torch.zeros(1, 3, 64, 64)
    settings = "seed 0, dpmpp_2m_sde, 24 steps; strength: SAG 1.4, SAG 0.98 + PAG 0.98"
    labels = "plain\nordinary sampling", "SAG + PAG\nSelf-Attention and Perturbed-Attention Guidance"
    name = "Travel & Places, fluent-emoji-flat, and more than fits into a line"
    full = picture.demo([(label, x) for label in labels], [name], "The same model and the same noise, sampled two ways", settings)
    bare = picture.demo([(label, x) for label in labels], [""], "", "")
    assert full.width == bare.width and full.height > bare.height  # the words take more lines, and no more width
    margin = pil_to_tensor(full.convert("L").crop((full.width - 10, 20, full.width - 2, full.height - 20)))
    assert margin.min() == 255
    more = picture.demo([("plain", x)] * 3, [""], "", "")
    assert more.height - bare.height == 192 + 12


def test_a_demo_does_not_replace_the_last_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ksag.commands.demo.latents", lambda *_, **__: torch.zeros(1, 3, 64, 64))
    for _ in range(2):
        invoke("demo", "--n", 1, "--device", "cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ksag-demo-2.png", "ksag-demo.png"]


@pytest.mark.parametrize(("steps", "is_idle"), [(3, True), (4, False)])
def test_the_demo_says_that_its_guidance_acts_at_no_step(tmp_path, monkeypatch, steps, is_idle):
    monkeypatch.setattr("ksag.commands.demo.latents", lambda *_, **__: torch.zeros(1, 3, 64, 64))
    output = invoke("demo", "--n", 1, "--steps", steps, "--device", "cpu", "--out", tmp_path / "demo.png")
    assert ("SAG acts at no step" in output) == ("PAG acts at no step" in output) == is_idle


@pytest.mark.parametrize("out", ["folder", "new"])
def test_demo_into_a_folder_is_refused_before_sampling(tmp_path, monkeypatch, out):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("ksag.commands.demo.open_model", lambda *_: pytest.fail("it went on to sample"))
    assert "the demo is one picture" in invoke("demo", "--out", tmp_path / out, code=2)


# The bundled model, and others


def test_the_bundled_model_by_category_and_style(tmp_path):
    bundled("--n", 3, "--category", "animals,Food & Drink", "--style", "noto-v1,any", "--out", tmp_path / "a")
    assert text(tmp_path / "a/000000.png").startswith("Animals & Nature, noto-v1\n")
    assert text(tmp_path / "a/000001.png").startswith("Food & Drink, noto-v1\n")
    assert text(tmp_path / "a/000002.png").startswith("Animals & Nature\n")
    assert pixels(tmp_path / "a/000000.png").shape == (3, 64, 64)


def test_the_picture_is_that_of_the_library(tmp_path, bundled):
    invoke("sample", "--device", "cpu", "--steps", 2, "--n", 1, "--seed", 2, "--cond-scale", 1.5, "--out", tmp_path / "x.png",
           "--category", "food", "--style", "twemoji", "--sag-scale", 1.5, "--blur-sigma", 1, "--sigma-range", 0.5, 200,
           "--mask-threshold", 0.9, "--blur-kernel-size", 5, "--attention", "middle", "--sampler", "euler")  # fmt: skip
    cond, uncond = zoo.conditioning(["Food & Drink"], ["twemoji"])
    given = {"sag_scale": 1.5, "blur_sigma": 1.0, "sigma_range": (0.5, 200.0), "mask_threshold": 0.9, "blur_kernel_size": 5}
    with ksag.SAGDenoiser(bundled, cond_key="mapping_cond", **{**zoo.SETTINGS, **given, "attention": "middle"}) as guided:
        config = zoo.load_config()["model"]
        sigmas = K.sampling.get_sigmas_karras(2, config["sigma_min"], config["sigma_max"])
        x = sample_latents("euler", guided, (3, 64, 64), sigmas, [2], {"cond": cond, "uncond": uncond, "cond_scale": 1.5})
    expected = ((x[0].clamp(-1, 1) + 1) * 127.5).round()
    assert torch.equal(pixels(tmp_path / "x.png"), expected)


def test_the_bundled_model_has_its_recommended_combination_unless_a_scale_is_given(tmp_path):
    sag, pag = (f"{direction.name} scale: {direction.scale:g}, " for direction in zoo.directions())
    layers = f'PAG attention: "{", ".join(zoo.PAG_LAYERS)}", PAG sigma range: 0.4-12'
    for args, present, absent in (
        ([], [sag, pag, layers, f"SAG attention: {zoo.SETTINGS['attention']}"], []),
        (["--every", 2], [sag, pag, "SAG every: 2"], []),
        (["--sag-scale", 1.4], ["SAG scale: 1.4, SAG blur sigma: 1.5"], ["PAG"]),
        (["--sag-scale", 0], ["SAG scale: 0, "], ["PAG", "SAG blur"]),
        (["--pag-scale", 0.75], ["SAG scale: 0.5, ", "PAG scale: 0.75, " + layers], []),
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        bundled("--n", 1, *args, "--out", out)
        record = json.loads((out / "ksag.json").read_text())
        for words in text(out / "000000.png"), ", ".join(f"{name}: {value}" for name, value in record.items()):
            assert all(part.replace('"', "") in words.replace('"', "") for part in present)
            assert not any(part in words for part in absent)


def test_steps_that_step_over_the_sigma_range_are_said(tmp_path, sample):
    said = "{} acts at no step. Its sigma range is 1 to 12, and the steps begin at 80, 0.01. Give more --steps, or "
    said += "`ksag sample` another {}."
    sag, pag = (said.format("SAG", "--sigma-range"), said.format("PAG", "--pag-sigma-range"))
    output = sample("--sigma-range", 1, 12, "--pag-scale", 1, "--pag-sigma-range", 1, 12, "--out", tmp_path / "x.png")
    assert sag in output and pag in output
    for options in (["--sag-scale", 0], ["--sigma-range", 0.001, 1]):
        assert "acts at no step" not in sample(*options, "--out", tmp_path / "x.png")


def test_a_model_of_emoji_of_ones_own_has_categories_too(tmp_path):
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes(zoo.EMOJI.read_bytes())
    bundled("--n", 1, "--weights", weights, "--category", "objects", "--out", tmp_path / "x.png")
    assert text(tmp_path / "x.png").startswith("Objects\n") and "Model: mine," in text(tmp_path / "x.png")
    assert "SAG attention: middle" in text(tmp_path / "x.png")  # the recommended settings are the bundled file's


def test_a_model_without_classes(tmp_path):
    weights = save_small_model(tmp_path / "mine.safetensors", classes=())
    bundled("--n", 2, "--weights", weights, "--out", tmp_path / "x.png")
    assert text(tmp_path / "x.png").startswith("\nNegative prompt: \nSteps: 2")
    assert "has no classes" in bundled("--weights", weights, "--classes", "cat", code=2)
    assert "takes no classes" in bundled("--weights", weights, "--cond-scale", 2, code=2)


def test_a_transformer_that_takes_its_class_by_number(tmp_path):
    weights = save_small_transformer(tmp_path / "mine.safetensors")
    for classes in "1", "2", "any":
        bundled("--n", 1, "--weights", weights, "--classes", classes, "--cond-scale", 2, "--out", tmp_path / f"{classes}.png")
    denoiser = zoo.load(weights)
    args = {"cond": torch.tensor([1]), "uncond": torch.tensor([3]), "cond_scale": 2.0}
    with ksag.SAGDenoiser(denoiser, cond_key="class_cond") as guided:
        x = sample_latents("dpmpp_2m", guided, (3, 16, 16), K.sampling.get_sigmas_karras(2, 0.01, 80.0), [0], args)
    assert torch.equal(pixels(tmp_path / "1.png"), ((x[0].clamp(-1, 1) + 1) * 127.5).round())
    assert (pixels(tmp_path / "1.png") - pixels(tmp_path / "2.png")).abs().mean() > 1
    assert (pixels(tmp_path / "1.png") - pixels(tmp_path / "any.png")).abs().mean() > 1


@pytest.mark.parametrize("kind", [ksag.SAG, ksag.PAG, ksag.SEG])
def test_every_parameter_of_a_direction_is_an_option(kind):
    settings = {option.setting for option in OPTIONS.values() if option.kind is kind}
    assert settings == set(inspect.signature(kind).parameters) - {"blur_time"}  # for videos


def test_help_has_every_option_and_says_when_one_pass_saves_time():
    words = invoke("sample", "--help")
    assert all(f"--{name.replace('_', '-')}" in words for name in OPTIONS) and "--cfg-rule" in words
    assert "saves time where the model's batch of three costs less than two calls" in words.lower()
    assert all(sampler in words for sampler in SAMPLERS) and "each seed takes the next one" in words
    assert "recommended combination of SAG and PAG" in words and "ksag demo" in invoke("--help")


def test_sag_and_pag_and_seg_from_the_shell_are_the_librarys(weights, tmp_path, sample):
    up, down = "inner_model.u_net.u_blocks.0.1", "inner_model.u_net.d_blocks.1.2"
    sample("--steps", 3, "--classes", "cat", "--sag-scale", 0.7, "--pag-scale", 1.5, "--pag-attention", up, "--pag-attention", down,
           "--pag-sigma-range", 0.02, 200, "--pag-every", 2, "--seg-scale", 2, "--seg-blur-sigma", 1, "--seg-attention", down,
           "--out", tmp_path / "x.png")  # fmt: skip
    directions = [ksag.SAG(0.7), ksag.PAG(1.5, [up, down], sigma_range=(0.02, 200.0), every=2), ksag.SEG(2.0, 1.0, down)]
    with ksag.GuidedDenoiser(zoo.load(weights), directions, cond_key="mapping_cond") as guided:
        args = {"cond": torch.tensor([[0.0, 1.0, 0.0]])}
        x = sample_latents("euler", guided, (3, 16, 16), K.sampling.get_sigmas_karras(3, 0.01, 80.0), [0], args)
    assert torch.equal(pixels(tmp_path / "x.png"), ((x[0].clamp(-1, 1) + 1) * 127.5).round())
    words = text(tmp_path / "x.png")
    assert f'PAG scale: 1.5, PAG attention: "{up}, {down}", PAG sigma range: 0.02-200, PAG every: 2, SEG scale: 2, ' in words
    for reader in READERS:
        assert reader(words)[2]["SEG blur sigma"] == "1"


def test_each_direction_can_be_switched_off(tmp_path, sample):
    sample("--sag-scale", 0, "--pag-scale", 2, "--out", tmp_path / "pag.png")
    assert "PAG scale: 2, " in text(tmp_path / "pag.png") and "SAG" not in text(tmp_path / "pag.png")
    sample("--sag-scale", 0, "--out", tmp_path / "plain.png")
    sample("--sag-scale", 0, "--pag-scale", 0, "--seg-scale", 0, "--out", tmp_path / "zero.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "zero.png").read_bytes()
    assert (pixels(tmp_path / "pag.png") - pixels(tmp_path / "plain.png")).abs().mean() > 1


@pytest.mark.parametrize(
    ("args", "field"),
    [
        (["--sag-scale", 1], "SAG scale: 1"),
        (["--blur-sigma", 1], "SAG blur sigma: 1"),
        (["--blur-kernel-size", 3], "SAG blur kernel size: 3"),
        (["--mask-threshold", 1.5], "SAG mask threshold: 1.5"),
        (["--sigma-range", 20, "inf"], "SAG sigma range: 20-inf"),
        (["--one-pass"], "SAG one pass: True"),
        (["--pag-scale", 2], "PAG scale: 2"),
        (["--pag-scale", 2, "--pag-attention", "inner_model.u_net.u_blocks.0.1"], "PAG attention: inner_model.u_net.u_blocks.0.1"),
        (["--seg-scale", 2], "SEG scale: 2"),
        (["--every", 2], "SAG every: 2"),
        (["--cfg-rule", "apg:0.5", "--cond-scale", 3], "CFG rule: \"apg(eta=0.5, norm_threshold=None, momentum=-0.5)\""),
        (["--cfg-rule", "rescale:0.7", "--cond-scale", 3], "CFG rule: rescale(phi=0.7)"),
        (["--schedule", "exponential"], "Schedule type: Exponential"),
        (["--cond-scale", 0], "CFG scale: 0"),
    ],
)  # fmt: skip
def test_every_option_of_sag_changes_the_picture_and_is_written_into_it(tmp_path, sample, args, field):
    fixed = ["--steps", 3, "--classes", "cat", "--zoom", 2]
    other = ["--cond-scale", 3] if "--cfg-rule" in args else []
    sample(*fixed, *other, "--out", tmp_path / "a.png")
    sample(*fixed, *args, "--out", tmp_path / "b.png")
    assert field in text(tmp_path / "b.png") and field not in text(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).abs().mean() > 0.02


def test_attention(tmp_path, sample):
    sample("--attention", "inner_model.u_net.u_blocks.0.1", "--out", tmp_path / "a.png")
    assert "SAG attention: inner_model.u_net.u_blocks.0.1" in text(tmp_path / "a.png")
    assert "nowhere" in sample("--attention", "nowhere", "--out", tmp_path / "b.png", code=1)


def test_half_precision(tmp_path, sample):
    sample("--n", 4, "--dtype", "bfloat16", "--out", tmp_path / "low.png")
    sample("--n", 4, "--out", tmp_path / "full.png")
    assert 0 < (pixels(tmp_path / "low.png") - pixels(tmp_path / "full.png")).abs().mean() < 8


@pytest.mark.slow
def test_compiled(tmp_path, sample):
    sample("--n", 3, "--batch-size", 2, "--compile", "--out", tmp_path / "a.png")
    sample("--n", 3, "--out", tmp_path / "b.png")
    assert (pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).abs().max() <= 1  # of 255


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_can_be_asked_for(tmp_path, sample, sampler):
    sample("--sampler", sampler, "--out", tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").shape == (3, 16, 16)
    assert f"Sampler: {SAMPLER_NAMES[sampler]}," in text(tmp_path / "x.png")


# What is written


def test_a_grid_with_its_parameters(tmp_path, sample):
    out = tmp_path / "new folder" / "grid.png"
    assert f"3 pictures in {out}" in sample("--n", 3, "--classes", "cat, Bird", "--seed", 4, "--out", out, "--batch-size", 2)
    assert pixels(out).shape == (3, 18 + 2, 3 * 18 + 2)
    assert re.fullmatch(
        r"cat\nNegative prompt: \nSteps: 2, Sampler: Euler, Schedule type: Karras, CFG scale: 1, Size: 16x16, Model: small, "
        r"Model hash: [0-9a-f]{10}, CFG rule: plain, SAG scale: 0.5, SAG blur sigma: 2, SAG blur kernel size: 9, "
        r"SAG mask threshold: 1, SAG attention: middle, SAG sigma range: 0-inf, SAG one pass: False, SAG every: 1, "
        r"Precision: float32, "
        rf"Seed: 4, Version: ksag {ksag.__version__}",
        text(out),
    )


def test_the_default_file_is_not_replaced_but_a_given_one_is(tmp_path, sample, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"The picture is in {tmp_path}/ksag-samples.png" in sample()
    first = Path("ksag-samples.png").read_bytes()
    assert f"The picture is in {tmp_path}/ksag-samples-2.png" in sample("--seed", 1)
    assert Path("ksag-samples.png").read_bytes() == first
    assert f"The picture is in {tmp_path}/ksag-samples.png" in sample("--seed", 1, "--out", "ksag-samples.png")
    assert Path("ksag-samples.png").read_bytes() == Path("ksag-samples-2.png").read_bytes() != first


@pytest.mark.parametrize("guidance", [(), ("--pag-scale", 2)])
def test_plain_beside_guided_and_enlarged(tmp_path, sample, guidance):
    sample("--compare", "--zoom", 4, *guidance, "--out", tmp_path / "both.png")
    sample("--zoom", 4, *guidance, "--out", tmp_path / "sag.png")
    sample("--zoom", 4, "--sag-scale", 0, "--out", tmp_path / "plain.png")
    both = pixels(tmp_path / "both.png")
    assert both.shape[2] == 2 * 64 + 2
    assert torch.equal(both[:, -64:, -64:], pixels(tmp_path / "sag.png"))
    assert torch.equal(both[:, -64:, :64], pixels(tmp_path / "plain.png"))
    assert both[:, :-64].min() < 100  # the labels
    assert (both[:, -64:, -64:] - both[:, -64:, :64]).abs().mean() > 1
    assert "SAG scale: 0," in text(tmp_path / "plain.png") and "SAG blur" not in text(tmp_path / "plain.png")


@pytest.mark.parametrize("reader", READERS)
def test_image_tools_read_the_parameters(tmp_path, sample, reader):
    sample(
        "--sampler", "euler_ancestral", "--cfg-rule", "apg", "--cond-scale", 2.5, "--classes", "cat", "--out", tmp_path / "x.png"
    )
    prompt, negative, fields = reader(text(tmp_path / "x.png"))
    assert (prompt, negative) == ("cat", "")
    assert fields["Steps"] == "2" and fields["Sampler"] == "Euler a" and fields["CFG scale"] == "2.5" and fields["Seed"] == "0"
    assert fields["SAG every"] == "1" and fields["Model"] == "small"


# What is wrong


LIBRARY = {"--blur-sigma", "--blur-kernel-size", "--sag-scale", "--sigma-range", "--pag-scale", "--seg-scale", "--every"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sampler", "dpmpp2m"], "'dpmpp2m' is not one of 'euler', "),
        (["--classes", "kat"], "--classes: 'kat' is none of bird, cat, dog."),
        (["--classes", "d"], "--classes: 'd' is several of bird, dog."),
        (["--classes", "cat,"], "--classes: '' is several of bird, cat, dog."),
        (["--category", "food"], "small.safetensors has classes. Give --classes"),
        (["--blur-sigma", "nan"], "blur_sigma must be a finite number, got nan"),
        (["--blur-sigma", "-1"], "0 (no blur) or more, got -1.0"),
        (["--blur-kernel-size", "4"], "must be an odd number"),
        (["--sag-scale", "inf"], "sag_scale must be a finite number, got inf"),
        (["--cond-scale", "nan"], "--cond-scale must be a finite number, got nan"),
        (["--sigma-range", "3", "1"], "give (1.0, 3.0)?"),
        (["--pag-scale", "nan"], "scale must be a finite number, got nan"),
        (["--pag-attention", "mid"], "--pag-attention needs --pag-scale: PAG is off"),
        (["--seg-scale", "1", "--seg-blur-sigma", "-1"], "or inf for the mean, got -1.0"),
        (["--compare", "--sag-scale", "0"], "--compare needs guidance"),
        (["--every", "0"], "every=n computes the direction every n-th call, n = 1 or more"),
        (["--cfg-rule", "rescal"], "'rescal' is not one of plain, rescale, apg"),
        (["--cfg-rule", "rescale:2"], "0 to 1, got 2.0"),
        (["--cfg-rule", "plain:2"], "'plain:2' has too many numbers"),
        (["--device", "cuda:99"], "'cuda:99' cannot be used here: PyTorch sees 0 devices of this kind"),
        (["--device", "meta"], "'meta' cannot be used here: PyTorch sees 0 devices of this kind"),
        (["--device", "gpu"], "'gpu' is not a device of PyTorch"),
        (["--weights", "nowhere.safetensors"], "'nowhere.safetensors' does not exist"),
        (["--n", "0"], "0 is not in the range"),
        (["--steps", "99999999999999999999999"], "99999999999999999999999 is not in the range 2<=x<=100000"),
        (["--size", "²x8"], "'²x8' is not a size: give WIDTHxHEIGHT"),
        (["--n", "99999999999999999999999"], "99999999999999999999999 is not in the range 1<=x<=10000000"),
        (["--n", "9999999"], "--n 9999999: one file holds at most 1000 pictures. Give a folder for one PNG per picture, such as"),
        (["--seed", "99999999999999999999"], "is not in the range 0<=x<=9007199254740992"),
        (["--prompt", "a cat"], "--prompt needs --pipeline"),
        (["--offload"], "--offload needs --pipeline"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, sample, args, message):
    by_the_library = args[0] in LIBRARY
    assert message in sample(*args, "--out", tmp_path / "x.png", code=1 if by_the_library else 2)
    assert not (tmp_path / "x.png").exists()


def test_bad_words_for_the_bundled_model(tmp_path):
    assert "Give --category and --style" in bundled("--classes", "cat", "--out", tmp_path / "x.png", code=2)
    assert "'fod' is none of Smileys & Emotion, " in bundled("--category", "fod", "--out", tmp_path / "x.png", code=2)
    assert "--style: '' is several of " in bundled("--style", "", "--out", tmp_path / "x.png", code=2)


def test_bad_weights(tmp_path):
    weights, out = tmp_path / "w.safetensors", tmp_path / "x.png"
    weights.write_bytes(zoo.EMOJI.read_bytes()[:100_000])
    assert "w.safetensors is cut off, or not a safetensors file" in bundled("--weights", weights, "--out", out, code=1)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, weights)
    output = bundled("--weights", weights, "--out", out, code=1)
    assert "no k-diffusion config" in output and "ksag sample --pipeline" in output
    (tmp_path / "w.ckpt").write_bytes(b"\x80\x02")
    output = bundled("--weights", tmp_path / "w.ckpt", "--out", out, code=1)
    assert "w.ckpt is cut off, or not a safetensors file" in output and "convert_for_inference.py" in output
    assert "is a directory" in bundled("--weights", tmp_path, "--out", out, code=2)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/x.png", "cannot be written"),
        ("folder.png", "must be a file that ends in .png"),
        ("x.jpg", "must be a file that ends in .png"),
        ("file/folder", "cannot be written"),
    ],
)
def test_an_out_that_cannot_be_written_is_said_before_sampling(tmp_path, monkeypatch, out, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("ksag.commands.sample.open_model", lambda *_: pytest.fail("it went on to sample"))
    assert message in invoke("sample", "--out", tmp_path / out, code=1)
    assert (tmp_path / "file").read_bytes() == b""


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    out = tmp_path / "x.png"
    picture.save(Image.new("RGB", (2, 2)), out, "old")
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        picture.save(Image.new("RGB", (2, 2)), out, "new")
    monkeypatch.undo()
    assert text(out) == "old"


PAGE = (Path(__file__).parent.parent / "docs/sampling.md").read_text()


@pytest.mark.parametrize("line", re.findall(r"^(?:accelerate .*)?ksag (?:sample|demo).*$", PAGE, re.M))
def test_the_pages_commands_can_be_given(tmp_path, monkeypatch, line):
    """As far as the sampling itself; what they name is there."""
    monkeypatch.chdir(tmp_path)
    for name in "mine.safetensors", "prompts.txt", "photo.jpg", "house.png", "door.png":
        Path(name).touch()
    command, *args = shlex.split(line.partition("ksag ")[2])
    context = importlib.import_module(f"ksag.commands.{command}").command.make_context(command, args.copy())
    given = [name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    assert len(given) == sum(arg.startswith("--") for arg in args)


# Errors while the model runs


def failing_with(error):
    def forward(*_, **__):
        raise error

    return forward


def test_too_little_memory_is_an_error_that_says_what_takes_less(sample, monkeypatch):
    tried = "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 8.00 GiB."
    monkeypatch.setattr(K.layers.Denoiser, "forward", failing_with(torch.OutOfMemoryError(tried)))
    output = sample("--out", "never.png", code=1)
    assert "CUDA out of memory" in output and "--batch-size" in output and "--offload" in output
    on_cpu = "[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"
    monkeypatch.setattr(K.layers.Denoiser, "forward", failing_with(RuntimeError(on_cpu)))
    assert "Error: can't allocate memory: you tried to allocate 9 bytes. A smaller" in sample("--out", "never.png", code=1)


@pytest.mark.parametrize("scale", ["--cond-scale", "--sag-scale"])
def test_a_scale_at_which_the_samples_overflow_is_an_error_not_a_black_picture(sample, tmp_path, scale):
    output = sample("--n", 2, "--steps", 3, scale, 1e38, "--out", tmp_path / "x.png", code=1)
    assert "The samples of seeds 0, 1 are infinite or NaN. Give lower scales" in output
    assert not (tmp_path / "x.png").exists()


def test_what_ksag_finds_wrong_while_the_model_runs_is_one_line(sample, monkeypatch):
    monkeypatch.setattr(ksag.attention.visit.Visit, "missing", 1)
    assert "ran for" in sample("--out", "never.png", code=1)


@pytest.mark.parametrize("kind", [RuntimeError, TypeError])
def test_another_error_while_the_model_runs_keeps_its_traceback(weights, monkeypatch, kind):
    monkeypatch.setattr(K.layers.Denoiser, "forward", failing_with(kind("a bug of the model")))
    with pytest.raises(kind, match="a bug of the model"):
        main(["sample", "--weights", str(weights), "--device", "cpu", "--steps", "2"], standalone_mode=False)


def test_a_k_diffusion_model_needs_no_diffusers(sample, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("ksag.commands.", "ksag.adapters"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in "diffusers", "transformers", "accelerate", "huggingface_hub":
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    sample("--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").is_file()
