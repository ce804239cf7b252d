"""diffusers models in k-diffusion samplers, on tiny random pipelines of diffusers' own classes."""

import re
from pathlib import Path

import k_diffusion as K
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import StableDiffusionSAGPipeline

import ksag
import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import (
    scheduler,
    sdxl_unet,
    stable_diffusion,
    stable_diffusion_inpainting,
    stable_diffusion_xl,
    text_encoder,
    tokenizer,
    unet,
    vae,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "diffusers.md"


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# The denoiser


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_one_step_is_diffusers_own_prediction_of_the_original(prediction_type):
    model, schedule = unet(), scheduler(prediction_type=prediction_type)
    denoiser = adapter.denoiser(model, schedule)
    t = 601
    sigma = denoiser.sigmas[t].expand(2)
    torch.testing.assert_close(denoiser.sigma_to_t(sigma), torch.full((2,), float(t)), rtol=1e-5, atol=0)
    sample, text = torch.randn(2, 4, 8, 12), torch.randn(2, 7, 32)
    schedule.set_timesteps(1000)
    expected = schedule.step(model(sample, t, text).sample, t, sample).pred_original_sample
    x = sample / schedule.alphas_cumprod[t].sqrt()
    assert relative(denoiser(x, sigma, encoder_hidden_states=text), expected) < 1e-5


def test_schedule_is_k_diffusions_own():
    schedule = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    denoiser = adapter.denoiser(unet(), schedule)
    assert isinstance(denoiser, K.external.DiscreteEpsDDPMDenoiser)
    assert denoiser.sigma_max == denoiser.sigmas[-1] and denoiser.sigma_min == denoiser.sigmas[0]
    schedule.set_timesteps(1000)
    torch.testing.assert_close(denoiser.get_sigmas(1000), schedule.sigmas, rtol=1e-4, atol=0)
    assert adapter.denoiser(unet(), schedule, quantize=True).sigma_to_t(denoiser.sigmas[[10]]).dtype == torch.int64


def test_half_precision_unet_under_float32_latents():
    model = unet().to(torch.bfloat16)
    denoiser = adapter.denoiser(model, scheduler())
    x, sigma, text = torch.randn(2, 4, 8, 8) * 4, torch.full((2,), 4.0), torch.randn(2, 7, 32, dtype=torch.bfloat16)
    result = ksag.SAGDenoiser(denoiser, cond_key=None)(x, sigma, cond={"encoder_hidden_states": text})
    assert result.dtype == torch.float32 and result.isfinite().all()
    full = ksag.SAGDenoiser(adapter.denoiser(unet(), scheduler()), cond_key=None)
    assert relative(result, full(x, sigma, cond={"encoder_hidden_states": text.float()})) < 0.05


def test_a_learned_variance_is_left_out():
    denoiser = adapter.denoiser(unet(out_channels=8), scheduler())
    args = torch.randn(1, 4, 8, 8), torch.ones(1)
    assert denoiser(*args, encoder_hidden_states=torch.randn(1, 7, 32)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (None, TypeError, r"A UNet2DConditionModel alone has no noise levels"),
        (FlowMatchEulerDiscreteScheduler(), ValueError, r"FlowMatchEulerDiscreteScheduler has no alphas_cumprod"),
        (DDIMScheduler(rescale_betas_zero_snr=True), ValueError, r"zero or infinite.*rescale_betas_zero_snr=False"),
        (DDPMScheduler(prediction_type="flow"), ValueError, r"prediction_type='flow'; ksag knows epsilon, v_prediction, sample"),
    ],
)
def test_a_schedule_that_k_diffusion_cannot_represent(schedule, error, message):
    with pytest.raises(error, match=message):
        adapter.denoiser(unet(), schedule)


# The same image as diffusers' own pipelines


def at_timesteps_of(schedule, denoiser, latents, steps):
    """k-diffusion's x and sigmas for DDIM latents and timesteps: x = latents / sqrt(alphas_cumprod)."""
    schedule.set_timesteps(steps)
    sigmas = torch.cat([denoiser.sigmas[schedule.timesteps], denoiser.sigmas[:1]])  # set_alpha_to_one=False ends at timestep 0
    return latents * (1 + sigmas[0] ** 2).sqrt(), sigmas


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


def test_sdxl_is_diffusers_own_without_sag(tmp_path):
    pipe = stable_diffusion_xl(tmp_path)
    latents = torch.randn(2, 4, 8, 12)
    expected = pipe(
        "a cat", negative_prompt="bad", num_images_per_prompt=2, latents=latents, num_inference_steps=6, guidance_scale=4.0,
        output_type="latent", height=16, width=24,
    ).images  # fmt: skip
    denoiser = adapter.denoiser(pipe, quantize=True)
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", n=2, size=(16, 24))
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


# The examples of docs/diffusers.md, run as they stand


def run_example(heading, **names):
    section = DOCUMENT.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    exec(compile(code, f"{DOCUMENT.name}: {heading}", "exec"), names)
    return names


def test_text_to_image_example(tmp_path):
    names = run_example("Text to image", pipe=stable_diffusion(tmp_path))
    assert names["images"].shape == (1, 3, 16, 16) and names["images"].isfinite().all()
    again = run_example("Text to image", pipe=names["pipe"])
    assert torch.equal(again["images"], names["images"])


def test_image_to_image_example(tmp_path):
    pipe = stable_diffusion(tmp_path)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    near = run_example("Image to image", pipe=pipe, image=image, strength=0.1)["latent"]
    far = run_example("Image to image", pipe=pipe, image=image, strength=0.9)["latent"]
    start = adapter.encode(pipe, image)
    assert relative(near, start) < relative(far, start)


@pytest.mark.parametrize("heading", ["Inpainting with an inpainting model", "Inpainting with any model"])
def test_inpainting_examples(tmp_path, heading):
    pipe = stable_diffusion_inpainting(tmp_path) if "inpainting model" in heading else stable_diffusion(tmp_path)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    latent = run_example(heading, pipe=pipe, image=image, mask=mask)["latent"]
    assert latent.shape == (1, 4, 8, 8) and latent.isfinite().all()
    if heading == "Inpainting with any model":
        kept = adapter.encode(pipe, image)
        torch.testing.assert_close(latent[..., :4], kept[..., :4])
        assert not torch.allclose(latent[..., 4:], kept[..., 4:])
