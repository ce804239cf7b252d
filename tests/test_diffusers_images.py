"""Do images, latents and pictures equal those from diffusers' own pipelines?"""

import k_diffusion as K
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import StableDiffusionSAGPipeline
from PIL import Image

import ksag
import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import (
    at_timesteps_of,
    relative,
    scheduler,
    sdxl_unet,
    stable_diffusion,
    stable_diffusion_xl,
    text_encoder,
    tokenizer,
    unet,
    vae,
)

# The same image as diffusers' own pipelines


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_diffusers_sag_pipeline(tmp_path, guidance_scale):
    pipe = StableDiffusionSAGPipeline(
        vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(tmp_path / "words"), unet=unet(), scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    text, negative, latents = torch.randn(2, 16, 32), torch.randn(2, 16, 32), torch.randn(2, 4, 12, 20)
    expected = pipe(
        prompt_embeds=text, negative_prompt_embeds=negative, latents=latents, height=24, width=40, num_inference_steps=8,
        guidance_scale=guidance_scale, sag_scale=0.75, eta=0.0, output_type="latent",
    ).images  # fmt: skip

    denoiser = adapter.denoiser(unet(), pipe.scheduler, quantize=True)
    guided = ksag.SAGDenoiser(denoiser, sag_scale=0.75, blur_sigma=1.0, cond_key=None)
    x, sigmas = at_timesteps_of(pipe.scheduler, denoiser, latents, 8)
    args = {"cond": {"encoder_hidden_states": text}}
    if guidance_scale > 1:
        args |= {"uncond": {"encoder_hidden_states": negative}, "cond_scale": guidance_scale}
    with guided.trace() as steps:
        result = K.sampling.sample_euler(guided, x, sigmas, extra_args=args, disable=True)
    unguided = K.sampling.sample_euler(guided, x, sigmas, extra_args={**args, "sag_scale": 0.0}, disable=True)
    result, unguided = (x / (1 + sigmas[-1] ** 2).sqrt() for x in (result, unguided))
    assert steps[0].saliency.shape == (2, 6, 10)
    assert relative(result, expected) < 1e-5
    assert relative(unguided, expected) > 1e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_text_to_image_is_diffusers_own_without_sag(tmp_path, prediction_type):
    pipe = stable_diffusion(tmp_path, scheduler_options={"prediction_type": prediction_type})
    latents = torch.randn(2, 4, 8, 8)
    expected = pipe(
        ["a cat", "a dog"], negative_prompt=["bad", "bad"], latents=latents, num_inference_steps=6, guidance_scale=4.0,
        output_type="pt", height=16, width=16,
    ).images  # fmt: skip
    denoiser = adapter.denoiser(pipe, quantize=True)
    cond, uncond = adapter.conditioning(pipe, ["a cat", "a dog"], "bad")
    x, sigmas = at_timesteps_of(pipe.scheduler, denoiser, latents, 6)
    guided = ksag.SAGDenoiser(denoiser, sag_scale=0.0, cond_key=None)
    x = K.sampling.sample_euler(guided, x, sigmas, {"cond": cond, "uncond": uncond, "cond_scale": 4.0}, disable=True)
    images = adapter.decode(pipe, x / (1 + sigmas[-1] ** 2).sqrt())
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("negative", [{"negative_prompt": "bad"}, {}])
def test_sdxl_is_diffusers_own_without_sag(tmp_path, negative):
    pipe = stable_diffusion_xl(tmp_path)
    latents = torch.randn(2, 4, 8, 12)
    expected = pipe(
        "a cat", **negative, num_images_per_prompt=2, latents=latents, num_inference_steps=6, guidance_scale=4.0,
        output_type="latent", height=16, width=24,
    ).images  # fmt: skip
    denoiser = adapter.denoiser(pipe, quantize=True)
    cond, uncond = adapter.conditioning(pipe, "a cat", **negative, n=2, size=(16, 24))
    x, sigmas = at_timesteps_of(pipe.scheduler, denoiser, latents, 6)
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    guided = ksag.SAGDenoiser(denoiser, cond_key=None)
    plain = K.sampling.sample_euler(guided, x, sigmas, {**args, "sag_scale": 0.0}, disable=True)
    assert relative(plain / (1 + sigmas[-1] ** 2).sqrt(), expected) < 1e-5
    with_sag = K.sampling.sample_euler(guided, x, sigmas, args, disable=True)
    assert with_sag.isfinite().all() and relative(with_sag, plain) > 1e-3


def test_sdxl_shape_reads_its_middle():
    assert ksag.list_attention(sdxl_unet())
    guided = ksag.SAGDenoiser(adapter.denoiser(sdxl_unet(), scheduler()), cond_key=None)
    assert guided.tap.path == "inner_model.mid_block.attentions.0.transformer_blocks.0.attn1"


def test_encode_and_decode_scale_the_latents_as_the_unet_expects(tmp_path):
    pipe = stable_diffusion(tmp_path)
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    mode = pipe.vae.encode(image).latent_dist.mode()
    latent = adapter.encode(pipe, image)
    torch.testing.assert_close(latent, mode * pipe.vae.config.scaling_factor)
    torch.testing.assert_close(adapter.decode(pipe, latent), pipe.vae.decode(mode).sample, rtol=1e-4, atol=1e-5)


def test_a_vae_whose_latents_have_a_mean_and_a_spread(tmp_path):
    pipe = stable_diffusion_xl(tmp_path, {"latents_mean": [-0.5, 0.25, 1.0, 2.0], "latents_std": [0.5, 1.5, 2.0, 3.0]})
    args = {"prompt": "a cat", "latents": torch.randn(1, 4, 8, 8), "num_inference_steps": 2, "height": 16, "width": 16}
    latents, expected = (pipe(**args, output_type=output).images for output in ("latent", "pt"))
    images = adapter.decode(pipe, latents)
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-4)
    mode = pipe.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(
        adapter.decode(pipe, adapter.encode(pipe, images)), pipe.vae.decode(mode).sample, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("size", [None, (16, 24)])
def test_pil_pictures(tmp_path, size):
    """Eight bits a channel each way: as diffusers' own processor reads and writes them."""
    pipe = stable_diffusion(tmp_path)
    pictures = [Image.effect_noise((24, 16) if size is None else (50, 40), 80).convert(mode) for mode in ("RGB", "L", "RGBA")]
    latents = adapter.encode(pipe, pictures, size=size)
    assert latents.shape == (3, 4, 8, 12) and latents.dtype == torch.float32
    torch.testing.assert_close(adapter.encode(pipe, pictures[1], size=size), latents[1:2], rtol=1e-4, atol=1e-4)
    pixels = [np.asarray(p.convert("RGB").resize((24, 16), Image.Resampling.LANCZOS), np.float32) for p in pictures]
    tensor = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(latents, adapter.encode(pipe, tensor), rtol=1e-4, atol=1e-4)

    written = adapter.decode(pipe, latents, pil=True)
    expected = ((adapter.decode(pipe, latents) / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).byte().numpy()
    assert [np.asarray(picture).tolist() for picture in written] == expected.tolist()


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (torch.zeros(3, 16, 16), {}, ValueError, r"Expected pictures of shape \(b, 3, H, W\) in \[-1, 1\], got \(3, 16, 16\)"),
        (torch.zeros(1, 4, 16, 16), {}, ValueError, r"got \(1, 4, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16), {"size": (8, 8)}, ValueError, r"size= is for PIL pictures"),
        ("cat.png", {}, TypeError, r"Expected a tensor .* or PIL pictures, got 'cat.png'"),
        ([], {}, TypeError, r"or PIL pictures, got \[\]"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (16, 8))], {}, ValueError, r"of several sizes, .*give size=\(height, width\)"),
    ],
)
def test_pictures_that_cannot_be_encoded(tmp_path, images, options, error, message):
    with pytest.raises(error, match=message):
        adapter.encode(stable_diffusion(tmp_path), images, **options)


def test_a_vae_that_overflows_is_an_error_rather_than_a_black_picture(tmp_path):
    """As SDXL's does in float16."""
    pipe = stable_diffusion(tmp_path)
    pipe.vae.requires_grad_(False)
    for conv in pipe.vae.decoder.conv_out, pipe.vae.encoder.conv_out:
        conv.weight.mul_(6e4 / conv.weight.abs().max())  # what float16 still holds
    for call, tensor in (adapter.decode, torch.randn(1, 4, 8, 8)), (adapter.encode, torch.rand(1, 3, 16, 16)):
        pipe.vae.float()
        assert call(pipe, tensor).isfinite().all()
        pipe.vae.half()
        with pytest.raises(ValueError, match=r"infinite or NaN, in torch.float16.*pipe.vae.to\(torch.float32\)"):
            call(pipe, tensor)


# Offloaded and cast


def offload(pipe):
    """As `enable_sequential_cpu_offload` does, which needs a GPU: the weights wait on "meta" between two uses."""
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            cpu_offload(model, "cpu")
    assert pipe.unet.device.type == pipe.vae.device.type == "meta"


def test_sequential_offload_changes_nothing(tmp_path):
    pipe = stable_diffusion(tmp_path)
    picture = torch.rand(1, 3, 16, 16) * 2 - 1

    def image():
        denoiser = adapter.denoiser(pipe)
        assert denoiser.sigmas.device.type == "cpu"
        cond, uncond = adapter.conditioning(pipe, "a cat", "bad")
        sigmas = denoiser.get_sigmas(3)
        x = adapter.encode(pipe, picture) + sigmas[0]
        args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
        with ksag.SAGDenoiser(denoiser, cond_key=None) as guided:
            return adapter.decode(pipe, K.sampling.sample_euler(guided, x, sigmas, args, disable=True))

    with torch.no_grad():
        expected = image()
        offload(pipe)
        assert torch.equal(image(), expected)


def test_the_schedule_lies_where_a_model_that_is_moved_as_a_whole_will_compute():
    """As `enable_model_cpu_offload` moves it; "meta" represents the GPU."""
    model = unet()
    cpu_offload_with_hook(model, "meta")
    assert model.device.type == "cpu"
    assert adapter.denoiser(model, scheduler()).sigmas.device.type == "meta"


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("cast_first", [True, False])
def test_layerwise_casting_computes_in_its_computing_dtype(storage, cast_first):
    model = unet()
    denoiser = adapter.denoiser(model, scheduler())
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    if cast_first:
        denoiser = adapter.denoiser(model, scheduler())
    assert next(model.parameters()).dtype == storage
    x, sigma, text = torch.randn(2, 4, 8, 8) * 4, torch.full((2,), 4.0), torch.randn(2, 7, 32)
    eps = model(x / 17**0.5, denoiser.sigma_to_t(sigma), text).sample
    assert relative(denoiser(x, sigma, encoder_hidden_states=text), x - 4 * eps) < 1e-6
