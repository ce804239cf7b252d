"""Do the calls of docs/coming-from.md run, with the settings of the tool they stand for? (test_same_image.py has the images.)"""

import re
from pathlib import Path

import k_diffusion as K
import pytest
import torch

import ksag
from ksag.adapters.diffusers import DiscreteDenoiser
from tests.diffusers_pipelines import stable_diffusion
from tests.models import make_denoiser, openai_unet, seeded

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
    assert list(BLOCKS) == re.findall(r"^## (.+)$", PAGE, re.M) and PAGE.count("```python") == len(BLOCKS) == 5
