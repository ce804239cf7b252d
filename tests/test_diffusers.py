"""diffusers models in k-diffusion samplers, on tiny random pipelines of diffusers' own classes."""

import re
from pathlib import Path

import k_diffusion as K
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    ControlNetUnionModel,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import StableDiffusionSAGPipeline
from PIL import Image

import ksag
import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import (
    controlnet,
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
    assert isinstance(denoiser, K.external.DiscreteSchedule)
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
        (
            FlowMatchEulerDiscreteScheduler(),
            ValueError,
            r"FlowMatchEulerDiscreteScheduler is for flow matching, .* does not support it",
        ),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            ValueError,
            r"DPMSolverMultistepScheduler is for flow matching",
        ),
        (
            DDIMScheduler(rescale_betas_zero_snr=True),
            ValueError,
            r"a prediction of the noise says nothing .*rescale_betas_zero_snr",
        ),
        (DDPMScheduler(prediction_type="flow"), ValueError, r"prediction_type='flow'; ksag knows epsilon, v_prediction, sample"),
        (EDMDPMSolverMultistepScheduler(prediction_type="sample"), ValueError, r"'sample'; ksag knows epsilon, v_prediction"),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            ValueError,
            r"timestep_type='continuous'; for such a model give an EDMEulerScheduler",
        ),
        (KarrasVeScheduler(), ValueError, r"KarrasVeScheduler has no alphas_cumprod"),
    ],
)
def test_a_schedule_that_k_diffusion_cannot_represent(schedule, error, message):
    with pytest.raises(error, match=message):
        adapter.denoiser(unet(), schedule)


# A zero terminal SNR


def zero_snr(cls=DDIMScheduler, prediction_type="v_prediction"):
    return cls(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        rescale_betas_zero_snr=True,
    )  # fmt: skip


def test_the_last_sigma_of_a_zero_terminal_snr_is_comfyuis():
    """The betas rescaled as Lin et al. (arXiv:2305.08891) do it in algorithm 1, and ComfyUI's 4.8973451890853435e-08 at the end."""
    denoiser = adapter.denoiser(unet(), zero_snr())
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas = root**2
    alphas[-1] = 4.8973451890853435e-08
    expected = ((1 - alphas) / alphas).sqrt()
    assert denoiser.sigmas.isfinite().all() and denoiser.sigmas.diff().min() > 0
    # 1 - alpha is 0.00085 at the first timestep: float32 keeps four of its digits
    torch.testing.assert_close(denoiser.sigmas.double(), expected, rtol=2e-3, atol=0)
    assert denoiser.sigma_max.item() == pytest.approx(4518.765, abs=0.01)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sampling_from_a_zero_terminal_snr(prediction_type, dtype):
    """At the end, x is noise alone, and denoised is minus the v that the UNet predicts of it."""
    model = unet().to(dtype)
    denoiser = adapter.denoiser(model, zero_snr(prediction_type=prediction_type))
    sigmas, noise = denoiser.get_sigmas(4).to(dtype), torch.randn(1, 4, 8, 8, dtype=dtype)
    x, text = noise * sigmas[0], torch.randn(1, 7, 32, dtype=dtype)
    denoised = denoiser(x, sigmas[:1], encoder_hidden_states=text)
    sign = 1 if prediction_type == "sample" else -1
    expected = sign * model(noise, torch.tensor([999.0]), text).sample
    assert denoised.dtype == dtype and relative(denoised.float(), expected.float()) < (2e-2 if dtype == torch.float16 else 1e-3)
    guided = ksag.SAGDenoiser(denoiser, cond_key=None)
    result = K.sampling.sample_euler(guided, x, sigmas, {"cond": {"encoder_hidden_states": text}}, disable=True)
    assert result.dtype == dtype and result.isfinite().all() and 0.01 < result.float().std() < 100


def test_a_large_sigma_in_half_precision_is_as_in_single():
    """The square of sigma is infinite in float16 from 256 on."""
    model = unet()
    denoiser = adapter.denoiser(model, zero_snr())
    text = {"encoder_hidden_states": torch.randn(2, 7, 32)}
    x, sigma = torch.randn(2, 4, 8, 8) * 1024, torch.tensor([1024.0, 512.0])
    assert relative(denoiser(x.half(), sigma.half(), **text).float(), denoiser(x, sigma, **text)) < 2e-3


def test_euler_keeps_its_own_end_of_a_zero_terminal_snr():
    denoiser = adapter.denoiser(unet(), zero_snr(EulerDiscreteScheduler))
    assert denoiser.sigma_max.item() == pytest.approx(4096, abs=0.01)


# EDM


EDM = {
    "Playground v2.5": EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
    "its Euler": EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
    "CosXL": EDMEulerScheduler(
        sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDM)
def test_edm_preconditioning(name):
    """Against Karras et al., arXiv:2206.00364, table 1, in float64, and against the scheduler's own functions."""
    schedule, model = EDM[name], unet()
    denoiser = adapter.denoiser(model, schedule)
    x, text = torch.randn(3, 4, 8, 8) * 3, torch.randn(3, 7, 32)
    sigma = torch.tensor([0.01, 1.0, 70.0])
    result = denoiser(x, sigma, encoder_hidden_states=text)

    data, s = schedule.config.sigma_data, sigma.double()[:, None, None, None]
    sign = -1 if name == "CosXL" else 1
    c_in, c_noise = 1 / (s**2 + data**2).sqrt(), sigma.double().log() / 4
    prediction = model((x * c_in).float(), c_noise.float(), text).sample.double()
    expected = data**2 / (s**2 + data**2) * x + sign * s * data / (s**2 + data**2).sqrt() * prediction
    assert relative(result.double(), expected) < 1e-5

    for i in range(3):
        scaled = schedule.precondition_inputs(x[i : i + 1], sigma[i])
        output = model(scaled, schedule.precondition_noise(sigma[i]), text[i : i + 1]).sample
        torch.testing.assert_close(
            result[i : i + 1], schedule.precondition_outputs(x[i : i + 1], output, sigma[i]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", EDM)
def test_edm_schedule_is_the_schedulers(name):
    schedule = EDM[name]
    denoiser = adapter.denoiser(unet(), schedule)
    schedule.set_timesteps(20)
    torch.testing.assert_close(denoiser.get_sigmas(20), schedule.sigmas, rtol=1e-4, atol=0)
    assert denoiser.sigma_min.item() == pytest.approx(schedule.config.sigma_min, rel=1e-4)
    assert denoiser.sigma_max.item() == pytest.approx(schedule.config.sigma_max, rel=1e-4)
    assert denoiser.sigma_data == schedule.config.sigma_data
    assert len(denoiser.get_sigmas()) == 1001 and denoiser.get_sigmas()[-1] == 0
    sigma = torch.tensor([0.01, 3.0])
    torch.testing.assert_close(denoiser.t_to_sigma(denoiser.sigma_to_t(sigma)), sigma)
    with pytest.raises(ValueError, match=r"has none: leave it out"):
        adapter.denoiser(unet(), schedule, quantize=True)


@pytest.mark.parametrize("name", ["its Euler", "CosXL"])
def test_edm_is_diffusers_own_without_sag(tmp_path, name):
    """The pipeline with EDMEulerScheduler is sample_euler, from its own first latents."""
    pipe = stable_diffusion_xl(tmp_path)
    pipe.scheduler = EDM[name]
    latents = torch.randn(1, 4, 8, 8)
    expected = pipe(
        "a cat", negative_prompt="bad", latents=latents, num_inference_steps=6, guidance_scale=4.0, output_type="latent",
        height=16, width=16,
    ).images  # fmt: skip
    denoiser = adapter.denoiser(pipe)
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", size=(16, 16))
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    guided = ksag.SAGDenoiser(denoiser, cond_key=None)
    x = latents * pipe.scheduler.init_noise_sigma
    plain = K.sampling.sample_euler(guided, x, denoiser.get_sigmas(6), {**args, "sag_scale": 0.0}, disable=True)
    assert relative(plain, expected) < 1e-4
    with_sag = K.sampling.sample_euler(guided, x, denoiser.get_sigmas(6), args, disable=True)
    assert with_sag.isfinite().all() and relative(with_sag, plain) > 1e-3


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


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_a_controlnet_takes_part(tmp_path, scale):
    pipe = stable_diffusion_with_controlnet(tmp_path)
    latents, picture = torch.randn(2, 4, 8, 8), torch.rand(1, 3, 16, 16)
    args = {**PROMPT, "num_images_per_prompt": 2, "latents": latents, "controlnet_conditioning_scale": scale}
    expected = pipe(**args, image=picture).images
    assert relative(pipe(**args, image=1 - picture).images, expected) > 3e-4
    denoiser = adapter.denoiser(pipe, quantize=True)
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", n=2, control=picture, control_scale=scale)
    check(pipe, denoiser, latents, cond, uncond, expected)


def test_a_controlnet_looks_at_a_pil_picture_of_another_size(tmp_path):
    pipe = stable_diffusion_with_controlnet(tmp_path)
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    latents = torch.randn(1, 4, 8, 12)
    expected = pipe(**PROMPT, latents=latents, image=picture, height=16, width=24).images
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", control=picture, size=(16, 24))
    check(pipe, adapter.denoiser(pipe, quantize=True), latents, cond, uncond, expected)


def test_several_controlnets(tmp_path):
    one, two = controlnet(), controlnet()
    for parameter in two.parameters():
        parameter.mul_(1.1)
    pipe = stable_diffusion(tmp_path, cls=StableDiffusionControlNetPipeline, controlnet=MultiControlNetModel([one, two]))
    latents, pictures = torch.randn(2, 4, 8, 8), [torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)]
    args = {**PROMPT, "num_images_per_prompt": 2, "latents": latents, "image": pictures}
    expected = pipe(**args, controlnet_conditioning_scale=[0.5, 1.5]).images
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", n=2, control=pictures, control_scale=[0.5, 1.5])
    check(pipe, adapter.denoiser(pipe, quantize=True), latents, cond, uncond, expected)
    with pytest.raises(ValueError, match=r"This pipeline has 2 ControlNets: give control a list, a picture for each"):
        adapter.conditioning(pipe, "a cat", control=pictures[0])


def test_a_controlnet_of_sdxl(tmp_path):
    pipe = stable_diffusion_xl(tmp_path)
    pipe = StableDiffusionXLControlNetPipeline.from_pipe(pipe, controlnet=controlnet(pipe.unet))
    pipe.set_progress_bar_config(disable=True)
    latents, picture = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 16, 16)
    expected = pipe(**PROMPT, latents=latents, image=picture, height=16, width=16).images
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", control=picture, size=(16, 16))
    check(pipe, adapter.denoiser(pipe, quantize=True), latents, cond, uncond, expected)


def test_another_kind_of_controlnet(tmp_path):
    pipe = stable_diffusion_xl(tmp_path)
    pipe.controlnet = ControlNetUnionModel.from_unet(pipe.unet)
    with pytest.raises(ValueError, match=r"has a ControlNetUnionModel, which ksag does not support"):
        adapter.denoiser(pipe)


def test_a_controlnet_without_its_picture(tmp_path):
    pipe = stable_diffusion_with_controlnet(tmp_path)
    cond, _ = adapter.conditioning(pipe, "a cat")
    with pytest.raises(
        TypeError, match=r"has a ControlNet, whose picture is missing: conditioning\(pipe, prompt, control=picture\)"
    ):
        adapter.denoiser(pipe)(torch.randn(1, 4, 8, 8), torch.ones(1), **cond)


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
    """Another one in its place."""
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
    exec(compile(edit(code), f"{DOCUMENT.name}: {heading}", "exec"), names)
    return names


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_the_whole_script(tmp_path, monkeypatch, make):
    """As it stands, but for the weights, which are not here, and the size."""
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    changes = {'"stable-diffusion-v1-5/stable-diffusion-v1-5"': "'pipe'", "512, 512": "16, 24"}

    def edit(code):
        for old, new in changes.items():
            assert code.count(old) == 1
            code = code.replace(old, new)
        return code

    run_example("", edit)
    picture = np.asarray(Image.open("cat.png"))
    assert picture.shape == (16, 24, 3) and picture.std() > 1
    run_example("", edit)
    assert np.array_equal(np.asarray(Image.open("cat.png")), picture)


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
    """The picture's embeddings in its place, as the tiny pipeline has no image encoder, and its adapter is loaded already."""
    pipe, embeds = stable_diffusion_with_ip_adapter(tmp_path), torch.randn(1, 1, 16)
    prepare = pipe.prepare_ip_adapter_image_embeds
    pipe.prepare_ip_adapter_image_embeds = lambda picture, _, *rest: prepare(
        None, [torch.cat([torch.zeros_like(picture), picture])], *rest
    )
    pipe.load_ip_adapter = lambda *args, **kwargs: None
    edit = replaced('Image.open("photo.jpg")', "embeds")
    one, other = (around_example("IP-Adapter", pipe, edit, embeds=e) for e in (embeds, -embeds))
    assert one.isfinite().all() and relative(one, other) > 1e-3
