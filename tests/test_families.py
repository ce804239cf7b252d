"""Every family is read as the layer applied it: against the attention watched while the layer runs, in float64.

The classes are the real ones of their packages where there is a package. guided-diffusion's AttentionBlock is in CompVis's
ldm; improved-diffusion, EDM, EDM2 and k-diffusion's second transformer are in none, and have stand-ins here, which say so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import k_diffusion as K
import pytest
import torch
from denoising_diffusion_pytorch import KarrasUnet, Unet
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import ksag
from ksag.attention.find import find_attention
from ksag.attention.tap import AttentionTap
from tests import models
from tests.models import Around, Unknown, conditional, make_denoiser, seeded


class Watch(TorchFunctionMode):
    """The attention, (b heads or b, heads, queries, keys), of each softmax and each SDPA call inside a layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.inside = False
        self.seen: list[torch.Tensor] = []
        layer.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
        layer.register_forward_hook(lambda *_: setattr(self, "inside", False))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.inside and func is F.scaled_dot_product_attention:
            q, k = args[0].double(), args[1].double()
            scale = kwargs.get("scale")
            self.seen.append((q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1))
        elif self.inside and func in (torch.softmax, torch.Tensor.softmax, F.softmax):
            self.seen.append(out.double())
        return out


# The cases


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
    "k-diffusion transformer v2": Case(lambda: models.ChannelsLast(32), alone, "mid_level.0"),
    "CompVis": Case(models.compvis_unet, compvis_call, "middle_block.1.transformer_blocks.0.attn1", 4),
    "CompVis, memory efficient": Case(
        lambda: Around("middle_block.1", models.SpatialTransformer(32)), alone, "middle_block.1.attn1", factor=1,
        sizes=((8, 8), (7, 9)),
    ),
    "guided-diffusion, legacy order": Case(models.openai_unet(False), with_sigma, "middle_block.1", 4),
    "guided-diffusion, new order": Case(models.openai_unet(True), with_sigma, "middle_block.1", 4),
    "improved-diffusion": Case(
        lambda: Around("middle_block.1", models.ImprovedAttentionBlock(32, 2)), alone, "middle_block.1", factor=1,
        sizes=((8, 8), (7, 9)),
    ),
    "EDM": Case(lambda: Around("dec.8x8_in0", models.EDMBlock(32, 2), "emb"), alone, "dec.8x8_in0"),
    "EDM2": Case(
        lambda: Around("dec.8x8_in0", models.EDM2Block(32, 2), "emb"), alone, "dec.8x8_in0", factor=1, sizes=((8, 8), (7, 9))
    ),
    "diffusers": Case(conditional, diffusers_call, MID_ATTN1, 4),
    "diffusers, SD 2.x": Case(
        lambda: conditional(use_linear_projection=True, attention_head_dim=(2, 4)), diffusers_call, MID_ATTN1, 4
    ),
    "diffusers, SDXL": Case(
        lambda: conditional(transformer_layers_per_block=(1, 2), use_linear_projection=True), diffusers_call, MID_ATTN1, 4
    ),
    "diffusers, fused": Case(models.fused, diffusers_call, MID_ATTN1, 4),
    "diffusers, LoRA": Case(models.with_lora, diffusers_call, MID_ATTN1, 4),
    "diffusers, norm_q and norm_k": Case(models.with_norms, diffusers_call, MID_ATTN1, 4),
    "diffusers, unconditional": Case(models.unconditional, lambda m, x: m(x, 500), "mid_block.attentions.0"),
    "lucidrains": Case(
        lambda: Unet(32, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2), with_sigma, "mid_attn", memory=4
    ),
    "lucidrains, flash": Case(
        lambda: Unet(32, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2, flash_attn=True), with_sigma,
        "mid_attn", memory=4,
    ),
    "lucidrains, KarrasUnet": Case(
        lambda: KarrasUnet(image_size=16, dim=32, dim_max=64, channels=3, num_downsamples=1, num_blocks_per_stage=1, attn_res=(8,),
                           attn_dim_head=16), with_sigma, "mids.0.attn", memory=4, sizes=((16, 16),),
    ),
    "any other": Case(
        lambda: Around("mine", Unknown(32)), alone, "mine", factor=1, sizes=((8, 8), (7, 9)), attention="mine"
    ),
}  # fmt: skip


def build(case):
    return seeded(case.model)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "size"), [(name, size) for name, case in CASES.items() for size in case.sizes])
def test_read_as_applied(name, size, batch):
    case = CASES[name]
    model = build(case)
    assert find_attention(model, case.attention)[0] == case.path
    x = torch.randn(batch, case.channels, *size) * 2
    plain = case.call(model, x)

    tap = AttentionTap(model, case.attention)
    with tap.recording(batch) as seen:
        recorded = case.call(model, x)
    grid = (size[0] // case.factor, size[1] // case.factor)
    assert seen.saliency().shape == (batch, *grid) and tap.grid == grid

    with Watch(tap.layer) as watch:
        case.call(model, x)
    (attention,) = watch.seen
    tokens = grid[0] * grid[1]
    received = attention.reshape(batch, -1, tokens, tokens + case.memory).mean(1).sum(1)[:, case.memory :]
    expected = (received / received.mean(1, keepdim=True)).view(batch, *grid)
    torch.testing.assert_close(seen.saliency().double(), expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 1e-3

    for out, again in zip(as_tensors(plain), as_tensors(recorded), strict=True):
        assert torch.equal(out, again)  # recording changes nothing


def as_tensors(output):
    return [output] if isinstance(output, torch.Tensor) else [output.sample]


NOT_COMPILED = {
    "any other": "a compiled graph makes no call of scaled_dot_product_attention that could be watched",
    "k-diffusion transformer v1": "it breaks the graph inside the layer, where it looks for flash_attn",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_COMPILED])
def test_compiled_after_wrapping(name):
    case = CASES[name]
    model = build(case)
    x = torch.randn(2, case.channels, *case.sizes[0]) * 2
    tap = AttentionTap(model, case.attention)
    with tap.recording(2) as eager:
        case.call(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with tap.recording(2) as seen:
            case.call(compiled, x)
        torch.testing.assert_close(seen.saliency(), eager.saliency(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_what_cannot_be_read_compiled_is_an_error_or_right_never_unguided(name):
    case = CASES[name]
    model = build(case)
    x = torch.randn(2, case.channels, *case.sizes[0]) * 2
    tap = AttentionTap(model, case.attention)
    with tap.recording(2) as eager:
        case.call(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        try:
            with tap.recording(2) as seen:
                case.call(compiled, x)
            saw = seen.saliency()
        except (RuntimeError, ValueError) as error:
            assert case.path in str(error)
        else:
            torch.testing.assert_close(saw, eager.saliency(), rtol=1e-5, atol=1e-6)


# An attention of no family


class Guidable(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.unet = Around("mine", block)

    def forward(self, x, sigma):
        return self.unet(x)


def guided_by(block):
    torch.manual_seed(0)
    return ksag.SAGDenoiser(Guidable(block).eval().requires_grad_(False), attention="mine")


class Masked(nn.Module):
    """Attends with what it is told, and two key heads for four of queries."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        tokens = x.flatten(2).mT
        q = self.q(tokens).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.kv(tokens).chunk(2, dim=-1))
        self.told = q, k.repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **self.options)
        return x + y.transpose(1, 2).flatten(2).mT.reshape(x.shape)


ALLOWED = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.7
BIAS = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    ("options", "bias"),
    [
        ({}, 0.0),
        ({"is_causal": True}, torch.full((64, 64), -torch.inf).triu(1)),
        ({"attn_mask": ALLOWED}, torch.where(ALLOWED, 0.0, -torch.inf)),
        ({"attn_mask": BIAS}, BIAS),
        ({"attn_mask": ALLOWED[:, 0, :1].expand(2, 64, 64)[:, None]}, torch.where(ALLOWED[:, :, :1], 0.0, -torch.inf)),
    ],
    ids=["none", "causal", "boolean", "bias", "keys"],
)
def test_a_mask_and_grouped_keys_are_read_as_they_are(options, bias):
    guided = guided_by(Masked(**options))
    with guided.trace() as steps:
        guided(torch.randn(2, 3, 8, 8), torch.ones(2))
    with guided.tap.recording(2) as seen:
        guided.inner_model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.ones(2))
    q, k = (t.double() for t in guided.tap.layer.told)
    expected = (q @ k.mT * 8**-0.5 + bias).softmax(-1).mean(1).sum(1).view(2, 8, 8)
    torch.testing.assert_close(seen.saliency().double(), expected, rtol=1e-5, atol=1e-6)
    assert steps[0].saliency.shape == (2, 8, 8)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Unknown(32), Unknown(32)

    def forward(self, x):
        return self.b(self.a(x))


class Windows(Unknown):
    def forward(self, x):
        b, c, h, w = x.shape
        tokens = x.reshape(b, c, h, 2, w // 2).permute(0, 3, 2, 4, 1).reshape(b * 2, 1, h * w // 2, c)
        return x + F.scaled_dot_product_attention(tokens, tokens, tokens).mean()


class NoCall(Unknown):
    def forward(self, x):
        return x * 2


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Twice(), "calls scaled_dot_product_attention 2 times"),
        (NoCall(32), "calls scaled_dot_product_attention 0 times"),
        (Windows(32), r"has queries \(4, 1, 32, 32\)"),
    ],
)
def test_an_attention_that_cannot_be_read_is_an_error(block, message):
    guided = guided_by(block)
    with pytest.raises(ValueError, match=message):
        guided(torch.randn(2, 3, 8, 8), torch.ones(2))
    guided(torch.randn(2, 3, 8, 8), torch.ones(2), sag_scale=0.0)


def test_an_error_inside_a_watched_layer_leaves_nothing_watching():
    guided = guided_by(Unknown(32))
    args = torch.randn(2, 3, 8, 8), torch.ones(2)
    expected = guided(*args)
    handle = guided.tap.layer.project.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guided(*args)
    handle.remove()
    assert torch.overrides._get_current_function_mode() is None
    assert torch.equal(guided(*args), expected)


# The list


def test_list_attention_is_a_table_here_and_in_a_notebook():
    model = build(CASES["diffusers"])
    layers = ksag.list_attention(model)
    lines = repr(layers).splitlines()
    assert len(lines) == 1 + len(layers) and lines[0].split() == ["path", "family", "heads", "grid", "checked"]
    assert any(MID_ATTN1 in line and line.endswith("?     no") for line in lines)
    assert layers._repr_html_().count("<tr>") == 1 + len(layers)

    tap = AttentionTap(model, "middle")
    with tap.recording(1):
        diffusers_call(model, torch.randn(1, 4, 12, 20))
    (seen,) = [layer for layer in ksag.list_attention(model) if layer.path == MID_ATTN1]
    assert seen.grid == (6, 10) and "6×10" in repr(ksag.list_attention(model))


def test_list_attention_of_a_family_that_it_does_not_know():
    class MyAttention(Unknown):
        pass

    model = nn.Sequential(MyAttention(8), nn.MultiheadAttention(8, 2))
    by_path, unreadable = ksag.list_attention(model)
    assert by_path.path == "0" and "by path, if it calls scaled_dot_product_attention" in by_path.family
    assert unreadable.path == "1" and unreadable.family == "unknown MultiheadAttention: not supported"
