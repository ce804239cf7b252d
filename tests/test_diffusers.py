"""diffusers models in k-diffusion samplers, on tiny random pipelines of diffusers' own classes."""

import inspect
import re
from pathlib import Path

import k_diffusion as K
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import StableDiffusionSAGPipeline

import ksag
import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import (
    scheduler,
    sdxl_unet,
    stable_diffusion,
    stable_diffusion_inpainting,
    stable_diffusion_with_controlnet,
    stable_diffusion_with_ip_adapter,
    stable_diffusion_with_t2i_adapter,
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
    """As `enable_model_cpu_offload` moves it; "meta" stands for the GPU."""
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


# What a pipeline adds to its UNet


def as_ddim(pipe, denoiser, latents, extra_args, **settings):
    """Latents of six steps at diffusers' timesteps, for comparison with a pipeline's."""
    x, sigmas = at_timesteps_of(pipe.scheduler, denoiser, latents, 6)
    guided = ksag.SAGDenoiser(denoiser, cond_key=None, **settings)
    return K.sampling.sample_euler(guided, x, sigmas, extra_args, disable=True) / (1 + sigmas[-1] ** 2).sqrt()


PROMPT = {"prompt": "a cat", "negative_prompt": "bad", "num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "latent"}


def check(pipe, denoiser, latents, cond, uncond, expected):
    """Without SAG the pipeline's own latents, and with it others."""
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    assert relative(as_ddim(pipe, denoiser, latents, args, sag_scale=0.0), expected) < 1e-5
    with_sag = as_ddim(pipe, denoiser, latents, args)
    assert with_sag.isfinite().all() and relative(with_sag, expected) > 1e-3


def test_a_controlnet_is_not_left_out(tmp_path):
    pipe = stable_diffusion_with_controlnet(tmp_path)
    with pytest.raises(
        ValueError, match=r"StableDiffusionControlNetPipeline has a ControlNet.*Controlled\(pipe.unet, pipe.controlnet\)"
    ):
        adapter.denoiser(pipe)
    latents, picture = torch.randn(2, 4, 8, 8), torch.rand(1, 3, 16, 16)
    expected = pipe(**PROMPT, num_images_per_prompt=2, latents=latents, image=picture).images
    assert relative(pipe(**PROMPT, num_images_per_prompt=2, latents=latents, image=1 - picture).images, expected) > 1e-3

    example = inspect.getdoc(adapter.denoiser).split("controlnet_cond`:\n")[1].split("Args:")[0]
    names = {"torch": torch, "pipe": pipe, "denoiser": lambda *args: adapter.denoiser(*args, quantize=True)}
    *_, last = lines = inspect.cleandoc(example).splitlines()
    exec("\n".join(lines[:-1]), names)
    denoiser = eval(last, names)
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", n=2)
    for side in cond, uncond:
        side["controlnet_cond"] = picture.expand(2, -1, -1, -1)
    check(pipe, denoiser, latents, cond, uncond, expected)


def test_a_t2i_adapter_is_not_left_out(tmp_path):
    pipe = stable_diffusion_with_t2i_adapter(tmp_path)
    with pytest.raises(
        ValueError, match=r"StableDiffusionAdapterPipeline has a T2I-Adapter.*denoiser\(pipe.unet, pipe.scheduler\)"
    ):
        adapter.denoiser(pipe)
    latents, picture = torch.randn(2, 4, 8, 8), torch.rand(1, 3, 16, 16)
    size = {"height": 16, "width": 16}
    expected = pipe(**PROMPT, **size, num_images_per_prompt=2, latents=latents, image=picture).images
    assert relative(pipe(**PROMPT, **size, num_images_per_prompt=2, latents=latents, image=1 - picture).images, expected) > 1e-3
    denoiser = adapter.denoiser(pipe.unet, pipe.scheduler, quantize=True)
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", n=2)
    residuals = pipe.adapter(picture.expand(2, -1, -1, -1))
    for side in cond, uncond:
        side["down_intrablock_additional_residuals"] = residuals
    check(pipe, denoiser, latents, cond, uncond, expected)


def test_the_callers_residuals_stay_in_their_list():
    denoiser = adapter.denoiser(unet(), scheduler())
    residuals = [torch.randn(1, 32, 8, 8), torch.randn(1, 64, 4, 4)]
    args = {"encoder_hidden_states": torch.randn(1, 7, 32), "down_intrablock_additional_residuals": residuals}
    x, sigma = torch.randn(1, 4, 8, 8), torch.ones(1)
    first, second = (denoiser(x, sigma, **args) for _ in range(2))
    assert len(residuals) == 2 and torch.equal(first, second)
    assert relative(denoiser(x, sigma, encoder_hidden_states=args["encoder_hidden_states"]), first) > 1e-3


def test_an_ip_adapter_is_not_left_out(tmp_path):
    pipe = stable_diffusion_with_ip_adapter(tmp_path)
    denoiser = adapter.denoiser(pipe, quantize=True)
    latents, picture = torch.randn(2, 4, 8, 8), torch.randn(1, 1, 16)
    args = {**PROMPT, "height": 16, "width": 16, "num_images_per_prompt": 2, "latents": latents}
    both = torch.cat([torch.zeros_like(picture), picture])
    expected = pipe(**args, ip_adapter_image_embeds=[both]).images
    assert relative(pipe(**args, ip_adapter_image_embeds=[-both]).images, expected) > 1e-3
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", n=2)
    with pytest.raises(TypeError, match=r"has an IP-Adapter, whose picture is missing.*added_cond_kwargs"):
        denoiser(latents, torch.ones(2), **cond)
    (rows,) = pipe.prepare_ip_adapter_image_embeds(None, [both], "cpu", 2, True)
    for side, embeds in zip((uncond, cond), rows.chunk(2), strict=True):
        side["added_cond_kwargs"] = {"image_embeds": [embeds]}
    check(pipe, denoiser, latents, cond, uncond, expected)


def test_a_guidance_scale_that_is_an_input_is_not_left_out(tmp_path):
    """As latent consistency models have it."""
    pipe = stable_diffusion(tmp_path, {"time_cond_proj_dim": 8})
    latents = torch.randn(2, 4, 8, 8)
    args = {**PROMPT, "height": 16, "width": 16, "num_images_per_prompt": 2, "latents": latents}
    expected = pipe(**args).images
    denoiser = adapter.denoiser(pipe, quantize=True)
    cond, _ = adapter.conditioning(pipe, "a cat", n=2)
    around = torch.nn.Module()
    around.unet = pipe.unet
    for without in denoiser, adapter.denoiser(around, pipe.scheduler):
        with pytest.raises(TypeError, match=r"takes its guidance scale as an input, .* a timestep_cond, \(b, 8\)"):
            without(latents, torch.ones(2), **cond)
    cond["timestep_cond"] = pipe.get_guidance_scale_embedding(torch.full((2,), 4.0 - 1), 8)
    assert relative(as_ddim(pipe, denoiser, latents, {"cond": cond}, sag_scale=0.0), expected) < 1e-5


def test_a_pipeline_without_a_unet():
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8)
    pipe = DiTPipeline(transformer, vae(), DDIMScheduler())
    with pytest.raises(TypeError, match=r"Expected a diffusers pipeline with a UNet .*; got a DiTPipeline"):
        adapter.denoiser(pipe)


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
