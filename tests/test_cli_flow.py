"""Does `ksag sample --pipeline` sample Stable Diffusion 3, Flux and SDXL by flow matching from disk? They are tiny and random."""

import copy
import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import ksag
from ksag.adapters import diffusers
from ksag.commands.pipeline import Pipeline
from ksag.commands.sampling import Sampling
from ksag.samplers import sample as sample_latents
from tests import flow_pipelines
from tests.commands import READERS, invoke, pixels, process, text

KINDS = {
    "SD3": flow_pipelines.stable_diffusion_3,
    "Flux dev": flow_pipelines.flux,
    "Flux schnell": lambda folder: flow_pipelines.flux(folder, False, use_dynamic_shifting=False),
    "flow XL": flow_pipelines.flow_sdxl,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind → the folder of such a pipeline."""
    made = {}

    def folder(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp("pipeline")
            KINDS[kind](path)
            made[kind] = path / "pipe"
        return made[kind]

    return folder


def opened(folder, **options):
    return Pipeline(str(folder), torch.device("cpu"), torch.float32, **{"prompt": ["a cat"], "size": (24, 32), **options})


def sampling(model, steps, sag_scale=0.0):
    guided = ksag.SAGDenoiser(model.denoiser, sag_scale, cond_key=None)
    return Sampling(model, guided, "euler", model.sigmas(steps, "model"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_is_that_of_diffusers(saved, kind):
    """Its pipeline, from the same noise."""
    pipe = diffusers.load(saved(kind))
    if kind == "flow XL":
        pipe.scheduler = flow_pipelines.FlowEuler.from_config(pipe.scheduler.config)
    options = {"cond_scale": None if kind == "Flux schnell" else 2.5, "negative_prompt": None if "Flux" in kind else "bad"}
    model = opened(saved(kind), **options)
    latents = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(4))
    if "Flux" in kind:
        latents = flow_pipelines.pack(latents)
    args = {"prompt": "a cat", "negative_prompt": options["negative_prompt"], "guidance_scale": options["cond_scale"] or 0.0}
    (expected,) = pipe(**args, latents=latents, num_inference_steps=3, height=24, width=32).images
    (picture,) = sampling(model, 3).pictures([4])
    assert picture.size == expected.size == (32, 24)
    difference = (pil_to_tensor(picture).float() - pil_to_tensor(expected).float()).abs()
    assert difference.max() <= 2 and difference.mean() < 0.2  # of 255


@pytest.mark.parametrize("kind", [pytest.param("SD3", marks=pytest.mark.slow), "Flux dev"])
def test_from_the_shell_with_sag(saved, tmp_path, kind):
    """The picture of the library with SAG, and another one without; one of them in a process of its own."""
    args = ["--prompt", "a cat", "--size", "32x24", "--seed", 4, "--steps", 3, "--device", "cpu", "--sag-scale", 1.5]
    args = ["sample", "--pipeline", saved(kind), *args, "--out", tmp_path / "x.png"]
    if kind == "SD3":
        ran = process(*args)
        output, _ = ran.communicate()
        assert ran.returncode == 0, output
    else:
        output = invoke(*args)
    assert "The picture is in" in output
    pipe = diffusers.load(saved(kind))
    denoiser = diffusers.denoiser(pipe, size=(24, 32))
    cond, uncond = diffusers.conditioning(pipe, "a cat")
    guidance = {"cond": cond} if uncond is None else {"cond": cond, "uncond": uncond, "cond_scale": 4.5}
    with ksag.SAGDenoiser(denoiser, 1.5, cond_key=None) as guided:
        latents = sample_latents("euler", guided, (16, 12, 16), denoiser.get_sigmas(3), [4], guidance)
    picture = pil_to_tensor(diffusers.decode(pipe, latents, pil=True)[0])
    assert torch.equal(pixels(tmp_path / "x.png"), picture.float())
    (plain,) = sampling(opened(saved(kind)), 3).pictures([4])
    assert not torch.equal(picture, pil_to_tensor(plain))


@pytest.mark.parametrize("reader", READERS)
def test_image_tools_read_the_parameters(saved, tmp_path, reader):
    args = ["--prompt", "a cat", "--size", "32x24", "--steps", 3, "--device", "cpu", "--cond-scale", 2]
    invoke("sample", "--pipeline", saved("Flux dev"), *args, "--out", tmp_path / "x.png")
    prompt, _, fields = reader(text(tmp_path / "x.png"))
    assert prompt == "a cat"
    assert {"CFG scale": "1", "Distilled CFG Scale": "2", "Schedule type": "Simple", "Size": "32x24"}.items() <= fields.items()


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("SD3", {}, {"Shift": "3"}),
        ("SD3", {"shift": 6.0}, {"Shift": "6"}),
        # exp(0.5 + (48 − 256) / (4096 − 256) · (1.15 − 0.5)), of 48 tokens
        ("Flux dev", {}, {"Distilled CFG Scale": "3.5", "Shift": "1.59168"}),
        ("Flux dev", {"cond_scale": 2.0, "shift": 3.0}, {"Distilled CFG Scale": "2", "Shift": "3"}),
        ("Flux schnell", {}, {"Shift": "1"}),
        ("flow XL", {}, {"Shift": "2.5"}),
    ],
)
def test_what_is_written_into_the_picture(saved, kind, options, expected):
    model = opened(saved(kind), **options)
    assert {name: value for name, value in model.fields.items() if name in ("Distilled CFG Scale", "Shift")} == expected
    assert model.own_schedule == "Simple" and model.fields["Size"] == "32x24"
    assert model.cond_scale == {"SD3": 4.5, "flow XL": 7.5}.get(kind, 1.0)


@pytest.mark.parametrize("kind", ["SD3", "Flux dev"])
def test_the_schedules_are_those_of_diffusers_scheduler(saved, tmp_path, kind):
    model, pipe = opened(saved(kind)), diffusers.load(saved(kind))
    for schedule in "model", "karras", "exponential":
        options = {} if schedule == "model" else {f"use_{schedule}_sigmas": True}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **options)
        with_it = copy.copy(pipe)
        with_it.scheduler = scheduler
        expected = diffusers.denoiser(with_it, size=(24, 32)).get_sigmas(6)
        torch.testing.assert_close(model.sigmas(6, schedule), expected, rtol=2e-3, atol=0)  # float32 near t = 1
    shutil.copytree(saved(kind), tmp_path / "exponential")
    scheduler.save_pretrained(tmp_path / "exponential" / "scheduler")
    assert (model.own_schedule, opened(tmp_path / "exponential").own_schedule) == ("Simple", "Exponential")


def test_more_shift_means_more_steps_at_high_noise(saved):
    low, high = (opened(saved("SD3"), shift=shift) for shift in (1.0, 4.0))
    assert (high.sigmas(6, "model")[1:-1] > low.sigmas(6, "model")[1:-1]).all()
    assert not torch.equal(*(sampling(model, 3).latents([4]) for model in (low, high)))


@pytest.mark.parametrize("kind", ["SD3", "Flux schnell"])
def test_less_strength_stays_nearer_to_the_picture(saved, tmp_path, kind):
    to_pil_image(torch.rand(3, 24, 32)).save(tmp_path / "picture.png")
    distances = []
    for strength in 0.2, 0.6, 1.0:
        model = opened(saved(kind), image=tmp_path / "picture.png", strength=strength)
        latents = sampling(model, 10).latents([4])
        distances.append((latents - model.start()).norm())
    assert distances[0] < distances[1] < distances[2]


def test_outside_the_mask_the_picture_is_unchanged(saved, tmp_path):
    given = torch.rand(3, 24, 32)
    to_pil_image(given).save(tmp_path / "picture.png")
    Image.frombytes("L", (32, 24), bytes([0] * 16 + [255] * 16) * 24).save(tmp_path / "mask.png")
    model = opened(saved("Flux dev"), image=tmp_path / "picture.png", mask=tmp_path / "mask.png", strength=1.0)
    latents, start = sampling(model, 3, 1.0).latents([4]), model.start()
    torch.testing.assert_close(latents[..., :8], start[..., :8])
    assert (latents[..., 8:] - start[..., 8:]).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("kind", "args", "code", "message"),
    [
        ("Flux dev", ["--negative-prompt", "bad"], 2, "FluxPipeline, which is sampled without a negative prompt: leave --negative"),
        ("Flux schnell", ["--cond-scale", 3], 2, "FluxPipeline without a guidance scale: leave --cond-scale out"),
        ("Flux dev", ["--clip-skip", 2], 2, "--clip-skip: a FluxPipeline does not use the layers of its CLIP text encoder"),
        ("SD3", ["--clip-skip", 5], 2, "--clip-skip 5: the text encoder has 4 layers"),
        ("SD3", ["--size", "34x24"], 2, "both must be multiples of 4, such as 32x24"),
        ("SD3", ["--shift", 0], 2, "0.0 is not in the range"),
    ],
)
def test_bad_input_is_one_clear_line(saved, tmp_path, kind, args, code, message):
    args = ["--prompt", "a", *args, "--device", "cpu", "--out", tmp_path / "x.png"]
    assert message in invoke("sample", "--pipeline", saved(kind), *args, code=code)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("pipeline", ["WanPipeline", "LTXPipeline", "SanaPipeline", "StableAudioPipeline", "FluxKontextPipeline"])
def test_a_folder_of_another_kind_is_refused_in_one_sentence(tmp_path, pipeline):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "transformer": ["diffusers", "Transformer"]}))
    output = invoke("sample", "--pipeline", tmp_path, "--prompt", "a", "--device", "cpu", "--out", tmp_path / "x.png", code=1)
    assert f"is a '{pipeline}'. ksag samples Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, and Flux" in output
    assert not (tmp_path / "x.png").exists()
