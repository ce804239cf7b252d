"""diffusers models as denoisers: predictions, noise levels, preconditioning; on tiny random models of diffusers' own classes."""

import k_diffusion as K
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    KarrasVeScheduler,
)

import ksag
import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import (
    relative,
    scheduler,
    stable_diffusion_xl,
    unet,
)

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
