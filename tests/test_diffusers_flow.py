"""diffusers models trained by flow matching in k-diffusion samplers: the same images as diffusers' own pipelines."""

import k_diffusion as K
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    AuraFlowTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxControlPipeline,
    Lumina2Transformer2DModel,
    UniPCMultistepScheduler,
)

import ksag
import ksag.adapters.diffusers as adapter
from ksag.adapters.diffusers.transformers import KINDS, spatial
from tests.diffusers_pipelines import relative, scheduler, unet
from tests.flow_pipelines import (
    SIZE,
    FlowEuler,
    chroma,
    flow_sdxl,
    flux,
    flux_transformer,
    made,
    pack,
    qwen_image,
    schnell,
    stable_diffusion_3,
    unpack,
)
from tests.models import seeded

LATENTS = (2, 16, 8, 12)
STEPS = {"num_inference_steps": 4, "output_type": "latent"}


def sampled(denoiser, latents, cond, uncond=None, cond_scale=1.0, cfg_rule=ksag.cfg.plain):
    sigmas = denoiser.get_sigmas(4)
    with ksag.SAGDenoiser(denoiser, sag_scale=0.0, cond_key=None, cfg_rule=cfg_rule) as guided:
        args = {"cond": cond, "uncond": uncond, "cond_scale": cond_scale}
        return K.sampling.sample_euler(guided, latents * sigmas[0], sigmas, args, disable=True)


# A whole run of diffusers' own pipeline is sample_euler


@pytest.mark.parametrize("options", [
    {}, {"shift": 1.0}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True},
    {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"shift_terminal": 0.1},
])  # fmt: skip
def test_stable_diffusion_3(options):
    pipe, latents = made(stable_diffusion_3, **options), torch.randn(LATENTS)
    texts = {"prompt": ["a cat", "a dog"], "negative_prompt": ["bad", "bad"]}
    expected = pipe(**texts, **SIZE, **STEPS, latents=latents, guidance_scale=4.0).images
    cond, uncond = adapter.conditioning(pipe, ["a cat", "a dog"], "bad")
    denoiser = adapter.denoiser(pipe, size=(16, 24))
    assert relative(sampled(denoiser, latents, cond, uncond, 4.0), expected) < 1e-3


@pytest.mark.parametrize(("guidance_embeds", "options"), [(True, {}), (False, {"use_dynamic_shifting": False, "shift": 2.0})])
def test_flux(guidance_embeds, options):
    """Dev takes its guidance scale as an input, and schnell none."""
    pipe, latents = made(flux if guidance_embeds else schnell, **options), torch.randn(LATENTS)
    guidance = 5.0 if guidance_embeds else None
    args = {**SIZE, **STEPS, "latents": pack(latents), "num_images_per_prompt": 2, "guidance_scale": guidance}
    cond, uncond = adapter.conditioning(pipe, "a cat", n=2, guidance=guidance)
    denoiser = adapter.denoiser(pipe, size=(16, 24))
    assert uncond is None
    assert relative(sampled(denoiser, latents, cond), unpack(pipe("a cat", **args).images)) < 1e-3
    expected = unpack(pipe("a cat", negative_prompt="bad", true_cfg_scale=2.0, **args).images)
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", n=2, guidance=guidance)
    assert relative(sampled(denoiser, latents, cond, uncond, 2.0), expected) < 1e-3


def test_chroma():
    pipe, latents = made(chroma), torch.randn(LATENTS)
    args = {**SIZE, **STEPS, "latents": pack(latents), "guidance_scale": 4.0}
    expected = pipe(["a cat", "many a dog"], negative_prompt=["bad", "bad"], **args).images
    cond, uncond = adapter.conditioning(pipe, ["a cat", "many a dog"], "bad")
    denoiser = adapter.denoiser(pipe, size=(16, 24))
    assert relative(sampled(denoiser, latents, cond, uncond, 4.0), unpack(expected)) < 2e-3  # it varies more with t


def rescaled_by_token(u, g, cond_scale, x, sigma):
    """The rule of Qwen-Image's pipeline: the guided velocity of every token as long as the conditional one."""
    origin = x / (1 + sigma.view(-1, 1, 1, 1))
    plain, v_cond = origin - (u + (g - u) * cond_scale), origin - g
    length = [pack(v).norm(dim=-1, keepdim=True) for v in (v_cond, plain)]
    return origin - unpack(pack(plain) * length[0] / length[1])


def test_qwen_image():
    pipe, latents = made(qwen_image), torch.randn(LATENTS)
    args = {**SIZE, **STEPS, "latents": pack(latents)}
    prompts = ["a cat", "many a dog"]
    denoiser = adapter.denoiser(pipe, size=(16, 24))
    cond, uncond = adapter.conditioning(pipe, prompts, "bad")
    assert cond["encoder_hidden_states_mask"].sum(1).diff().item() == 5
    assert relative(sampled(denoiser, latents, cond), unpack(pipe(prompts, **args).images)) < 1e-3
    expected = pipe(prompts, negative_prompt=["bad", "bad"], true_cfg_scale=3.0, **args).images
    result = sampled(denoiser, latents, cond, uncond, 3.0, cfg_rule=rescaled_by_token)
    assert relative(result, unpack(expected)) < 1e-3


def test_a_unet():
    pipe, latents = made(flow_sdxl), torch.randn(2, 4, 8, 12)
    pipe.scheduler = FlowEuler.from_config(pipe.scheduler.config)
    args = {**SIZE, **STEPS, "latents": latents, "num_images_per_prompt": 2, "guidance_scale": 4.0}
    expected = pipe("a cat", negative_prompt="bad", **args).images
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", n=2, size=(16, 24))
    denoiser = adapter.denoiser(pipe)
    assert isinstance(denoiser, ksag.FlowDenoiser) and denoiser.shift == 2.5
    assert relative(sampled(denoiser, latents, cond, uncond, 4.0), expected) < 1e-3
    guided = ksag.SAGDenoiser(denoiser, sag_scale=1.0, cond_key=None)
    x, sigma = latents * 3, torch.full((2,), 3.0)
    assert relative(guided(x, sigma, cond=cond), denoiser(x, sigma, **cond)) > 1e-3


# Transformers without a pipeline here


@pytest.mark.parametrize("kind", ["aura", "lumina"])
def test_other_transformers(kind):
    """One step against the calls in their pipelines."""
    if kind == "aura":
        model = seeded(lambda: AuraFlowTransformer2DModel(
            sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64,
        ))  # fmt: skip
        text = {"encoder_hidden_states": torch.randn(2, 7, 32)}
    else:
        model = seeded(lambda: Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
            num_kv_heads=1, multiple_of=2, scaling_factor=1.0, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=32,
        ))  # fmt: skip
        text = {"encoder_hidden_states": torch.randn(2, 7, 32), "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool)}
    x_t, t = torch.randn(2, 4, 8, 12), torch.tensor([0.3, 0.8])
    timestep = t if kind == "aura" else 1 - t
    velocity = model(x_t, timestep=timestep, **text).sample * (1 if kind == "aura" else -1)
    denoiser = adapter.denoiser(model, FlowMatchEulerDiscreteScheduler(shift=6.0))
    expected = x_t - t.view(2, 1, 1, 1) * velocity
    result = denoiser(x_t / (1 - t.view(2, 1, 1, 1)), t / (1 - t), **text)
    assert relative(result, expected) < 1e-5


def test_concat_is_a_control_models_picture():
    """A transformer with twice the channels, as FluxControlPipeline calls it."""
    model = flux_transformer(in_channels=128, out_channels=64)
    latents, control = torch.randn(1, 16, 8, 12), torch.randn(1, 16, 8, 12)
    text = {"encoder_hidden_states": torch.randn(1, 5, 32), "pooled_projections": torch.randn(1, 32)}
    ids = FluxControlPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    tokens = torch.cat([pack(latents), pack(control)], dim=2)
    v = model(tokens, timestep=torch.tensor([0.5]), img_ids=ids, txt_ids=torch.zeros(5, 3), **text).sample
    denoiser = adapter.denoiser(model, FlowMatchEulerDiscreteScheduler())
    result = denoiser(latents * 2, torch.ones(1), **text, concat=control)
    assert relative(result, latents - 0.5 * unpack(v)) < 1e-5


def test_every_kind_is_a_class_of_diffusers():
    import diffusers

    assert all(hasattr(diffusers, name) for name in KINDS)


# The noise levels


def test_flow_sigmas_of_other_schedulers():
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 4.0}
    denoiser = adapter.denoiser(unet(), UniPCMultistepScheduler(**config))
    plain = ksag.FlowDenoiser(unet(), 4.0)
    assert denoiser.shift == 4.0 and torch.equal(denoiser.get_sigmas(5), plain.get_sigmas(5))
    assert adapter.denoiser(unet(), FlowMatchHeunDiscreteScheduler(shift=2.0)).shift == 2.0
    assert adapter.denoiser(unet(), FlowMatchHeunDiscreteScheduler(shift=2.0), shift=5.0).shift == 5.0


@pytest.mark.parametrize("options", [{"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}])
def test_a_shift_of_ones_own(options):
    """The same levels as with a scheduler that has it."""
    model = flux_transformer()
    denoiser = adapter.denoiser(model, FlowMatchEulerDiscreteScheduler(**options), shift=4.0)
    static = adapter.denoiser(model, FlowMatchEulerDiscreteScheduler(shift=4.0))
    torch.testing.assert_close(denoiser.get_sigmas(5), static.get_sigmas(5), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r"depends on the size of the picture: give denoiser the pipeline and size="):
        adapter.denoiser(model, FlowMatchEulerDiscreteScheduler(**options))


def test_the_pipelines_scheduler_stays_as_it_is():
    pipe = made(flux)
    before = pipe.scheduler.sigmas.clone()
    denoiser = adapter.denoiser(pipe, size=(16, 24))
    denoiser.get_sigmas(5)
    assert torch.equal(pipe.scheduler.sigmas, before)
    assert adapter.denoiser(pipe, size=(1024, 1024)).shift > denoiser.shift
    assert adapter.denoiser(pipe).shift == adapter.denoiser(pipe, size=(256, 256)).shift  # 128 × 128, of the tiny VAE


# As it is run


TEXT = {"encoder_hidden_states": torch.randn(2, 5, 32), "pooled_projections": torch.randn(2, 32)}


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_under_float32_latents(dtype, error):
    x, sigma = torch.randn(LATENTS) * 5000, torch.tensor([5000.0, 50.0])
    half, full = (
        adapter.denoiser(flux_transformer().to(kind), FlowMatchEulerDiscreteScheduler()) for kind in (dtype, torch.float32)
    )
    result = half(x, sigma, **{name: text.to(dtype) for name, text in TEXT.items()})
    assert result.dtype == torch.float32 and relative(result, full(x, sigma, **TEXT)) < error


def test_offload_moves_the_noise_levels_to_where_it_computes():
    """The device "meta" represents the GPU."""
    model = flux_transformer()
    cpu_offload_with_hook(model, "meta")
    assert adapter.denoiser(model, FlowMatchEulerDiscreteScheduler()).get_sigmas(3).device.type == "meta"


@pytest.mark.slow
def test_it_compiles_whole():
    denoiser = adapter.denoiser(flux_transformer(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    x, sigma = torch.randn(LATENTS) * 3, torch.tensor([3.0, 2.0])
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, sigma, **TEXT), denoiser(x, sigma, **TEXT))


# Input that does not fit


def test_a_shift_of_other_noise_levels():
    with pytest.raises(ValueError, match=r"shift= \(--shift\) is for flow matching, and DDIMScheduler has other noise levels"):
        adapter.denoiser(unet(), scheduler(), shift=2.0)


def test_quantize_and_another_prediction():
    with pytest.raises(ValueError, match=r"quantize=True .* a model for FlowMatchEulerDiscreteScheduler has none"):
        adapter.denoiser(unet(), FlowMatchEulerDiscreteScheduler(), quantize=True)
    with pytest.raises(ValueError, match=r"has flow sigmas, but prediction_type='epsilon': expected flow_prediction"):
        adapter.denoiser(unet(), UniPCMultistepScheduler(use_flow_sigmas=True))


def test_a_transformer_that_is_not_supported():
    with pytest.raises(
        ValueError, match=r"does not support diffusers' Linear; it supports SD3Transformer2DModel, .*FlowDenoiser\(module\)"
    ):
        adapter.denoiser(torch.nn.Linear(1, 1), FlowMatchEulerDiscreteScheduler())


def test_an_odd_latent_cannot_be_packed():
    model = spatial(flux_transformer())
    with pytest.raises(ValueError, match=r"patches of 2 × 2, so h and w must be even, got \(8, 7\)"):
        model(torch.randn(1, 16, 8, 7), torch.ones(1), encoder_hidden_states=torch.randn(1, 5, 32))


def test_a_guidance_scale_that_is_missing():
    denoiser = adapter.denoiser(flux_transformer(guidance_embeds=True), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(
        TypeError, match=r"takes its guidance scale as an input, which is missing: conditioning\(pipe, prompt, guid"
    ):
        denoiser(torch.randn(LATENTS), torch.ones(2), **TEXT)


# SAG


@pytest.mark.parametrize("make", [stable_diffusion_3, flux, chroma, qwen_image])
def test_sag_changes_the_image(make):
    pipe = made(make)
    denoiser = adapter.denoiser(pipe, size=(16, 24))
    cond, _ = adapter.conditioning(pipe, "a cat", n=2)
    x, sigma = torch.randn(LATENTS) * 3, torch.full((2,), 2.0)
    with ksag.SAGDenoiser(denoiser, sag_scale=1.0, blur_kernel_size=7, cond_key=None) as guided, guided.trace() as steps:
        result = guided(x, sigma, cond=cond)
    assert steps[0].saliency.shape == (2, 4, 6)
    assert result.isfinite().all() and relative(result, denoiser(x, sigma, **cond)) > 1e-3
