"""Does `ksag sample --pipeline` start from a picture, and keep what its mask leaves out?"""

import click
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from ksag.adapters import diffusers
from ksag.commands import inputs
from tests import diffusers_pipelines
from tests.commands import invoke, pixels, text

KINDS = {"1.x": diffusers_pipelines.stable_diffusion, "inpainting": diffusers_pipelines.stable_diffusion_inpainting}


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


@pytest.fixture
def sample(saved):
    def run(kind, *args, **options):
        return invoke("sample", "--pipeline", saved(kind), "--device", "cpu", "--steps", 3, *args, **options)

    return run


@pytest.fixture
def picture(tmp_path):
    """Left half noise, right half noise too, and a mask that is white on the right."""
    torch.manual_seed(0)
    to_pil_image(torch.rand(3, 24, 32)).save(tmp_path / "picture.png")
    mask = torch.zeros(1, 24, 32)
    mask[..., 16:] = 1
    to_pil_image(mask).save(tmp_path / "mask.png")
    return tmp_path / "picture.png", tmp_path / "mask.png"


def test_less_strength_stays_nearer_to_the_picture(sample, saved, picture, tmp_path):
    image, _ = picture
    pipe = diffusers.load(saved("1.x"))
    through_vae = diffusers.decode(pipe, diffusers.encode(pipe, Image.open(image)), pil=True)[0]
    distances = []
    for strength in 0.4, 0.8:
        out = tmp_path / f"{strength}.png"
        sample("1.x", "--prompt", "a cat", "--image", image, "--size", "32x24", "--strength", strength, "--steps", 5, "--out", out)
        distances.append((pixels(out) - pil_to_tensor(through_vae)).abs().mean())
        assert f"Denoising strength: {strength}" in text(out)
    assert distances[0] < distances[1]
    assert pixels(out).shape == (3, 24, 32)


@pytest.mark.parametrize(
    ("given", "asked", "expected"),
    [
        ((32, 24), [], (18, 14)),  # 256 pixels were trained at: 18.5 by 13.9, in multiples of 2
        ((300, 1200), ["--sag-scale", 0], (8, 32)),  # a latent of 4 × 16 is too small for the blur
        ((6, 6), [], (16, 16)),
        ((32, 24), ["--size", "16x16"], (16, 16)),
    ],
)
def test_a_picture_is_scaled_to_the_trained_size_or_cropped_to_the_size_given(sample, tmp_path, given, asked, expected):
    Image.new("RGB", given, "red").save(tmp_path / "given.png")
    sample("1.x", "--prompt", "a cat", "--image", tmp_path / "given.png", *asked, "--out", tmp_path / "x.png")
    assert f"Size: {expected[0]}x{expected[1]}," in text(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").shape == (3, expected[1], expected[0])


def test_another_aspect_is_cropped_to_the_centre_with_its_mask(saved, tmp_path):
    """A picture whose middle half is white, and a mask of that half: the cropped squares are white."""
    from ksag.commands.pipeline import Pipeline

    wide = torch.zeros(3, 32, 64)
    wide[..., 16:48] = 1
    to_pil_image(wide).save(tmp_path / "picture.png")
    to_pil_image(wide[:1]).save(tmp_path / "mask.png")
    args = {"prompt": ["a"], "image": tmp_path / "picture.png", "mask": tmp_path / "mask.png", "size": (32, 32)}
    model = Pipeline(str(saved("1.x")), torch.device("cpu"), torch.float32, **args)
    for made in model.picture, model.mask:
        assert made.size == (32, 32)
        assert pil_to_tensor(made).min() == 255


@pytest.mark.parametrize("kind", ["1.x", "inpainting"])
def test_outside_the_mask_the_picture_is_unchanged(sample, picture, tmp_path, kind):
    image, mask = picture
    sample(kind, "--prompt", "a cat", "--image", image, "--mask", mask, "--size", "32x24", "--strength", 1,
           "--out", tmp_path / "x.png")  # fmt: skip
    made, given = pixels(tmp_path / "x.png"), pixels(image)
    assert torch.equal(made[..., :16], given[..., :16])
    assert (made[..., 16:] - given[..., 16:]).abs().mean() > 5
    assert "Mask hash: " in text(tmp_path / "x.png")


def test_a_masked_denoiser_returns_the_picture_outside_the_mask():
    from ksag.commands.pipeline import Masked

    class Doubler(torch.nn.Module):  # a stand-in for the guided denoiser
        def forward(self, x, sigma, times):
            return x * times

    latent, x = torch.randn(1, 4, 6, 8), torch.randn(2, 4, 6, 8)
    mask = torch.zeros(1, 1, 6, 8)
    mask[..., 4:] = 1
    out = Masked(Doubler(), latent, mask)(x, torch.ones(2), times=2)
    assert torch.equal(out[..., 4:], x[..., 4:] * 2)
    assert torch.equal(out[..., :4], latent[..., :4].expand(2, -1, -1, -1))


def test_the_concat_of_an_inpainting_unet_is_diffusers_own(saved, picture):
    """Against the same seed's call of diffusers' own preparation of mask and masked picture."""
    from ksag.commands.pipeline import Pipeline

    image, mask = picture
    args = {"prompt": ["a cat"], "image": image, "mask": mask, "size": (24, 32)}
    model = Pipeline(str(saved("inpainting")), torch.device("cpu"), torch.float32, **args)
    pipe = model.pipe
    pixels_of_mask = pipe.mask_processor.preprocess(Image.open(mask), 24, 32)
    visible = pipe.image_processor.preprocess(Image.open(image), 24, 32) * (pixels_of_mask < 0.5)
    expected_mask = torch.nn.functional.interpolate(pixels_of_mask, size=model.shape[1:])
    expected = torch.cat([expected_mask, pipe.vae.encode(visible).latent_dist.mode() * pipe.vae.config.scaling_factor], dim=1)
    torch.testing.assert_close(model.conditioning([0])["cond"]["concat"], expected, atol=1e-5, rtol=1e-5)


def test_few_steps_of_a_picture_are_refused(sample, picture, tmp_path):
    args = ["--prompt", "a", "--image", picture[0], "--strength", 0.3, "--out", tmp_path / "x.png"]
    assert "leaves 1 of 3 steps" in sample("1.x", *args, code=2)


@pytest.mark.parametrize("damage", ["text", "cut off", "huge"])
def test_what_is_no_picture_is_named(picture, tmp_path, monkeypatch, damage):
    content = picture[0].read_bytes()
    damaged = {"text": b"a cat", "cut off": content[: len(content) // 2], "huge": content}[damage]
    (tmp_path / "bad.png").write_bytes(damaged)
    if damage == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(click.UsageError, match=r"bad\.png is damaged, too large, or not a picture: "):
        inputs.picture(tmp_path / "bad.png", "RGB")


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_a_picture_of_more_than_8_bits_is_refused(tmp_path, mode):
    Image.new(mode, (8, 8)).save(tmp_path / "deep.tiff")
    with pytest.raises(click.UsageError, match=r"deep\.tiff has more than 8 bits a channel"):
        inputs.picture(tmp_path / "deep.tiff", "L")


def test_a_mask_of_another_size_is_refused(sample, picture, tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "mask.png")
    args = ["--prompt", "a", "--image", picture[0], "--mask", tmp_path / "mask.png", "--out", tmp_path / "x.png"]
    assert "mask.png is 32x32, and --image is 32x24: give a mask of the picture's size" in sample("1.x", *args, code=2)
