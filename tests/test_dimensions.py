"""Latents of one and three spatial dimensions, in the real classes for sound and video, tiny and with random weights."""

import contextlib
import io
from collections.abc import Callable
from typing import NamedTuple

import k_diffusion as K
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, LTXVideoTransformer3DModel, MochiTransformer3DModel, WanTransformer3DModel
from einops import rearrange
from torch import nn

import ksag
from ksag import plot
from tests.attending import Image, step
from tests.models import seeded

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3}


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


class Denoiser(nn.Module):
    """Around a velocity model that `call` calls with x_t, t and the text."""

    def __init__(self, transformer, call):
        super().__init__()
        self.transformer, self.call = transformer, call

    def forward(self, x, t, cond):
        return self.call(self.transformer, x, t, cond)


def wan():
    options = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
    model = seeded(lambda: WanTransformer3DModel(**HEADS, **options))
    return Denoiser(model, lambda m, x, t, text: m(x, t * 1000, text, return_dict=False)[0])


def ltx():
    """Its pipeline packs the latent: a token for each of its pixels."""
    options = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "caption_channels": 16}
    model = seeded(lambda: LTXVideoTransformer3DModel(**HEADS, **options))

    def call(m, x, t, text):
        frames, h, w = x.shape[2:]
        tokens = rearrange(x, "b c t h w -> b (t h w) c")
        mask = torch.ones(text.shape[:2], dtype=x.dtype)
        output = m(tokens, text, t[:, None] * 1000, mask, num_frames=frames, height=h, width=w, return_dict=False)[0]
        return rearrange(output, "b (t h w) c -> b c t h w", t=frames, h=h)

    return Denoiser(model, call)


def hunyuan_video():
    options = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3,
        "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 16,
        "rope_axes_dim": (4, 6, 6),
    }  # fmt: skip
    model = seeded(lambda: HunyuanVideoTransformer3DModel(**options))

    def call(m, x, t, text):
        guidance, mask = torch.full((len(x),), 6000.0), torch.ones(text.shape[:2], dtype=torch.int64)
        return m(x, t * 1000, text, mask, text.mean(1), guidance, return_dict=False)[0]

    return Denoiser(model, call)


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    """Of the latent."""
    grid: tuple[int, ...]


VIDEO = {
    "Wan": Kind(wan, (3, 8, 12), (3, 4, 6)),
    "LTX": Kind(ltx, (3, 5, 6), (3, 5, 6)),
    "HunyuanVideo": Kind(hunyuan_video, (2, 8, 12), (2, 4, 6)),
}


def video(name, batch=2):
    x, text = torch.randn(batch, 4, *VIDEO[name].size), torch.randn(batch, 5, 16)
    return ksag.FlowDenoiser(VIDEO[name].make()), x * 3, torch.full((batch,), 3.0), {"cond": text, "uncond": text.flip(1) * 0.3}


@pytest.mark.parametrize("blur_time", [False, True])
@pytest.mark.parametrize("name", VIDEO)
def test_a_whole_step_of_a_video(name, blur_time):
    """SAG, PAG and SEG together, against their formulas; and what a trace keeps of them."""
    kind, (model, x, sigma, args) = VIDEO[name], video(name)
    model, x, sigma, args = model.double(), x.double(), sigma.double(), {name: text.double() for name, text in args.items()}
    directions = [ksag.SAG(0.7, 1.5, blur_kernel_size=3, blur_time=blur_time), ksag.PAG(1.3), ksag.SEG(0.9)]
    with ksag.GuidedDenoiser(model, directions) as guided, guided.trace() as steps:
        result = guided(x, sigma, **args, cond_scale=3.0)
        (layer,) = (layer for layer in ksag.list_attention(model) if layer.grid)
    assert layer.grid == kind.grid and layer.checked
    blur_sigma = 1.5 if blur_time else (0, 1.5, 1.5)
    u, g, parts, saliency, mask = step(
        lambda x, text: model(x, sigma, cond=text), model.get_submodule(layer.path), Image(0, kind.grid), x,
        *args.values(), blur_sigma, 3,
    )  # fmt: skip
    expected = u + (g - u) * 3 + sum(scale * part for scale, part in zip((0.7, 1.3, 0.9), parts, strict=True))
    assert relative(result, expected) < 1e-12
    for kept, part in zip(steps, parts, strict=True):
        assert relative(kept.direction, part) < 1e-9 and part.norm() / u.norm() > 1e-5
    torch.testing.assert_close(steps[0].saliency.double(), saliency, rtol=1e-5, atol=1e-6)
    assert torch.equal(steps[0].mask.double(), mask) and 0.1 < mask.mean() < 0.9


def test_a_video_of_the_smallest_size_and_of_a_smaller_one():
    """One frame and two pixels are enough where the blur leaves time out; in time, a blur of three frames needs two."""
    model, x, sigma, args = video("LTX")
    guided = ksag.SAGDenoiser(model, blur_kernel_size=3)
    assert guided(x[:, :, :1, :2, :2], sigma, **args).isfinite().all()
    with pytest.raises(ValueError, match="A latent of 1 × 2 × 1 is too small for blur_kernel_size=3"):
        guided(x[:, :, :1, :2, :1], sigma, **args)
    guided.directions[0].blur_time = True
    with pytest.raises(ValueError, match="A latent of 1 × 2 × 2 is too small for blur_kernel_size=3"):
        guided(x[:, :, :1, :2, :2], sigma, **args)


def test_a_video_that_the_patches_do_not_divide():
    """Wan leaves the last row out, so that its answer has another size: an error, and no image."""
    model, x, sigma, args = video("Wan")
    with pytest.raises(TypeError, match=r"velocity, a tensor of shape \(4, 4, 3, 7, 12\) as x_t has, got .* \(4, 4, 3, 6, 12\)"):
        ksag.SAGDenoiser(model, blur_kernel_size=3)(x[:, :, :, :7], sigma, **args)


def test_plots_of_a_video():
    model, x, _, args = video("Wan")
    with ksag.GuidedDenoiser(model, [ksag.SAG(blur_kernel_size=3), ksag.PAG()]) as guided, guided.trace() as steps:
        K.sampling.sample_euler(guided, x, torch.tensor([3.0, 1.0, 0.0]), args, disable=True)
    assert len(steps) == 4 and "SAG" in repr(steps)
    figures = [
        plot.trace(steps, decode=lambda x: x[:, :3].tanh()),
        plot.saliency(x[:, :3].tanh(), steps[0].saliency, mask=steps[0].mask),
        plot.compare({"x": x[:, :3].tanh()}),
    ]
    for figure in figures:
        with io.BytesIO() as file:
            figure.savefig(file)
            assert file.tell() > 1000


def test_a_video_transformer_that_attends_in_several_calls_is_refused():
    options = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 8, "in_channels": 4}
    model = seeded(lambda: MochiTransformer3DModel(**options, text_embed_dim=16, time_embed_dim=8))
    with pytest.raises(ValueError, match="it attends in several calls, each for one sample"):
        ksag.SAGDenoiser(model)


# Sound: stable-audio-tools


def stable_audio(memory=0, patch=1, **options):
    """K.external.VDenoiser around its transformer."""
    limit = torch._dynamo.config.recompile_limit
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that flash_attn is missing
        dit = pytest.importorskip("stable_audio_tools.models.dit", reason="pip install --no-deps stable-audio-tools")
    torch._dynamo.config.recompile_limit = limit  # it sets another one
    sizes = {"io_channels": 4, "embed_dim": 64, "depth": 3, "num_heads": 2, "patch_size": patch, "num_memory_tokens": memory}
    conditioning = {"cond_token_dim": 16, "global_cond_dim": 8, "prepend_cond_dim": 8}
    model = seeded(lambda: dit.DiffusionTransformer(**sizes, **conditioning, **options))
    return K.external.VDenoiser(model)


def sound(n=24, batch=2):
    """x, sigma and the conditionings; uncond as the model makes it for its own classifier-free guidance."""
    cond = {
        "cross_attn_cond": torch.randn(batch, 5, 16),
        "global_embed": torch.randn(batch, 8),
        "prepend_cond": torch.randn(batch, 2, 8),
        "prepend_cond_mask": torch.ones(batch, 2),
    }
    uncond = cond | {name: torch.zeros_like(cond[name]) for name in ("cross_attn_cond", "prepend_cond")}
    return torch.randn(batch, 4, n) * 3, torch.full((batch,), 3.0), cond, uncond


@pytest.mark.parametrize(("memory", "patch", "qk_norm"), [(0, 1, "none"), (3, 1, "ln"), (3, 2, "none")])
def test_a_whole_step_of_sound(memory, patch, qk_norm):
    """What is prepended (the conditioning, the time and memory tokens) takes part in the softmax and is not guided."""
    model, (x, sigma, cond, uncond) = stable_audio(memory, patch, attn_kwargs={"qk_norm": qk_norm}), sound()
    guided = ksag.GuidedDenoiser(model, [ksag.SAG(0.7, 1.5, blur_kernel_size=5), ksag.PAG(1.3), ksag.SEG(0.9)], cond_key=None)
    result = guided(x, sigma, cond=cond, uncond=uncond, cond_scale=3.0)
    (layer,) = (layer for layer in ksag.list_attention(model) if layer.grid)
    assert layer.path == "inner_model.transformer.layers.1.self_attn" and layer.grid == (24 // patch,) and layer.checked
    image = Image(memory + 3, layer.grid)
    attention = model.get_submodule(layer.path)
    u, g, parts, *_ = step(lambda x, c: model(x, sigma, **c), attention, image, x, cond, uncond, 1.5, 5)
    expected = u + (g - u) * 3 + sum(scale * part for scale, part in zip((0.7, 1.3, 0.9), parts, strict=True))
    assert relative(result, expected) < 1e-5
    for part in parts:
        assert part.norm() / u.norm() > 1e-4


def test_classifier_free_guidance_of_the_model_and_of_ksag_are_the_same():
    model, (x, sigma, cond, uncond) = stable_audio(), sound()
    expected = model(x, sigma, **cond, cfg_scale=4.0)
    guided = ksag.SAGDenoiser(model, cond_key=None, sag_scale=0.0)
    assert relative(guided(x, sigma, cond=cond, uncond=uncond, cond_scale=4.0), expected) < 1e-5
    guided.sag_scale = 1.0
    with pytest.raises(ValueError, match="of the 2 samples that the model was given"):
        guided(x, sigma, cond={**cond}, cfg_scale=4.0)


def test_differential_attention_is_refused():
    with pytest.raises(ValueError, match="it subtracts one attention from another"):
        ksag.SAGDenoiser(stable_audio(attn_kwargs={"differential": True}), attention="layers.1.self_attn")


def test_runs_trace_and_plots_of_sound():
    model, (x, _, cond, uncond) = stable_audio(), sound(n=17)
    sigmas = K.sampling.get_sigmas_polyexponential(3, 0.3, 50.0)
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    with ksag.GuidedDenoiser(model, [ksag.SAG(one_pass=True), ksag.SEG(blur_sigma=2.0)], cond_key=None) as guided:
        with guided.trace() as steps:
            result = K.sampling.sample_dpmpp_2m(guided, x * sigmas[0], sigmas, args, disable=True)
        guided.directions[0].blur_kernel_size = 35
        with pytest.raises(ValueError, match="A latent of 17 is too small for blur_kernel_size=35"):
            guided(x, torch.ones(2), **args)
    assert result.shape == x.shape and result.isfinite().all()
    assert steps[-1].cond.shape == x.shape and steps[0].saliency.shape == (2, 17)
    with io.BytesIO() as file:
        plot.trace(steps).savefig(file)
        assert file.tell() > 1000
