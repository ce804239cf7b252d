"""Do the calls of docs/coming-from.md run, with the settings of the tool they stand for? (test_same_image.py has the images.)"""

import re
from pathlib import Path
from types import SimpleNamespace

import k_diffusion as K
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import ksag
from ksag.adapters import diffusers
from ksag.adapters.diffusers import DiscreteDenoiser
from tests import flow_pipelines
from tests.diffusers_pipelines import stable_diffusion
from tests.models import make_denoiser, openai_unet, seeded
from tests.test_dimensions import sound, stable_audio

PAGE = (Path(__file__).parents[1] / "docs" / "coming-from.md").read_text()
BLOCKS = dict(re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", PAGE, re.M | re.S))
COLUMNS = 46
"""Of code on a page 420 pixels wide."""


def run(tool, code=None, **names):
    names["ksag"] = ksag
    exec(code or BLOCKS[tool], names)
    return names


def settings(guided):
    return guided.sag_scale, guided.blur_sigma, guided.blur_kernel_size, guided.mask_threshold


@pytest.mark.parametrize(
    ("tool", "expected"), [("ComfyUI", (0.5, 2.0, 9, 1.0)), ("Forge", (0.5, 2.0, 9, 1.0)), ("A1111", (0.75, 1.0, 9, 1.0))]
)
def test_user_interfaces(tool, expected):
    guided = run(tool, denoiser=make_denoiser())["guided"]
    assert settings(guided) == expected and guided.sigma_range == (0.0, float("inf"))


def test_comfyuis_defaults_are_ksags():
    assert settings(run("ComfyUI", denoiser=make_denoiser())["guided"]) == settings(ksag.SAGDenoiser(make_denoiser()))


def test_diffusers(tmp_path):
    names = run("diffusers", pipe=stable_diffusion(tmp_path))
    guided = names["guided"]
    assert settings(guided) == (0.75, 1.0, 9, 1.0) and guided.cond_key is None and names["extra_args"] == {"cond_scale": 7.5}
    assert isinstance(guided.inner_model, DiscreteDenoiser) and guided.inner_model.quantize


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "make"),
    [("diffusers, Stable Diffusion 3", flow_pipelines.stable_diffusion_3), ("diffusers, Flux", flow_pipelines.flux)],
)
def test_scripts_of_flow_matching(tmp_path, monkeypatch, tool, make):
    """Unchanged except for the weights, the device and the size; without SAG, the picture is diffusers' own."""
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[tool]
    changes = {'f"{owner}/{name}"': '"pipe"', "1024, 1024": "16, 24", '"cuda"': '"cpu"', "bfloat16": "float32"}
    for old, new in changes.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    code = code.replace(", 28", ", 3")
    with_sag = pixels_of(run(tool, code)["picture"])
    assert torch.equal(pixels_of(Image.open("cat.png")), with_sag)
    names = run(tool, code.replace("sag_scale=0.5", "sag_scale=0"))
    pipe, latents = diffusers.load("pipe"), names["noise"]
    options = {"num_inference_steps": 3, "guidance_scale": names["guidance_scale"], **flow_pipelines.SIZE}
    if "Flux" in tool:
        latents = flow_pipelines.pack(latents)
    else:
        options["negative_prompt"] = "blurry"
    expected = pixels_of(pipe("a cat", **options, latents=latents).images[0])
    difference = (pixels_of(names["picture"]) - expected).abs()
    assert difference.max() <= 2 and difference.mean() < 0.2  # of 255
    assert (with_sag - expected).abs().mean() > 0.5


def pixels_of(picture):
    return pil_to_tensor(picture).float()


@pytest.mark.slow
def test_stable_audio_tools():
    """With its transformer, in a stand-in for the model's wrappers, which need more packages."""
    denoiser, cond = stable_audio(), {name: value for name, value in sound(batch=1)[2].items() if "global" not in name}
    dit = denoiser.inner_model
    model = SimpleNamespace(
        model=dit, conditioner=lambda texts, device: texts, get_conditioning_inputs=lambda texts: cond | {"x": None}
    )
    code = BLOCKS["stable-audio-tools"].replace("100, 0.3", "3, 0.3")
    noise = torch.randn(1, 4, 24)
    names = run("", code, model=model, conditioning=[{}], device="cpu", noise=noise)
    x, sigma = noise * 3, torch.full((1,), 3.0)
    plain = names["guided"](x, sigma, **names["extra_args"], sag_scale=0.0)
    torch.testing.assert_close(plain, denoiser(x, sigma, **cond, cfg_scale=7.0), rtol=1e-4, atol=1e-4)
    assert names["latents"].shape == noise.shape and names["latents"].isfinite().all()


class Schedule:
    """What K.external.OpenAIDenoiser reads of guided-diffusion's."""

    alphas_cumprod = torch.linspace(0.99, 0.01, 100).tolist()


def test_the_papers_repository():
    """On the UNet that it is for, tiny: so the layer is another than the page's."""
    denoiser = K.external.OpenAIDenoiser(seeded(openai_unet(False)), Schedule, has_learned_sigmas=False)
    code = BLOCKS["The paper's repository"]
    assert code.count("N = 2 ") == 1
    guided = run("", code.replace("N = 2 ", "N = 1 "), denoiser=denoiser)["guided"]
    scale, *others = settings(guided)
    assert scale == pytest.approx(0.1) and others == [3.0, 31, 1.0] and guided.sigma_range == (0.0, 80.0)
    assert guided.tap.path == "inner_model.output_blocks.1.1"


@pytest.mark.parametrize("tool", BLOCKS)
def test_the_code_fits_a_narrow_window(tool):
    assert max(map(len, BLOCKS[tool].splitlines())) <= COLUMNS


def test_each_tool_has_one_block():
    assert list(BLOCKS) == re.findall(r"^## (.+)$", PAGE, re.M) and PAGE.count("```python") == len(BLOCKS) == 8
