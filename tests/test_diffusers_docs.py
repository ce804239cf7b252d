"""The examples of docs/diffusers.md, run unchanged."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import (
    relative,
    stable_diffusion,
    stable_diffusion_inpainting,
    stable_diffusion_with_controlnet,
    stable_diffusion_with_ip_adapter,
    stable_diffusion_with_t2i_adapter,
    stable_diffusion_xl,
)
from tests.flow_pipelines import flux, stable_diffusion_3

SMALL = {"1024, 1024": "16, 24", "0, 28": "0, 3"}
DOCUMENT = Path(__file__).parents[1] / "docs" / "diffusers.md"


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The files that they open, small: what is right of the middle is white in the mask."""
    monkeypatch.chdir(tmp_path)
    noise = Image.effect_noise((16, 16), 90)
    for name in "photo.jpg", "edges.png":
        noise.convert("RGB").save(name)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save("mask.png")


def other_picture(name):
    """Replaces the file by another picture."""
    picture = Image.open(name)
    picture.transpose(Image.Transpose.ROTATE_90).save(name)


def replaced(old, new):
    def edit(code):
        assert code.count(old) == 1
        return code.replace(old, new)

    return edit


def run_example(heading, edit=lambda code: code, **names):
    section = DOCUMENT.read_text().split(f"\n## {heading}\n" if heading else "A whole script")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    code = code.replace("get_sigmas(20)", "get_sigmas(10)").replace("strength * 20", "strength * 10")
    exec(compile(edit(code), f"{DOCUMENT.name}: {heading}", "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "heading", "changes"),
    [
        (stable_diffusion, "", {'"stable-diffusion-v1-5/stable-diffusion-v1-5"': "'pipe'", "512, 512": "16, 24", "0, 25": "0, 3"}),
        (
            stable_diffusion_xl,
            "",
            {'"stable-diffusion-v1-5/stable-diffusion-v1-5"': "'pipe'", "512, 512": "16, 24", "0, 25": "0, 3"},
        ),
        (stable_diffusion_3, "Stable Diffusion 3", {'"stabilityai/stable-diffusion-3.5-medium"': "'pipe'", **SMALL}),
        (flux, "Flux", {'"black-forest-labs/FLUX.1-dev"': "'pipe'", **SMALL}),
    ],
    ids=["1.x", "XL", "3", "Flux"],
)
def test_the_whole_scripts(tmp_path, monkeypatch, make, heading, changes):
    """Unchanged except for the name of the weights, which are not available here, the size and the number of steps."""
    make(tmp_path)
    monkeypatch.chdir(tmp_path)

    def edit(code):
        for old, new in changes.items():
            assert code.count(old) == 1
            code = code.replace(old, new)
        return code

    names = run_example(heading, edit)
    (saved,) = tmp_path.glob("*.png")
    picture = np.asarray(Image.open(saved))
    assert picture.shape == (16, 24, 3) and picture.std() > 1 and np.array_equal(picture, np.asarray(names["picture"]))


def test_image_to_image_example(tmp_path, pictures):
    pipe = stable_diffusion(tmp_path)
    near, far = (
        run_example("Image to image", replaced('Image.open("photo.jpg"), 0.6', f'Image.open("photo.jpg"), {strength}'), pipe=pipe)
        for strength in (0.1, 0.9)
    )
    start = adapter.encode(pipe, Image.open("photo.jpg"))
    assert relative(near["latent"], start) < relative(far["latent"], start)


@pytest.mark.parametrize("heading", ["Inpainting with an inpainting model", "Inpainting with any model"])
def test_inpainting_examples(tmp_path, pictures, heading):
    pipe = stable_diffusion_inpainting(tmp_path) if "inpainting model" in heading else stable_diffusion(tmp_path)
    names = run_example(heading, pipe=pipe)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    latent = names["latent"]
    assert latent.shape == (1, 4, 8, 8) and latent.isfinite().all() and torch.equal(names["mask"], mask)
    image = adapter.encode(pipe, Image.open("photo.jpg"))
    if heading == "Inpainting with any model":
        torch.testing.assert_close(latent[..., :4], image[..., :4])
        assert not torch.allclose(latent[..., 4:], image[..., 4:])
    else:
        masked = names["extra_args"]["concat"][:, 1:]
        grey = adapter.encode(pipe, names["image"] * torch.tensor([1.0, 0.0]).repeat_interleave(8))
        assert relative(masked, grey) < 1e-6 and relative(masked, image) > 1e-3


def test_controlnet_example(tmp_path, pictures):
    pipe = stable_diffusion_with_controlnet(tmp_path)
    one = run_example("ControlNet", pipe=pipe)["latent"]
    other_picture("edges.png")
    other = run_example("ControlNet", pipe=pipe)["latent"]
    assert one.isfinite().all() and relative(one, other) > 1e-4


def around_example(heading, pipe, edit=lambda code: code, **names):
    """The example's lines, then a call that shows what they gave the model."""
    names = run_example(heading, edit, pipe=pipe, **names)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with names["guided"] as guided:
        return guided(x, torch.ones(1), cond=names["cond"], uncond=names["uncond"], cond_scale=3.0)


def test_t2i_adapter_example(tmp_path, pictures):
    pipe = stable_diffusion_with_t2i_adapter(tmp_path)
    one = around_example("T2I-Adapter", pipe)
    other_picture("edges.png")
    assert one.isfinite().all() and relative(one, around_example("T2I-Adapter", pipe)) > 1e-3


def test_ip_adapter_example(tmp_path):
    """With embeddings instead of the picture, because the tiny pipeline has no image encoder; its adapter is loaded already."""
    pipe, embeds = stable_diffusion_with_ip_adapter(tmp_path), torch.randn(1, 1, 16)
    prepare = pipe.prepare_ip_adapter_image_embeds
    pipe.prepare_ip_adapter_image_embeds = lambda picture, _, *rest: prepare(
        None, [torch.cat([torch.zeros_like(picture), picture])], *rest
    )
    pipe.load_ip_adapter = lambda *args, **kwargs: None
    edit = replaced('Image.open("photo.jpg")', "embeds")
    one, other = (around_example("IP-Adapter", pipe, edit, embeds=e) for e in (embeds, -embeds))
    assert one.isfinite().all() and relative(one, other) > 1e-3
