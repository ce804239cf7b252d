"""Prompts and pictures of the pipelines trained by flow matching."""

import numpy as np
import pytest
import torch
from PIL import Image

import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import stable_diffusion
from tests.flow_pipelines import (
    SIZE,
    chroma,
    flux,
    made,
    pack,
    qwen_image,
    stable_diffusion_3,
    unpack,
)

# Prompts


def test_prompts_of_stable_diffusion_3_are_the_pipelines_own():
    pipe = made(stable_diffusion_3)
    cond, uncond = adapter.conditioning(pipe, ["a cat", "a dog"], "bad", prompt_2="oil", n=2)
    expected = pipe.encode_prompt(["a cat", "a dog"], ["oil", "oil"], None, num_images_per_prompt=2, negative_prompt=["bad", "bad"])
    for side, text, pooled in (cond, expected[0], expected[2]), (uncond, expected[1], expected[3]):
        torch.testing.assert_close((side["encoder_hidden_states"], side["pooled_projections"]), (text, pooled))
    empty = adapter.conditioning(pipe, "a cat")[1]
    assert torch.equal(empty["pooled_projections"], adapter.conditioning(pipe, "a cat", "")[1]["pooled_projections"])
    skipped = adapter.conditioning(pipe, "a cat", clip_skip=1)[0]["encoder_hidden_states"]
    assert not torch.allclose(skipped, adapter.conditioning(pipe, "a cat")[0]["encoder_hidden_states"])


def test_text_reaches_the_t5_encoder():
    """Its tiny tokenizer has a token for each letter."""
    pipe = made(flux)
    assert pipe.tokenizer_2("a cat").input_ids == [3, 4, 3, 6, 4, 23, 1]
    one, two = (adapter.conditioning(pipe, "a cat", prompt_2=text)[0] for text in ("a cat", "a dog"))
    assert torch.equal(one["pooled_projections"], two["pooled_projections"])
    assert not torch.allclose(one["encoder_hidden_states"], two["encoder_hidden_states"])
    assert one["guidance"].tolist() == [3.5]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (flux, {"clip_skip": 1}, r"A FluxPipeline does not use the layers of a CLIP text encoder, so it takes no clip_skip"),
        (flux, {"control": torch.zeros(1, 3, 16, 16)}, r"A FluxPipeline has no ControlNet"),
        (stable_diffusion_3, {"guidance": 3.0}, r"does not take its guidance scale as an input: leave guidance= out"),
        (stable_diffusion, {"guidance": 3.0}, r"guidance= is for transformers"),
        (chroma, {"prompt_2": "oil"}, r"A ChromaPipeline has one text encoder, so it takes no prompt_2"),
        (flux, {"negative_prompt": ["one", "two"]}, r"1 prompts, but 2 texts"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, make, options, message):
    with pytest.raises(ValueError, match=message):
        adapter.conditioning(make(tmp_path) if make is stable_diffusion else made(make), "a cat", **options)


def test_a_pipeline_without_text_encoders():
    pipe = made(flux)
    pipe.text_encoder = None
    with pytest.raises(
        TypeError, match=r"Expected a pipeline with text encoders and one of SD3Transformer2DModel, .* FluxPipeline"
    ):
        adapter.conditioning(pipe, "a cat")


# Pictures


@pytest.mark.parametrize("make", [stable_diffusion_3, flux, qwen_image])
def test_pictures_are_the_pipelines_own(make):
    pipe = made(make)
    latents = torch.randn(1, 16, 8, 12)
    packed = latents if make is stable_diffusion_3 else pack(latents)
    args = {"num_inference_steps": 2, "latents": packed, **SIZE}
    expected = pipe("a cat", **args, output_type="pt").images
    result = pipe("a cat", **args, output_type="latent").images
    result = result if make is stable_diffusion_3 else unpack(result)
    images = adapter.decode(pipe, result)
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-4)
    # what goes in comes out: the mode of the posterior, in the network's scale
    video = make is qwen_image
    mode = pipe.vae.encode(images.unsqueeze(2) if video else images).latent_dist.mode()
    shown = pipe.vae.decode(mode).sample
    again = adapter.decode(pipe, adapter.encode(pipe, images))
    torch.testing.assert_close(again, shown.squeeze(2) if video else shown, rtol=1e-4, atol=1e-4)


def test_a_pil_picture_is_cut_to_whole_patches():
    pipe = made(flux)
    noise = Image.effect_noise((27, 21), 80)
    assert adapter.encode(pipe, noise).shape == (1, 16, 10, 12)
    resized = np.asarray(noise.convert("RGB").resize((24, 20), Image.Resampling.LANCZOS), np.float32)
    tensor = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(adapter.encode(pipe, noise), adapter.encode(pipe, tensor), rtol=1e-4, atol=1e-4)
