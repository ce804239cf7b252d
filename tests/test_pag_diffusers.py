"""Whole runs of Euler with PAG, against diffusers' own pipelines, on their real classes with tiny random weights."""

import re

import k_diffusion as K
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPAGPipeline, StableDiffusionXLPAGPipeline

import ksag
import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import relative, sdxl_unet, text_encoder, tokenizer, unet, vae

PAG_SCALE, STEPS = 2.0, 6
LAYERS = {"the middle": ["mid"], "all layers of two blocks": ["mid", "down_blocks.0"]}


def euler():
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


def stable_diffusion(folder):
    text, negative = torch.randn(2, 2, 16, 32)
    pipe = StableDiffusionPAGPipeline(
        vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(folder / "words"), unet=unet(), scheduler=euler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    given = {"prompt_embeds": text, "negative_prompt_embeds": negative}
    cond, uncond = ({"encoder_hidden_states": embedded} for embedded in (text, negative))
    return pipe, given, unet(), cond, uncond


def stable_diffusion_xl(folder):
    text, negative = torch.randn(2, 2, 16, 80)
    pooled, negative_pooled = torch.randn(2, 2, 32)
    pipe = StableDiffusionXLPAGPipeline(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=sdxl_unet(), scheduler=euler(),
        add_watermarker=False,
    )  # fmt: skip
    given = {"prompt_embeds": text, "negative_prompt_embeds": negative}
    given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
    time_ids = torch.tensor([[24.0, 40.0, 0.0, 0.0, 24.0, 40.0]]).expand(2, -1)
    cond, uncond = (
        {"encoder_hidden_states": embedded, "added_cond_kwargs": {"text_embeds": pool, "time_ids": time_ids}}
        for embedded, pool in ((text, pooled), (negative, negative_pooled))
    )
    return pipe, given, sdxl_unet(), cond, uncond


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_a_run_is_that_of_diffusers_pipeline(tmp_path, make, layers, guidance_scale):
    pipe, given, model, cond, uncond = make(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.set_pag_applied_layers(LAYERS[layers])
    latents = torch.randn(2, 4, 12, 20)
    expected = pipe(
        **given, latents=latents.clone(), height=24, width=40, num_inference_steps=STEPS, guidance_scale=guidance_scale,
        pag_scale=PAG_SCALE, output_type="latent",
    ).images  # fmt: skip

    denoiser = adapter.denoiser(model, euler(), quantize=True)
    paths = [layer.path for layer in ksag.list_attention(denoiser)]
    chosen = [path for path in paths if any(re.search(name, path) for name in LAYERS[layers])]
    assert len(chosen) >= len(LAYERS[layers]) and len(chosen) < len(paths)
    args = {"cond": cond} | ({"uncond": uncond, "cond_scale": guidance_scale} if guidance_scale > 1 else {})
    x = latents * pipe.scheduler.init_noise_sigma
    with ksag.GuidedDenoiser(denoiser, ksag.PAG(PAG_SCALE, chosen), cond_key=None) as guided:
        result, plain = (
            K.sampling.sample_euler(guided, x, pipe.scheduler.sigmas, extra_args=args | more, disable=True)
            for more in ({}, {"pag_scale": 0.0})
        )
    assert relative(result, expected) < 1e-4
    assert relative(plain, expected) > 1e-3
