"""Every family is read as the layer applied it: against the attention watched while the layer runs, in float64.

The classes are the real ones of their packages where there is a package. guided-diffusion's AttentionBlock is in CompVis's
ldm; improved-diffusion, EDM, EDM2 and k-diffusion's second transformer are in none: tests/models.py has stand-ins for them.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ksag
from ksag.attention.find import find_attention
from ksag.attention.tap import AttentionTap
from tests.models import CASES, MID_ATTN1, Around, Unknown, WatchAttention, diffusers_call, seeded


def build(case):
    return seeded(case.model)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, case in CASES.items() for size in case.sizes])
def test_read_as_applied(name, size):
    case = CASES[name]
    batch = 3 if size == case.sizes[0] else 1
    model = build(case)
    assert find_attention(model, case.attention)[0] == case.path
    x = torch.randn(batch, case.channels, *size) * 2
    plain = case.call(model, x)

    tap = AttentionTap(model, case.attention)
    with tap.recording(batch) as seen:
        recorded = case.call(model, x)
    grid = (size[0] // case.factor, size[1] // case.factor)
    assert seen.saliency().shape == (batch, *grid) and tap.grid == grid

    with WatchAttention(tap.layer) as watch:
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


WHOLE = ("any other", "k-diffusion", "diffusers")
"""Of the others, only the layer is compiled, which takes less time."""
BREAKS = ["k-diffusion transformer v1", *(["any other", "lucidrains, flash"] if torch.__version__.startswith("2.10.") else [])]
"""They break the graph inside the layer: where it looks for flash_attn, or where this PyTorch meets a TorchFunctionMode."""


SAME = ("diffusers, SD 2.x", "diffusers, SDXL", "diffusers, unconditional")
"""Read as "diffusers" is, from the same class."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "any other" else pytest.mark.slow) for name in CASES if name not in SAME]
)
def test_compiled_after_wrapping(name):
    case = CASES[name]
    model = build(case)
    x = torch.randn(2, case.channels, *case.sizes[0]) * 2
    tap = AttentionTap(model, case.attention)
    with tap.recording(2) as eager:
        case.call(model, x)
    torch._dynamo.reset()
    compiled = model if name in WHOLE else tap.layer
    compiled.compile(backend="eager", fullgraph=name not in BREAKS)
    for _ in range(2):
        try:
            with tap.recording(2) as seen:
                case.call(model, x)
            saliency = seen.saliency()
        except (RuntimeError, ValueError) as error:
            assert name in BREAKS and case.path in str(error)  # but never unguided
        else:
            torch.testing.assert_close(saliency, eager.saliency(), rtol=1e-5, atol=1e-6)


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
    assert repr(guided).endswith("attention checked)") and all(layer.checked for layer in ksag.list_attention(guided.inner_model))
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
    assert unreadable.path == "1" and "MultiheadAttention: not supported: its queries and keys cannot" in unreadable.family
