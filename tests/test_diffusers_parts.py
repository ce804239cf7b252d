"""What a pipeline adds to its UNet (ControlNet, T2I-Adapter, IP-Adapter, a guidance scale) takes part, or is an error."""

import k_diffusion as K
import pytest
import torch
from diffusers import (
    ControlNetUnionModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

import ksag
import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import (
    at_timesteps_of,
    controlnet,
    relative,
    scheduler,
    stable_diffusion,
    stable_diffusion_with_controlnet,
    stable_diffusion_with_ip_adapter,
    stable_diffusion_with_t2i_adapter,
    stable_diffusion_xl,
    unet,
    vae,
)


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


@pytest.mark.slow
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


def test_a_transformer_not_trained_by_flow_matching():
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8)
    pipe = DiTPipeline(transformer, vae(), DDIMScheduler())
    with pytest.raises(TypeError, match=r"A DiTPipeline has a transformer that was not trained by flow matching"):
        adapter.denoiser(pipe)
