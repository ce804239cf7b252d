"""The models that the tests run: real classes where there is a package, and stand-ins, which say so."""

from collections.abc import Callable
from typing import Any, NamedTuple

import k_diffusion as K
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn
from torch.nn import functional as F

CLASSES = 10


def randomise(module: nn.Module, std: float = 0.05) -> nn.Module:
    """Gives the layers that a UNet initialises to zero random weights: with zeros, attention would do nothing."""
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=std)
    return module.eval().requires_grad_(False)


def make_denoiser(seed: int = 0) -> K.layers.Denoiser:
    """k-diffusion's own UNet, small: two levels, self-attention at the deeper one, two heads."""
    torch.manual_seed(seed)
    model = K.models.ImageDenoiserModelV1(3, 32, [1, 1], [32, 128], [False, True], mapping_cond_dim=CLASSES)
    return K.layers.Denoiser(randomise(model), sigma_data=0.5)


def inputs(batch: int = 2, size: tuple[int, int] = (16, 24), sigma: float = 3.0):
    """x, sigma, cond, uncond for `make_denoiser`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, *size, generator=generator) * (sigma**2 + 0.25) ** 0.5
    cond = torch.randn(batch, CLASSES, generator=generator)
    return x, torch.full((batch,), sigma), cond, torch.zeros(batch, CLASSES)


def seeded(build):
    """What `build()` makes, with the same random weights each time."""
    torch.manual_seed(0)
    return randomise(build())


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def ldm(module: str) -> Any:
    """A module of CompVis's `ldm`; skips the test where it is not installed. Its package pins old versions of all that it needs."""
    reason = "CompVis's ldm is not installed: pip install --no-deps stable-diffusion-sdkit"
    return pytest.importorskip(f"ldm.modules.{module}", reason=reason)


def openai_unet(new_order):
    def build():
        return ldm("diffusionmodules.openaimodel").UNetModel(
            image_size=8, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=1, attention_resolutions=[2],
            channel_mult=[1, 2], num_heads=2, use_new_attention_order=new_order,
        )  # fmt: skip

    return build


def compvis_unet():
    return ldm("diffusionmodules.openaimodel").UNetModel(
        image_size=8, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=1, attention_resolutions=[1, 2],
        channel_mult=[1, 2], num_heads=2, use_spatial_transformer=True, transformer_depth=1, context_dim=64,
    )  # fmt: skip


def lucidrains(name, *args, **options):
    import denoising_diffusion_pytorch  # here, because a machine with a GPU may have neither it nor ldm

    return getattr(denoising_diffusion_pytorch, name)(*args, **options)


def conditional(**options):
    return UNet2DConditionModel(
        **{
            "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
            "cross_attention_dim": 64, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **options,
        }
    )  # fmt: skip


def fused():
    model = conditional()
    model.fuse_qkv_projections()
    return model


def with_lora():
    from peft import LoraConfig

    model = conditional()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    return model


def with_norms():
    """diffusers' own Attention with its norm_q and norm_k, in the place of a UNet's."""
    model = conditional()
    block = model.mid_block.attentions[0].transformer_blocks[0]
    block.attn1 = type(block.attn1)(64, heads=4, dim_head=16, qk_norm="layer_norm")
    return model


def unconditional():
    return UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=16,
    )  # fmt: skip


# Stand-ins, from the facts of the public repositories


class MemoryEfficientCrossAttention(nn.Module):
    """A stand-in for CompVis's and SGM's, whose real one needs xformers: it keeps no scale."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.dim_head = heads, channels // heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x):
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SpatialTransformer(nn.Module):
    """A stand-in for the module that makes tokens of the pixels around it."""

    def __init__(self, channels):
        super().__init__()
        self.attn1 = MemoryEfficientCrossAttention(channels, 2)

    def forward(self, x):
        return x + self.attn1(x.flatten(2).mT).mT.reshape(x.shape)


class ImprovedAttentionBlock(nn.Module):
    """A stand-in for improved-diffusion's AttentionBlock: heads are split off first, and each holds its q, k, v in turn."""

    class QKVAttention(nn.Module):
        def forward(self, qkv):
            q, k, v = qkv.split(qkv.shape[1] // 3, dim=1)
            s = q.shape[1] ** -0.25
            return v @ torch.softmax((q * s).mT @ (k * s), dim=-1).mT

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = self.QKVAttention()
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        flat = x.reshape(b, c, h * w)
        y = self.attention(self.qkv(self.norm(flat)).reshape(b * self.num_heads, -1, h * w)).reshape(b, c, h * w)
        return (flat + self.proj_out(y)).reshape(x.shape)


class EDMBlock(nn.Module):
    """A stand-in for EDM's UNetBlock: it halves the resolution first, and its qkv are (heads, channels, 3)."""

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.affine = nn.Linear(1, channels)
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1, stride=2)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x, emb):
        x = self.conv1(self.conv0(x) + self.affine(emb)[:, :, None, None])
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(b * self.num_heads, c // self.num_heads, 3, h * w).unbind(2)
        weight = torch.softmax(torch.einsum("ncq,nck->nqk", q, k / k.shape[1] ** 0.5), dim=2)
        y = torch.einsum("nqk,nck->ncq", weight, v).reshape(x.shape)
        return F.interpolate(self.proj(y) + x, scale_factor=2)


class EDM2Block(nn.Module):
    """A stand-in for EDM2's Block: q, k and v are normalised over each head's channels."""

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.conv_res0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.attn_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.attn_proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x, emb):
        x = self.conv_res0(x)
        b, c, h, w = x.shape
        y = self.attn_qkv(x).reshape(b, self.num_heads, c // self.num_heads, 3, h * w)
        length = torch.linalg.vector_norm(y, dim=2, keepdim=True)
        q, k, v = (y / (1e-4 + length * (length.numel() / y.numel()) ** 0.5)).unbind(3)
        weight = torch.einsum("nhcq,nhck->nhqk", q, k / q.shape[2] ** 0.5).softmax(dim=3)
        return x + self.attn_proj(torch.einsum("nhqk,nhck->nhcq", weight, v).reshape(x.shape))


class HDiTAttention(nn.Module):
    """A stand-in for the global attention of k-diffusion's ImageTransformerDenoiserModelV2, on (b, h, w, c) tokens."""

    class AxialRoPE(nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.freqs = nn.Parameter(torch.rand(heads, 4) * 6)

        def forward(self, pos):
            theta_h = pos[..., None, 0:1] * self.freqs
            theta_w = pos[..., None, 1:2] * self.freqs
            return torch.cat((theta_h, theta_w), dim=-1)

    def __init__(self, channels, heads):
        super().__init__()
        self.n_heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv_proj = nn.Linear(channels, 3 * channels, bias=False)
        self.scale = nn.Parameter(torch.tensor([4.0, 9.0]))
        self.pos_emb = self.AxialRoPE(heads)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x, pos):
        b, h, w, _ = x.shape
        q, k, v = self.qkv_proj(self.norm(x)).reshape(b, h * w, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (F.normalize(t, dim=-1) * self.scale.sqrt()[:, None, None] for t in (q, k))
        theta = self.pos_emb(pos.reshape(h * w, 2)).transpose(0, 1)
        q, k = self.rotate(q, theta), self.rotate(k, theta)
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).reshape(x.shape)
        return x + self.out_proj(y)

    @staticmethod
    def rotate(x, theta):
        d = theta.shape[-1]
        a, b, rest = x[..., :d], x[..., d : 2 * d], x[..., 2 * d :]
        return torch.cat((a * theta.cos() - b * theta.sin(), b * theta.cos() + a * theta.sin(), rest), dim=-1).to(x.dtype)


class ChannelsLast(nn.Module):
    """Around the stand-in for the transformer: patches of 2 × 2 pixels as tokens (b, h, w, c)."""

    def __init__(self, channels):
        super().__init__()
        self.patch = nn.Conv2d(3, channels, 2, stride=2)
        self.mid_level = nn.ModuleList([HDiTAttention(channels, 2)])

    def forward(self, x):
        x = self.patch(x).movedim(1, -1)
        pos = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in x.shape[1:3]), indexing="ij"), dim=-1)
        return F.interpolate(self.mid_level[0](x, pos).movedim(-1, 1), scale_factor=2)[:, :3]


class Around(nn.Module):
    """A convolution, then the block under the name that its family's UNets give it."""

    def __init__(self, name, block, *args):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        parent, _, child = name.rpartition(".")
        self.add_module(parent or child, nn.ModuleDict({child: block}) if parent else block)
        self.block_args = args
        self.out = nn.Conv2d(32, 3, 3, padding=1)
        self.name = name

    def forward(self, x):
        args = [x.new_ones(x.shape[0], 1)] * len(self.block_args)
        return self.out(self.get_submodule(self.name)(self.conv(x), *args))


class Unknown(nn.Module):
    """An attention of no family, with a scale of its own, that calls scaled_dot_product_attention."""

    def __init__(self, channels):
        super().__init__()
        self.project = nn.Linear(channels, 2 * channels)

    def forward(self, x):
        tokens = x.flatten(2).mT
        q, k = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.project(tokens).chunk(2, dim=-1))
        y = F.scaled_dot_product_attention(q, k, k, scale=0.7)
        return x + y.transpose(1, 2).flatten(2).mT.reshape(x.shape)


class LatentDiffusion(nn.Module):
    """A stand-in for the part of CompVis's LatentDiffusion that k-diffusion calls."""

    def __init__(self):
        super().__init__()
        self.model = seeded(compvis_unet)
        self.alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)

    def apply_model(self, x, t, cond):
        return self.model(x, t, cond["c_crossattn"][0])


class WatchSoftmax(torch.overrides.TorchFunctionMode):
    """CompVis's CrossAttention takes a softmax of (b heads, queries, keys), which is the attention itself."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax):
            self.results.append(out)
        return out


# Every family, by its name: a model, how it is called, and where its middle is


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    call: Callable[[Any, torch.Tensor], Any]
    path: str
    """Of the layer that "middle" is."""
    channels: int = 3
    factor: int = 2
    """How much smaller the grid is than the input."""
    sizes: tuple[tuple[int, int], ...] = ((16, 16), (12, 20))
    memory: int = 0
    attention: str = "middle"


def with_sigma(m, x):
    return m(x, torch.ones(x.shape[0]))


def alone(m, x):
    return m(x)


def compvis_call(m, x):
    return m(x, torch.full(x.shape[:1], 500), torch.ones(x.shape[0], 7, 64) * 0.3)


def diffusers_call(m, x):
    return m(x, 500, torch.ones(x.shape[0], 7, 64) * 0.3)


MID_ATTN1 = "mid_block.attentions.0.transformer_blocks.0.attn1"
CASES = {
    "k-diffusion": Case(
        lambda: make_denoiser().inner_model, with_sigma, "u_net.d_blocks.1.2", sizes=((16, 16), (10, 14))
    ),
    "k-diffusion transformer v1": Case(
        lambda: K.models.ImageTransformerDenoiserModelV1(3, 128, 128, 3, 3, (2, 2)), with_sigma,
        "blocks.1.self_attn",
    ),
    "k-diffusion transformer v2": Case(lambda: ChannelsLast(32), alone, "mid_level.0"),
    "CompVis": Case(compvis_unet, compvis_call, "middle_block.1.transformer_blocks.0.attn1", 4),
    "CompVis, memory efficient": Case(
        lambda: Around("middle_block.1", SpatialTransformer(32)), alone, "middle_block.1.attn1", factor=1, sizes=((8, 8), (7, 9))
    ),
    "guided-diffusion, legacy order": Case(openai_unet(False), with_sigma, "middle_block.1", 4),
    "guided-diffusion, new order": Case(openai_unet(True), with_sigma, "middle_block.1", 4),
    "improved-diffusion": Case(
        lambda: Around("middle_block.1", ImprovedAttentionBlock(32, 2)), alone, "middle_block.1", factor=1,
        sizes=((8, 8), (7, 9)),
    ),
    "EDM": Case(lambda: Around("dec.8x8_in0", EDMBlock(32, 2), "emb"), alone, "dec.8x8_in0"),
    "EDM2": Case(
        lambda: Around("dec.8x8_in0", EDM2Block(32, 2), "emb"), alone, "dec.8x8_in0", factor=1, sizes=((8, 8), (7, 9))
    ),
    "diffusers": Case(conditional, diffusers_call, MID_ATTN1, 4),
    "diffusers, SD 2.x": Case(
        lambda: conditional(use_linear_projection=True, attention_head_dim=(2, 4)), diffusers_call, MID_ATTN1, 4
    ),
    "diffusers, SDXL": Case(
        lambda: conditional(transformer_layers_per_block=(1, 2), use_linear_projection=True), diffusers_call, MID_ATTN1, 4
    ),
    "diffusers, fused": Case(fused, diffusers_call, MID_ATTN1, 4),
    "diffusers, LoRA": Case(with_lora, diffusers_call, MID_ATTN1, 4),
    "diffusers, norm_q and norm_k": Case(with_norms, diffusers_call, MID_ATTN1, 4),
    "diffusers, unconditional": Case(unconditional, lambda m, x: m(x, 500), "mid_block.attentions.0"),
    "lucidrains": Case(
        lambda: lucidrains("Unet", 32, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2), with_sigma, "mid_attn", memory=4
    ),
    "lucidrains, flash": Case(
        lambda: lucidrains("Unet", 32, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2, flash_attn=True), with_sigma,
        "mid_attn", memory=4,
    ),
    "lucidrains, KarrasUnet": Case(
        lambda: lucidrains("KarrasUnet", image_size=16, dim=32, dim_max=64, channels=3, num_downsamples=1, num_blocks_per_stage=1,
                           attn_res=(8,), attn_dim_head=16), with_sigma, "mids.0.attn", memory=4, sizes=((16, 16),),
    ),
    "any other": Case(
        lambda: Around("mine", Unknown(32)), alone, "mine", factor=1, sizes=((8, 8), (7, 9)), attention="mine"
    ),
}  # fmt: skip


class WatchAttention(torch.overrides.TorchFunctionMode):
    """The attention, float64, of every softmax over keys and every scaled_dot_product_attention while a module runs."""

    def __init__(self, module):
        super().__init__()
        self.inside, self.seen = False, []
        self.handles = [
            module.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            module.register_forward_hook(lambda *_: setattr(self, "inside", False)),
        ]

    def __exit__(self, *exc_info):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exc_info)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.inside and func is F.scaled_dot_product_attention:
            self.seen.append(self.applied(*args, **(kwargs or {})))
        elif self.inside and func in (torch.softmax, torch.Tensor.softmax, F.softmax):
            self.seen.append(out.detach().double())
        return out

    @staticmethod
    def applied(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        q, k = query.detach().double(), key.detach().double()
        if enable_gqa:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        return logits.softmax(-1)
