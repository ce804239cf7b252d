"""Where "middle" is: in the UNets and transformers of the packages, beside other models that have a middle too, and in stand-ins.

The stand-ins have the submodules and names of public repositories that are no packages; only where their layers are is asked.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import k_diffusion as K
import pytest
import torch
from denoising_diffusion_pytorch import KarrasUnet, Unet
from denoising_diffusion_pytorch.classifier_free_guidance import Unet as GuidedUnet
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

import ksag
from ksag.attention.find import find_attention
from ksag.attention.tap import AttentionTap
from tests import models
from tests.models import MID_ATTN1, WatchAttention, conditional, hooks, seeded

LAST_DOWN = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
ATTENTION_EVERYWHERE = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


def unconditional(**options):
    return UNet2DModel(
        **{
            "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1,
            "norm_num_groups": 8, "attention_head_dim": 16, "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"), **options,
        }
    )  # fmt: skip


def kandinsky():
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=16, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=4, norm_num_groups=8,
        sample_size=16,
    )  # fmt: skip


def pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=5, norm_num_groups=8,
        sample_size=16, cross_attention_dim=32, caption_channels=64,
    )  # fmt: skip


def vae():
    return AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8, layers_per_block=1,
    )  # fmt: skip


def ldm_encoder():
    return models.ldm("diffusionmodules.model").Encoder(
        ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[8], in_channels=3, resolution=16, z_channels=4
    )


class Holder(nn.Module):
    """A denoiser that holds several models, in the order in which they are given; its UNet alone runs."""

    def __init__(self, **held):
        super().__init__()
        for name, module in held.items():
            self.add_module(name, module)

    def forward(self, *args):
        return self.unet(*args)


def with_controlnet():
    unet = conditional()
    return Holder(controlnet=ControlNetModel.from_unet(unet), unet=unet)


class Real(NamedTuple):
    build: Callable[[], nn.Module]
    call: Callable[[Any, torch.Tensor], Any]
    path: str
    grid: tuple[int, int]
    """At a latent of 16 × 24."""
    channels: int = 4
    memory: int = 0


diffusers_call = models.diffusers_call
REAL = {
    "UNet2DModel": Real(unconditional, lambda m, x: m(x, 500), "mid_block.attentions.0", (8, 12)),
    "UNet2DModel without attention in the middle": Real(
        functools.partial(unconditional, add_attention=False), lambda m, x: m(x, 500), "down_blocks.1.attentions.0", (8, 12)
    ),
    "UNet2DModel with attention at the first level only": Real(
        functools.partial(
            unconditional, add_attention=False, down_block_types=("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        ),
        lambda m, x: m(x, 500), "down_blocks.0.attentions.0", (16, 24),
    ),
    "UNet2DConditionModel": Real(conditional, diffusers_call, MID_ATTN1, (8, 12)),
    "UNet2DConditionModel without a middle": Real(
        functools.partial(conditional, mid_block_type=None, **ATTENTION_EVERYWHERE), diffusers_call, LAST_DOWN, (8, 12)
    ),
    "UNet2DConditionModel with resnets only in the middle": Real(
        functools.partial(conditional, mid_block_type="UNetMidBlock2D", **ATTENTION_EVERYWHERE), diffusers_call, LAST_DOWN, (8, 12)
    ),
    "UNet2DConditionModel with the text's keys before the image's": Real(
        kandinsky, lambda m, x: m(x, 500, torch.arange(2 * 7 * 32.0).sin().view(2, 7, 32)), "mid_block.attentions.0", (8, 12),
        memory=7
    ),
    "a ControlNetModel before the UNet": Real(with_controlnet, diffusers_call, f"unet.{MID_ATTN1}", (8, 12)),
    "an AutoencoderKL before the UNet": Real(
        lambda: Holder(vae=vae(), unet=conditional()), diffusers_call, f"unet.{MID_ATTN1}", (8, 12)
    ),
    "an AutoencoderKL after a UNet without a middle": Real(
        lambda: Holder(unet=conditional(mid_block_type=None, **ATTENTION_EVERYWHERE), vae=vae()), diffusers_call,
        f"unet.{LAST_DOWN}", (8, 12),
    ),
    "DiT": Real(
        dit, lambda m, x: m(x[..., :16], timestep=torch.full(x.shape[:1], 500), class_labels=torch.arange(2)),
        "transformer_blocks.2.attn1", (8, 8),
    ),
    "PixArt": Real(
        pixart,
        lambda m, x: m(
            x, torch.ones(2, 7, 64), torch.full((2,), 500), added_cond_kwargs={"resolution": None, "aspect_ratio": None}
        ),
        "transformer_blocks.2.attn1", (8, 12),
    ),
    "ldm, text": Real(models.compvis_unet, models.compvis_call, "middle_block.1.transformer_blocks.0.attn1", (8, 12)),
    "ldm, no text": Real(models.openai_unet(False), models.with_sigma, "middle_block.1", (8, 12)),
    "ldm's encoder before its UNet": Real(
        lambda: Holder(first_stage_model=ldm_encoder(), unet=models.compvis_unet()), models.compvis_call,
        "unet.middle_block.1.transformer_blocks.0.attn1", (8, 12),
    ),
    "k-diffusion UNet": Real(
        lambda: K.models.ImageDenoiserModelV1(4, 32, [1, 2, 1], [32, 64, 64], [False, True, True]), models.with_sigma,
        "u_net.d_blocks.2.2", (4, 6),
    ),
    "k-diffusion UNet without attention at the deepest level": Real(
        lambda: K.models.ImageDenoiserModelV1(4, 32, [1, 2, 1], [32, 64, 64], [True, True, False]), models.with_sigma,
        "u_net.d_blocks.1.2", (8, 12),
    ),
    "k-diffusion transformer v1": Real(
        lambda: K.models.ImageTransformerDenoiserModelV1(4, 128, 128, 4, 4, (2, 2)), models.with_sigma, "blocks.2.self_attn",
        (8, 12),
    ),
    "lucidrains Unet": Real(
        lambda: Unet(32, channels=4, dim_mults=(1, 2), full_attn=(True, True), attn_dim_head=8, attn_heads=2), models.with_sigma,
        "mid_attn", (8, 12), memory=4,
    ),
    "lucidrains KarrasUnet": Real(
        lambda: KarrasUnet(image_size=16, dim=32, dim_max=64, channels=4, num_downsamples=1, num_blocks_per_stage=1,
                           attn_res=(16, 8), attn_dim_head=16),
        lambda m, x: models.with_sigma(m, x[..., :16]), "mids.0.attn", (8, 8), memory=4,
    ),
    "lucidrains, classifier-free guidance": Real(
        lambda: GuidedUnet(32, channels=4, num_classes=4, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2),
        lambda m, x: m(x, torch.full((2,), 500), torch.arange(2), cond_drop_prob=0.0), "mid_attn.fn.fn", (8, 12),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_middle_of_real_models_is_found_and_read(name, monkeypatch):
    monkeypatch.setenv("K_DIFFUSION_USE_COMPILE", "0")
    real = REAL[name]
    model = seeded(real.build)
    assert find_attention(model, "middle")[0] == real.path
    x = torch.randn(2, real.channels, 16, 24)
    tap = AttentionTap(model)
    with tap.recording(2) as seen:
        real.call(model, x)
    assert seen.saliency().shape == (2, *real.grid) and tap.checker.status == "checked"

    with WatchAttention(model.get_submodule(real.path)) as watch:
        real.call(model, x)
    (attention,) = watch.seen
    tokens = real.grid[0] * real.grid[1]
    received = attention.reshape(2, -1, tokens, tokens + real.memory).mean(1).sum(1)[:, real.memory :]
    expected = (received / received.mean(1, keepdim=True)).view(2, *real.grid)
    torch.testing.assert_close(seen.saliency().double(), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-4


# More than one, or none


def test_two_unets_have_to_be_told_apart():
    model = Holder(base=conditional(), refiner=conditional())
    paths = [f"base.{MID_ATTN1}", f"refiner.{MID_ATTN1}"]
    with pytest.raises(ValueError, match=rf"Holder holds more than one UNet: give attention= one of '{paths[0]}', '{paths[1]}'\.$"):
        ksag.SAGDenoiser(model)
    assert hooks(model) == 0
    for attention in paths[1], model.get_submodule(paths[1]):
        assert find_attention(model, attention)[0] == paths[1]
    with pytest.raises(ValueError, match=r"could be any of base\..*, refiner\..*\. Give one of these"):
        find_attention(model, MID_ATTN1)


def test_two_unets_of_different_libraries_have_to_be_told_apart():
    model = Holder(prior=models.compvis_unet(), decoder=conditional())
    with pytest.raises(ValueError, match=rf"more than one UNet.*'prior\.middle_block.*'decoder\.{MID_ATTN1}'"):
        ksag.SAGDenoiser(model)


def test_a_controlnet_alone_has_a_middle():
    assert find_attention(ControlNetModel.from_unet(conditional()), "middle")[0] == MID_ATTN1


def test_a_unet_without_any_attention():
    unet = unconditional(
        add_attention=False, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"No self-attention found in the middle of UNet2DModel\. It has no layer of a family"):
        ksag.SAGDenoiser(unet)


# Stable Diffusion 3.5 medium


def test_the_image_s_own_attention_beside_a_joint_one_can_be_named():
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        dual_attention_layers=(0, 1), qk_norm="rms_norm",
    ).eval().requires_grad_(False)  # fmt: skip
    assert find_attention(model, "middle")[0] == "transformer_blocks.1.attn"
    path, _, family = find_attention(model, "transformer_blocks.1.attn2")
    assert path == "transformer_blocks.1.attn2" and family is not None
    tap = AttentionTap(model, path)
    with tap.recording(2) as seen:
        model(torch.randn(2, 4, 16, 24), torch.randn(2, 7, 64), torch.randn(2, 64), torch.full((2,), 500))
    assert seen.saliency().shape == (2, 8, 12) and tap.checker.status == "checked"


# Stand-ins


def nested(**layers):
    """Modules at dotted paths, with __ for each dot."""
    root = nn.Module()
    for name, layer in layers.items():
        *parents, last = name.split("__")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.add_module(last, layer)
    return root


def edm(**layers):
    return nested(**{name: models.EDMBlock(32, 2) if attends else nn.Identity() for name, attends in layers.items()})


def hdit(layer=models.HDiTAttention, **attends):
    """HDiT's blocks: those that attend have a self_attn, and those that do not have none."""
    names = {name: f"{name}__self_attn" if there else name for name, there in attends.items()}
    return nested(**{names[name]: layer(32, 2) if there else nn.Identity() for name, there in attends.items()})


class NeighbourhoodAttention(models.HDiTAttention):
    """A stand-in for attention within a neighbourhood, which has the same parts and a kernel_size."""

    kernel_size = 7


class SelfAttention2d(nn.Module):
    """A stand-in for v-diffusion's."""

    def __init__(self, channels=32, n_head=2):
        super().__init__()
        self.n_head = n_head
        self.qkv_proj, self.out_proj = nn.Conv2d(channels, channels * 3, 1), nn.Conv2d(channels, channels, 1)


def v_diffusion(depth):
    """Each level holds the one below in its middle, as SkipBlock does: net.2.main.2.main.2…"""

    def level(depth):
        inside = nested(main=level(depth - 1)) if depth else nn.Identity()
        return nn.Sequential(nn.Conv2d(32, 32, 1), SelfAttention2d(), inside, nn.Conv2d(32, 32, 1), SelfAttention2d())

    return nested(net=level(depth))


def compvis_with(**flags):
    """ldm's own UNet, with the flag that SD 2.x, SGM and ComfyUI set where attn1 attends to the text."""
    model = models.compvis_unet()
    for path in flags["disabled"]:
        model.get_submodule(path).disable_self_attn = True
    return model


MIDDLE_BLOCK, LAST_INPUT = "middle_block.1.transformer_blocks.0", "input_blocks.3.1.transformer_blocks.0"
STAND_INS = {
    "EDM: the decoder's first block, not the encoder's": (
        lambda: edm(enc__16x16_block0=True, enc__8x8_down=False, enc__8x8_block0=True, dec__8x8_in0=True, dec__8x8_in1=False,
                    dec__8x8_block0=True, dec__16x16_block0=True),
        "dec.8x8_in0",
    ),
    "EDM: at two digits of resolution": (
        lambda: edm(enc__32x32_block0=True, enc__16x16_block0=True, dec__16x16_in0=True, dec__16x16_block0=True), "dec.16x16_in0"
    ),
    "EDM: the lowest resolution, where the middle has none": (
        lambda: edm(enc__16x16_block0=True, enc__8x8_block0=True, enc__8x8_block1=True, enc__32x32_block0=True, dec__8x8_in0=False,
                    dec__8x8_block0=True),
        "enc.8x8_block0",
    ),
    "HDiT": (
        lambda: hdit(down_levels__0__0=True, mid_level__0=True, mid_level__1=True, up_levels__0__0=True), "mid_level.0.self_attn"
    ),
    "HDiT without attention in the middle": (
        lambda: hdit(down_levels__0__0=True, down_levels__1__0=True, down_levels__1__1=True, mid_level__0=False,
                     up_levels__0__0=True, up_levels__1__0=True),
        "down_levels.1.0.self_attn",
    ),
    "v-diffusion": (lambda: v_diffusion(3), "net.2.main.2.main.2.main.1"),
    "disable_self_attn in the middle": (lambda: compvis_with(disabled=[MIDDLE_BLOCK]), f"{LAST_INPUT}.attn1"),
    "disable_self_attn in the middle and the last level": (
        lambda: compvis_with(disabled=[MIDDLE_BLOCK, LAST_INPUT]), "input_blocks.1.1.transformer_blocks.0.attn1"
    ),
    "no transformer in the middle": (lambda: compvis_without_middle(), f"{LAST_INPUT}.attn1"),
    "a time_stack before the image's own": (
        lambda: nested(input_blocks=nn.Module(), output_blocks=nn.Module(),
                       middle_block__1__time_stack__0__attn1=models.MemoryEfficientCrossAttention(32, 2),
                       middle_block__1__transformer_blocks__0__attn1=models.MemoryEfficientCrossAttention(32, 2)),
        "middle_block.1.transformer_blocks.0.attn1",
    ),
}  # fmt: skip


def compvis_without_middle():
    """As with SGM's disable_middle_transformer."""
    model = models.compvis_unet()
    model.middle_block[1] = nn.Identity()
    return model


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("inside", [False, True])
def test_the_middle_of_stand_ins(name, inside):
    build, path = STAND_INS[name]
    model = build()
    if inside:
        model, path = Holder(vae=vae(), model=Holder(diffusion_model=model)), f"model.diffusion_model.{path}"
    assert find_attention(model, "middle")[0] == path


class ShiftedWindowAttention(models.HDiTAttention):
    """Likewise within a window."""

    window_size = 8


@pytest.mark.parametrize("layer", [NeighbourhoodAttention, ShiftedWindowAttention])
def test_attention_within_a_neighbourhood_or_a_window_is_refused_with_the_reason(layer):
    model = hdit(layer, down_levels__0__0=True, mid_level__0=True, up_levels__0__0=True)
    reason = "it attends within a neighbourhood or a window, and never relates all tokens to all"
    with pytest.raises(ValueError, match=f"No self-attention found in the middle .* not supported: {reason}"):
        ksag.SAGDenoiser(model)
    with pytest.raises(ValueError, match=rf"\({layer.__name__}\) is refused: {reason}"):
        ksag.SAGDenoiser(model, attention="mid_level.0.self_attn")
    layers = ksag.list_attention(model)
    assert len(layers) == 3 and all(layer.family.endswith(reason) for layer in layers)


@pytest.mark.parametrize("path", [f"{MIDDLE_BLOCK}.attn1", f"{MIDDLE_BLOCK}.attn2"])
def test_what_attends_to_the_text_cannot_be_named(path):
    model = compvis_with(disabled=[MIDDLE_BLOCK])
    assert path not in [layer.path for layer in ksag.list_attention(model)]
    with pytest.raises(ValueError, match="is refused: it attends to the text"):
        ksag.SAGDenoiser(model, attention=path)
