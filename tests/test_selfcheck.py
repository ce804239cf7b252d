"""What is read is what the layer applies: a misread layer is refused or read correctly, and a correctly read one never refused.

The truth is the attention watched while the layer runs, in float64. Each misreading is shown to be real first: without the check,
the saliency is another, and no word is said.
"""

import functools
import math
import threading

import k_diffusion as K
import pytest
import torch
from denoising_diffusion_pytorch import Unet
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
    SlicedAttnProcessor,
    StableAudioAttnProcessor2_0,
)
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
    CrossFrameAttnProcessor,
    CrossFrameAttnProcessor2_0,
)
from peft import LoraConfig
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ksag
from ksag.attention import check as checks
from ksag.attention import checker
from ksag.attention.tap import AttentionTap
from tests import models
from tests.models import CASES, MID_ATTN1, Around, Unknown, WatchAttention, conditional, diffusers_call, seeded


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# What is applied, and what is read


def applied_saliency(module, run, batch, memory=0):
    """(b, tokens): how much of the attention inside `module` each of the image's keys gets while `run()` runs; its mean is 1."""
    with WatchAttention(module) as watch:
        run()
    attention = torch.cat(watch.seen)
    attention = attention.reshape(batch, -1, *attention.shape[-2:])
    received = attention.mean(1).sum(1)[:, memory : memory + attention.shape[-2]]
    return received / received.mean(1, keepdim=True)


def record(tap, run, batch=2):
    with tap.recording(batch) as seen:
        run()
    return seen.saliency().flatten(1).double()


def checked(tap):
    return tap.checker.status == "checked"


def is_right(saliency, applied, rtol=1e-4):
    return saliency.shape == applied.shape and bool(((saliency - applied).abs() <= rtol * applied.abs() + rtol / 10).all())


def misread_in_silence(model, run, applied, attention="middle", batch=2):
    """Without the check, the layer is read without an error, and another set of its tokens is masked."""
    tap = AttentionTap(model, attention, check=False)
    saliency = record(tap, run, batch)
    tap.close()
    return not is_right(saliency, applied) and bool(((saliency > 1) != (applied > 1)).any())


class Denoiser(nn.Module):
    """A UNet, called as its `Case` says, as a denoiser."""

    def __init__(self, unet, call):
        super().__init__()
        self.unet, self.call = unet, call

    def forward(self, x, sigma, **kwargs):
        out = self.call(self.unet, x, **kwargs)
        return out if isinstance(out, torch.Tensor) else out.sample


def peaked(layer, factor=4.0):
    """With random weights a layer attends everywhere alike. Larger queries and keys make it choose."""
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] in ("to_q", "to_k", "to_qkv", "qkv", "attn_qkv", "qkv_proj"):
            module.weight.data.mul_(factor)


def unet(processor=None, **options):
    """One level, so that one mask fits every layer."""
    one_level = {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "attention_head_dim": 4,
    }
    model = seeded(lambda: conditional(**one_level, **options))
    layer = model.get_submodule(MID_ATTN1)
    peaked(layer)
    if processor is not None:
        layer.set_processor(processor)
    return model, layer


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
KEEP = (torch.rand(2, 64, generator=torch.Generator().manual_seed(3)) > 0.4).float()


def masked_call(model, x):
    return model(x, 500, torch.ones(x.shape[0], 7, 64) * 0.3, attention_mask=KEEP)


# A projection's output that is scaled in place after it was seen


class ScalesInPlace(models.MemoryEfficientCrossAttention):
    """A substitute for CompVis's CrossAttention under A1111's split attention of October 2022 to January 2023."""

    def __init__(self, channels, heads):
        super().__init__(channels, heads)
        self.scale = (channels // heads) ** -0.5

    def forward(self, x):
        q, k_in, v = self.to_q(x), self.to_k(x), self.to_v(x)
        k_in *= self.scale
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k_in, v))
        return self.to_out(((q @ k.mT).softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


def compvis_like(layer_type):
    torch.manual_seed(0)
    transformer = models.SpatialTransformer(32)
    torch.manual_seed(1)
    transformer.attn1 = layer_type(32, 2)
    model = Around("middle_block.1", transformer).eval().requires_grad_(False)
    peaked(model)
    return Denoiser(model, lambda unet, x: unet(x))


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [
        *((mode, False) for mode in MODES),
        (torch.no_grad, True),
        *(pytest.param(mode, True, marks=pytest.mark.slow) for mode in MODES[1:]),
    ],
)
def test_a_key_scaled_in_place_is_read_right_at_every_call(mode, compiled, fresh_dynamo):
    x, sigma = torch.randn(2, 3, 8, 8), torch.ones(2)
    denoiser, twin = compvis_like(ScalesInPlace), compvis_like(models.MemoryEfficientCrossAttention)
    guided, unchecked = ksag.SAGDenoiser(denoiser), ksag.SAGDenoiser(denoiser, check_attention=False)
    expected = ksag.SAGDenoiser(twin)
    if compiled:
        denoiser.unet = torch.compile(denoiser.unet, backend="eager")
    with mode():
        x = x.clone().requires_grad_(torch.is_grad_enabled())
        for _ in range(3):
            want = expected(x, sigma)
            assert (guided(x, sigma) - want).norm() / want.norm() < 1e-5
            assert (unchecked(x, sigma) - want).norm() / want.norm() > 1e-3


# Masks


def test_a_mask_through_sdpa_is_read_right():
    model, layer = unet(AttnProcessor2_0())
    run = functools.partial(masked_call, model, X)
    applied = applied_saliency(layer, run, 2)
    assert misread_in_silence(model, run, applied)
    tap = AttentionTap(model)
    for _ in range(2):
        assert is_right(record(tap, run), applied)


def test_a_mask_is_read_right_while_another_thread_runs_the_layer_without_one():
    model, layer = unet(AttnProcessor2_0())
    masked, plain = functools.partial(masked_call, model, X), functools.partial(diffusers_call, model, X)
    applied = applied_saliency(layer, masked, 2)
    tap = AttentionTap(model)
    record(tap, masked)
    main, other = threading.current_thread(), threading.Thread(target=record, args=(tap, plain))

    def in_between(*_):
        if threading.current_thread() is main:
            other.start()
            other.join()

    layer.to_v.register_forward_hook(in_between)
    assert is_right(record(tap, masked), applied)


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_any_mask_of_sdpa_is_read_right(kind):
    class Masked(models.MemoryEfficientCrossAttention):
        """A substitute for SGM's CrossAttention, which takes a mask."""

        def forward(self, x):
            q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
            keep = torch.rand(x.shape[0], 1, 1, 64, generator=torch.Generator().manual_seed(0)) > 0.4
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keep if kind == "boolean" else keep * 3.0)
            return self.to_out(attended.transpose(1, 2).flatten(2))

    model = compvis_like(Masked).unet
    run = functools.partial(model, PIXELS)
    applied = applied_saliency(model.get_submodule("middle_block.1.attn1"), run, 2)
    assert misread_in_silence(model, run, applied)
    assert is_right(record(AttentionTap(model), run), applied)


# Processors, patches and options that attend in a way of their own


class OwnWay:
    """A processor of somebody's own, through SDPA or not: it changes the logits' scale, masks them, or rotates q and k."""

    def __init__(self, what, through_sdpa=False):
        self.what, self.through_sdpa = what, through_sdpa

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        projected = (to(hidden_states) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in projected)
        scale = attn.scale * (3 if self.what == "scale" else 1)
        if self.what == "rotation":
            q, k = self.rotated(q), self.rotated(k)
        keep = None
        if self.what == "mask":
            keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(20)
        if self.through_sdpa:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)
        else:
            logits = q @ k.mT * scale
            out = (logits if keep is None else logits.masked_fill(~keep, -torch.inf)).softmax(dim=-1) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    @staticmethod
    def rotated(x):
        angle = torch.arange(x.shape[2])[:, None] * torch.linspace(0.05, 1.0, x.shape[-1] // 2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1).to(x.dtype)


class SharedAttention:
    """A substitute for StyleAligned's shared attention: every sample attends to the first one's keys besides its own."""

    def __init__(self, through_sdpa):
        self.through_sdpa = through_sdpa

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        projected = (to(hidden_states) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in projected)
        q, k = self.normalised(q), self.normalised(k)
        k, v = (torch.cat((t, t[:1].expand_as(t)), dim=2) for t in (k, v))
        weights = (q @ k.mT * attn.scale).softmax(dim=-1)
        out = F.scaled_dot_product_attention(q, k, v) if self.through_sdpa else weights @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    @staticmethod
    def normalised(x):
        """With the mean and standard deviation of the first sample's."""
        mean, std = x.mean(dim=2, keepdim=True), x.std(dim=2, keepdim=True)
        return (x - mean) / std * std[:1] + mean[:1]


class ComfyAttention(models.MemoryEfficientCrossAttention):
    """A substitute for ComfyUI's CrossAttention: an option may put another function in the place of its attention."""

    def forward(self, x, context=None, value=None, mask=None, transformer_options=None):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        attend = (transformer_options or {}).get("optimized_attention_override", self.attend)
        return self.to_out(attend(q, k, v, self.heads, mask))

    @staticmethod
    def attend(q, k, v, heads, mask=None):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        return ((logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1) @ v).transpose(1, 2).flatten(2)


class ComfyBlock(nn.Module):
    """A substitute for ComfyUI's transformer blocks: with patches_replace, the block itself calls the parts of its attn1."""

    def __init__(self, channels):
        super().__init__()
        self.attn1 = ComfyAttention(channels, 2)
        self.args, self.options = (None,), {}

    def forward(self, x):
        n = x.flatten(2).mT
        if replace := self.options.get("patches_replace"):
            attended = self.attn1.to_out(replace(self.attn1.to_q(n), self.attn1.to_k(n), self.attn1.to_v(n), self.attn1.heads))
        else:
            attended = self.attn1(n, *self.args, transformer_options=self.options)
        return x + attended.mT.reshape(x.shape)


def comfy(**options):
    torch.manual_seed(0)
    model = Around("middle_block.1", ComfyBlock(32)).eval().requires_grad_(False)
    peaked(model)
    block = model.get_submodule("middle_block.1")
    block.options = options
    return model, block


def other_temperature(q, k, v, heads, mask=None):
    return ComfyAttention.attend(q * 3, k, v, heads)


def keys_of_the_other_sample(q, k, v, heads, mask=None):
    return ComfyAttention.attend(q, k.flip(0), v, heads)


def by_processor(processor, call=diffusers_call):
    def build():
        model, layer = unet(processor)
        return model, layer, functools.partial(call, model, X)

    return build


def by_option(**options):
    def build():
        model, block = comfy(**options)
        return model, block, functools.partial(model, PIXELS)

    return build


PATCH = "Likely cause: a patch, option or replaced forward"
OWN_WAY = "Likely cause: its processor, a OwnWay"
REFUSED = {
    "attention_mask": (by_processor(AttnProcessor(), masked_call), "Likely cause: its argument attention_mask"),
    "keys of the first frame": (by_processor(CrossFrameAttnProcessor(1)), "its processor, a CrossFrameAttnProcessor"),
    "keys of the first frame through SDPA": (by_processor(CrossFrameAttnProcessor2_0(1)), "a CrossFrameAttnProcessor2_0"),
    "a scale of its own": (by_processor(OwnWay("scale")), OWN_WAY),
    "a mask of its own": (by_processor(OwnWay("mask")), OWN_WAY),
    "a rotation of its own": (by_processor(OwnWay("rotation")), OWN_WAY),
    "shared attention": (by_processor(SharedAttention(False)), "its processor, a SharedAttention"),
    "shared attention through SDPA": (by_processor(SharedAttention(True)), "its processor, a SharedAttention"),
    "optimized_attention_override": (by_option(optimized_attention_override=other_temperature), PATCH),
    "patches_replace": (by_option(patches_replace=keys_of_the_other_sample), PATCH),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_misread_layer_is_refused(name):
    build, message = REFUSED[name]
    model, module, run = build()
    assert misread_in_silence(model, run, applied_saliency(module, run, 2))
    tap = AttentionTap(model)
    for _ in range(2):  # at the second call as well
        with pytest.raises(ValueError, match=message):
            record(tap, run)
    assert not any(layer.checked for layer in ksag.list_attention(model))


def test_linear_attention_is_refused():
    """As its processor when the model is wrapped, or one that is set afterwards."""
    model, layer = unet(SanaLinearAttnProcessor2_0())
    with pytest.raises(ValueError, match="is refused: linear attention has no softmax"):
        AttentionTap(model, check=False)
    run = functools.partial(diffusers_call, model, X)
    layer.set_processor(AttnProcessor())
    tap, unchecked = AttentionTap(model), AttentionTap(model, check=False)
    layer.set_processor(SanaLinearAttnProcessor2_0())
    record(unchecked, run)  # read without a word, although it takes no softmax
    with pytest.raises(ValueError, match="its processor, a SanaLinearAttnProcessor2_0"):
        record(tap, run)


READ_THROUGH_SDPA = {
    "a scale of its own": by_processor(OwnWay("scale", True)),
    "a mask of its own": by_processor(OwnWay("mask", True)),
    "a rotation of its own": by_processor(OwnWay("rotation", True)),
}


@pytest.mark.parametrize("name", READ_THROUGH_SDPA)
def test_what_a_processor_gives_to_sdpa_is_read_right(name):
    model, module, run = READ_THROUGH_SDPA[name]()
    applied = applied_saliency(module, run, 2)
    assert misread_in_silence(model, run, applied)
    tap = AttentionTap(model)
    for _ in range(2):
        assert is_right(record(tap, run), applied)
    assert checked(tap)


def test_what_a_layer_changes_in_place_and_then_attends_with_is_never_misread():
    """Such as a rotation that is applied to the projection's own output."""

    class ChangesInPlace(models.MemoryEfficientCrossAttention):
        def forward(self, x):
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
            k[:, ::2] *= -1
            return self.to_out(ComfyAttention.attend(q, k, v, self.heads))

    model = compvis_like(ChangesInPlace).unet
    run = functools.partial(model, PIXELS)
    applied = applied_saliency(model.get_submodule("middle_block.1.attn1"), run, 2)
    assert not misread_in_silence(model, run, applied)
    with pytest.raises(ValueError, match="rounding explains"):
        record(AttentionTap(model), run)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_scale_qk_false_is_read_as_the_processor_applies_it(processor):
    """AttnProcessor takes the layer's scale, 1; scaled_dot_product_attention its own."""
    model, old = unet()
    block = model.get_submodule(MID_ATTN1.removesuffix(".attn1"))
    block.attn1 = layer = Attention(32, heads=4, dim_head=8, scale_qk=False, processor=processor()).eval().requires_grad_(False)
    layer.load_state_dict(old.state_dict())
    run = functools.partial(diffusers_call, model, X)
    applied = applied_saliency(layer, run, 2)
    assert is_right(record(AttentionTap(model), run), applied)
    assert misread_in_silence(model, run, applied) == (processor is AttnProcessor2_0)


def test_replaced_parts_that_attend_as_usual_are_read_right():
    model, block = comfy(patches_replace=ComfyAttention.attend)
    run = functools.partial(model, PIXELS)
    tap = AttentionTap(model)
    assert is_right(record(tap, run), applied_saliency(block, run, 2)) and checked(tap)


def test_a_misread_layer_can_be_taken_as_it_is():
    model, layer = unet(OwnWay("scale"))
    guided = ksag.SAGDenoiser(Denoiser(model, diffusers_call), check_attention=False)
    with guided.trace() as steps:
        guided(X, torch.ones(2))
    applied = applied_saliency(layer, functools.partial(diffusers_call, model, X), 2)
    assert not is_right(steps[0].saliency.flatten(1).double(), applied)
    with pytest.raises(ValueError, match="or pass check_attention=False to take it as it is"):
        ksag.SAGDenoiser(Denoiser(model, diffusers_call))(X, torch.ones(2))


# How small a misreading is seen


def weakly_attending(size, dtype, what):
    """Logits of about `size`, and a processor that attends differently."""
    model, layer = unet(OwnWay(what) if what != "keys" else CrossFrameAttnProcessor(1))
    factor = math.sqrt(size / 3.2)  # the standard deviation of the logits after `peaked`
    layer.to_q.weight.data.mul_(factor)
    layer.to_k.weight.data.mul_(factor)
    model.to(dtype)
    return model, lambda: model(X.to(dtype), 500, (torch.ones(2, 7, 64) * 0.3).to(dtype))


NEARLY_UNIFORM = [(1e-2, torch.float32), (0.1, torch.float16), (0.5, torch.bfloat16)]
PEAKED = [(30.0, torch.float16)]  # far larger logits in half precision, and rounding explains all but anything


@pytest.mark.parametrize(
    ("what", "size", "dtype"),
    [
        *(("scale", *how) for how in NEARLY_UNIFORM),  # where it is peaked, another scale changes little
        *((what, *how) for what in ("rotation", "mask", "keys") for how in (*NEARLY_UNIFORM, *PEAKED)),
    ],
)
def test_a_misreading_is_seen_in_flat_and_in_peaked_attention(what, size, dtype):
    model, run = weakly_attending(size, dtype, what)
    record(AttentionTap(model, check=False), run)
    with pytest.raises(ValueError, match="rounding explains"):
        record(AttentionTap(model), run)


# What must never be refused


def in_dtype(layer, dtype):
    """The layer alone in another dtype, as mixed models have it: normalisations stay in float32."""

    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: cast(inside) for key, inside in value.items()}
        return tuple(map(cast, value)) if isinstance(value, tuple) else value

    layer.to(dtype)
    for module in layer.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.float()
    layer.register_forward_pre_hook(lambda _, args, kwargs: (cast(args), cast(kwargs)), with_kwargs=True, prepend=True)
    layer.register_forward_hook(lambda _, args, out: out.float())


HALF = [torch.float16, torch.bfloat16]
CAST = [name for name in CASES if name not in ("any other", "CompVis")]  # its float32 softmax needs autocast
AUTOCAST = [*CAST, "CompVis"]


@pytest.mark.parametrize(
    ("name", "how", "dtype"),
    [
        *((name, "cast", torch.float16) for name in CAST),
        *((name, "autocast", torch.bfloat16) for name in AUTOCAST),
        *(pytest.param(name, "cast", torch.bfloat16, marks=pytest.mark.slow) for name in CAST),
        *(pytest.param(name, "autocast", torch.float16, marks=pytest.mark.slow) for name in AUTOCAST),
    ],
)
def test_half_precision_is_never_refused(name, how, dtype, monkeypatch):
    monkeypatch.setenv("K_DIFFUSION_USE_COMPILE", "0")  # of its norms, which takes half a minute
    case = CASES[name]
    model = seeded(case.model)
    layer = model.get_submodule(case.path)
    x = torch.randn(2, case.channels, *case.sizes[0]) * 2
    if how == "cast":
        in_dtype(layer, dtype)
    for factor in 1.0, 16.0:  # the second time, the logits are 256 times as large
        peaked(layer, factor)
        tap = AttentionTap(model)
        with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
            for _ in range(2):  # the second one checks a part of the queries
                record(tap, functools.partial(case.call, model, x))
        assert checked(tap)
        tap.close()


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0, lambda: SlicedAttnProcessor(2)])
def test_a_whole_unet_in_half_precision(processor, upcast):
    model, _ = unet(processor(), upcast_attention=upcast)
    model.half()
    tap = AttentionTap(model)
    record(tap, lambda: model(X.half(), 500, (torch.ones(2, 7, 64) * 0.3).half()))
    assert checked(tap)


def read_right(model, layer, run, memory=0, attention="middle", rtol=1e-4):
    torch.manual_seed(7)
    applied = applied_saliency(layer, run, 2, memory)
    tap = AttentionTap(model, attention)
    for _ in range(2):
        torch.manual_seed(7)
        assert is_right(record(tap, run), applied, rtol)
    return checked(tap)


def test_sliced_attention_is_read_right():
    model, layer = unet(SlicedAttnProcessor(2))
    assert read_right(model, layer, functools.partial(diffusers_call, model, X))


def test_grouped_keys_are_read_right():
    model, _ = unet()
    block = model.get_submodule(MID_ATTN1.removesuffix(".attn1"))
    block.attn1 = seeded(lambda: Attention(32, heads=4, kv_heads=2, dim_head=8, processor=StableAudioAttnProcessor2_0()))
    peaked(block.attn1)
    assert block.attn1.to_k.out_features == 16
    assert read_right(model, block.attn1, functools.partial(diffusers_call, model, X))


def test_grouped_keys_of_sdpa_are_read_right():
    class Grouped(Unknown):
        """A substitute for an attention of no known family with fewer heads of keys than of queries."""

        def forward(self, x):
            q, k = self.project(x.flatten(2).mT).chunk(2, dim=-1)
            q, k = q.unflatten(-1, (4, -1)).transpose(1, 2), k[..., :16].unflatten(-1, (2, -1)).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
            return x + y.transpose(1, 2).flatten(2).mT.reshape(x.shape)

    model = seeded(lambda: Around("mine", Grouped(32)))
    model.mine.project.weight.data.mul_(4)
    read_right(model, model.mine, functools.partial(model, PIXELS), attention="mine")


# Dropout


def k_diffusion_dropout():
    """Its SelfAttention2d drops in eval mode too."""
    unet = K.models.ImageDenoiserModelV1(3, 32, [1, 1], [32, 128], [False, True], dropout_rate=0.3)
    return unet, "u_net.d_blocks.1.2", 0


def v1_transformer_dropout():
    return K.models.ImageTransformerDenoiserModelV1(3, 128, 128, 3, 3, (2, 2), dropout=0.3), "blocks.1.self_attn", 0


def lucidrains_dropout(flash=False):
    model = Unet(32, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2, flash_attn=flash)
    for module in model.modules():
        if hasattr(module, "attn_dropout"):
            module.dropout = module.attn_dropout.p = 0.3
    return model, "mid_attn", 4


WITH_DROPOUT = {
    "k-diffusion": k_diffusion_dropout,
    "k-diffusion transformer v1": v1_transformer_dropout,
    "lucidrains": lucidrains_dropout,
    "lucidrains, flash": functools.partial(lucidrains_dropout, True),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_is_never_refused(name, training, monkeypatch):
    monkeypatch.setenv("K_DIFFUSION_USE_COMPILE", "0")
    model, path, memory = WITH_DROPOUT[name]()
    models.randomise(model).train(training)
    layer = model.get_submodule(path)
    peaked(layer)
    x = torch.randn(2, 3, 16, 16)
    read_right(model, layer, lambda: model(x, torch.ones(2)), memory)


def test_dropout_that_is_not_at_work_excuses_nothing():
    model, _, _ = lucidrains_dropout()
    models.randomise(model)
    attend = model.mid_attn.attend
    attend.forward = lambda q, k, v: (q @ k.mT).softmax(dim=-1) @ v
    peaked(model.mid_attn)
    with pytest.raises(ValueError, match="a patch, option or replaced forward"):
        record(AttentionTap(model), lambda: model(torch.randn(2, 3, 16, 16), torch.ones(2)))


# Checkpoints


def test_gradient_checkpoints_of_diffusers_are_read_right():
    model, layer = unet()
    model.train().enable_gradient_checkpointing()
    x = X.clone().requires_grad_()
    assert read_right(model, layer, functools.partial(diffusers_call, model, x))
    guided = ksag.SAGDenoiser(Denoiser(model, diffusers_call))
    guided(x, torch.ones(2)).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_gradient_checkpoints_of_compvis_are_read_right():
    model = seeded(models.compvis_unet)
    for module in model.modules():
        if hasattr(module, "checkpoint"):
            module.checkpoint = True
    layer = model.get_submodule("middle_block.1.transformer_blocks.0.attn1")
    peaked(layer)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    assert read_right(model, layer, functools.partial(models.compvis_call, model, x))


# It is done again where the way of attending may have changed


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def ops(guided, x, **kwargs):
    """How many operations a guided call takes."""
    with CountOps() as counter:
        guided(x, torch.ones(x.shape[0]), **kwargs)
    return counter.count


COUNTED = ["k-diffusion", "CompVis", "diffusers", "EDM2", "lucidrains, flash", "guided-diffusion, new order"]
RECHECK = 80
"""The most operations that a check of a part of the queries may take: a few dozen, however deep the model."""


@pytest.mark.parametrize("name", COUNTED)
def test_it_costs_little_after_the_first_call(name):
    case = CASES[name]
    model = seeded(case.model)
    x = torch.randn(2, case.channels, *case.sizes[0])
    unchecked = ksag.SAGDenoiser(Denoiser(model, case.call), check_attention=False)
    steady = ops(unchecked, x)
    assert ops(unchecked, x) == steady
    unchecked.close()
    guided = ksag.SAGDenoiser(Denoiser(model, case.call))
    extra = [ops(guided, x) - steady for _ in range(9)]
    due = [call for call in range(2, 10) if checks.is_due(call)]
    assert due == [2, 4, 8] and extra[0] > 0
    assert [call for call in range(2, 10) if extra[call - 1]] == due
    assert all(0 < extra[call - 1] <= RECHECK for call in due)


def fuse(model):
    model.fuse_qkv_projections()


def load_lora(model):
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))


def set_processor(model):
    model.set_attn_processor(AttnProcessor())


@pytest.mark.parametrize("change", [fuse, load_lora, set_processor])
def test_it_is_done_again_after_a_change_that_is_read_right(change):
    model, layer = unet()
    guided = ksag.SAGDenoiser(Denoiser(model, diffusers_call))
    for _ in range(5):
        ops(guided, X)
    change(model)
    again, steady = (ops(guided, X) for _ in range(2))
    assert again > steady
    applied = applied_saliency(layer, functools.partial(diffusers_call, model, X), 2)
    with guided.trace() as steps:
        guided(X, torch.ones(2))
    assert is_right(steps[0].saliency.flatten(1).double(), applied)


class FusedOwnWay(FusedAttnProcessor2_0):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in attn.to_qkv(hidden_states).chunk(3, dim=-1))
        return attn.to_out[0](((q @ k.mT).softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


def to_own_way(model, layer, monkeypatch):
    layer.set_processor(OwnWay("scale"))


def to_fused_own_way(model, layer, monkeypatch):
    model.fuse_qkv_projections()
    layer.set_processor(FusedOwnWay())


def to_patched_class(model, layer, monkeypatch):
    usual = Attention.forward

    def forward(self, *args, **kwargs):
        return OwnWay("scale")(self, args[0]) if self is layer else usual(self, *args, **kwargs)

    monkeypatch.setattr(Attention, "forward", forward)


def to_patched_layer(model, layer, monkeypatch):
    layer.forward = lambda x, *args, **kwargs: OwnWay("scale")(layer, x)


@pytest.mark.parametrize("change", [to_own_way, to_fused_own_way, to_patched_class, to_patched_layer])
def test_a_layer_that_is_misread_after_a_change_is_refused(change, monkeypatch):
    model, layer = unet()
    guided = ksag.SAGDenoiser(Denoiser(model, diffusers_call))
    expected = guided(X, torch.ones(2))
    with monkeypatch.context() as patch:
        kept = layer.processor
        change(model, layer, patch)
        with pytest.raises(ValueError, match="applied another attention than its projections give"):
            guided(X, torch.ones(2))
        vars(layer).pop("forward", None)
        if change is to_fused_own_way:
            model.unfuse_qkv_projections()
        layer.set_processor(kept)
    assert torch.equal(guided(X, torch.ones(2)), expected)  # and read again once it attends as before


def test_a_processor_at_the_address_of_one_that_is_gone_is_checked():
    model, layer = unet()
    tap = AttentionTap(model)
    run = functools.partial(diffusers_call, model, X)
    for _ in range(20):
        right = OwnWay("nothing")
        layer.set_processor(right)
        record(tap, run)
        address = id(right)
        layer.set_processor(AttnProcessor2_0())
        del right
        misread = OwnWay("scale")
        layer.set_processor(misread)
        if id(misread) == address:
            break
    with pytest.raises(ValueError, match="its processor, a OwnWay"):
        record(tap, run)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_an_argument_that_appears_later_is_checked(processor):
    model, layer = unet(processor())
    tap = AttentionTap(model)
    plain, masked = functools.partial(diffusers_call, model, X), functools.partial(masked_call, model, X)
    before = record(tap, plain)
    if processor is AttnProcessor:
        with pytest.raises(ValueError, match="its argument attention_mask"):
            record(tap, masked)
    else:
        assert is_right(record(tap, masked), applied_saliency(layer, masked, 2))
    assert torch.equal(record(tap, plain), before)


def mask_by_position(block):
    block.args = (None, None, KEEP[0].bool())


def override(block):
    block.options = {"optimized_attention_override": other_temperature}


def replace_parts(block):
    block.options = {"patches_replace": keys_of_the_other_sample}


@pytest.mark.parametrize("change", [mask_by_position, override, replace_parts])
def test_an_option_that_appears_later_is_checked(change):
    model, block = comfy(cond_or_uncond=[1, 0])
    block.args = (None, None, None)
    tap = AttentionTap(model)
    run = functools.partial(model, PIXELS)
    record(tap, run)
    change(block)
    assert misread_in_silence(model, run, applied_saliency(block, run, 2))
    with pytest.raises(ValueError, match="applied another attention than its projections give"):
        record(tap, run)


def test_a_check_that_was_interrupted_is_done_at_the_next_call(monkeypatch):
    model, _ = unet(OwnWay("scale"))
    tap = AttentionTap(model)
    run = functools.partial(diffusers_call, model, X)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checker, "error", interrupted)
        record(tap, run)
    with pytest.raises(ValueError, match="its processor, a OwnWay"):
        record(tap, run)


# A processor that changes by an attribute of its own is found at a later check


WATCHED = {
    "reading": lambda: [ksag.SAG(attention=MID_ATTN1, blur_kernel_size=5)],
    "changing": lambda: [ksag.PAG(attention=MID_ATTN1)],
    "both": lambda: [ksag.SAG(attention=MID_ATTN1, blur_kernel_size=5), ksag.PAG(attention=MID_ATTN1)],
}


def watched(what, **options):
    processor = OwnWay("nothing")
    model, _ = unet(processor)
    return processor, ksag.GuidedDenoiser(Denoiser(model, diffusers_call), WATCHED[what](), **options)


@pytest.mark.parametrize("changes_at", [2, 3, 5, 9])
@pytest.mark.parametrize("what", WATCHED)
def test_a_change_that_shows_nowhere_is_found_at_the_next_check(what, changes_at):
    processor, guided = watched(what)
    found = next(call for call in range(changes_at, 100) if checks.is_due(call))
    right = max(call for call in range(1, changes_at) if checks.is_due(call))
    expected = guided(X, torch.ones(2))
    for call in range(2, found):
        processor.what = "scale" if call >= changes_at else "nothing"
        guided(X, torch.ones(2))
    processor.what = "scale"
    at = rf"found at guided call {found} of those that use this layer"
    message = rf"{at}; it was right at call {right}, so calls since then may be affected"
    with pytest.raises(ValueError, match=message):
        guided(X, torch.ones(2))
    with pytest.raises(ValueError, match="its processor, a OwnWay"):  # and at each call from then on
        guided(X, torch.ones(2))
    processor.what = "nothing"
    guided.reset()
    assert torch.equal(guided(X, torch.ones(2)), expected)


@pytest.mark.parametrize("what", WATCHED)
@pytest.mark.parametrize("begin", ["sigma", "reset", "run"])
def test_a_change_between_two_runs_is_found_at_the_first_call_of_the_second(what, begin):
    processor, guided = watched(what)
    for sigma in 2.0, 1.5, 1.2, 1.0, 0.8:
        guided(X, torch.full((2,), sigma))
    processor.what = "mask"
    if begin == "reset":
        guided.reset()
    next_run = guided.run() if begin == "run" else guided
    with pytest.raises(ValueError, match="found at guided call 6 of those that use this layer; it was right at call 4"):
        next_run(X, torch.full((2,), 2.0 if begin == "sigma" else 0.7))


def test_a_late_check_counts_guided_calls_however_many_passes_they_take():
    processor = OwnWay("nothing")
    denoiser, text = Denoiser(unet(processor)[0], lambda model, x, cond: model(x, 500, cond)), torch.ones(2, 7, 64)
    guided = ksag.GuidedDenoiser(denoiser, WATCHED["both"](), batch_cond=False)
    for _ in range(3):
        guided(X, torch.ones(2), cond=text, uncond=text * 0)
    processor.what = "scale"
    with pytest.raises(ValueError, match="found at guided call 4 of those that use this layer"):
        guided(X, torch.ones(2), cond=text, uncond=text * 0)


# It says that it was done


def test_the_repr_and_the_list_say_whether_it_was_done():
    model, _ = unet()
    guided = ksag.SAGDenoiser(Denoiser(model, diffusers_call))

    def listed():
        return {layer.path: layer.checked for layer in ksag.list_attention(model)}

    assert repr(guided).endswith("attention not checked yet)") and not any(listed().values())
    guided(X, torch.ones(2), sag_scale=0.0)
    assert repr(guided).endswith("attention not checked yet)")
    guided(X, torch.ones(2))
    assert repr(guided).endswith("attention checked)") and "attention checked" in guided._repr_html_()
    assert [path for path, checked in listed().items() if checked] == [MID_ATTN1]
    lines = repr(ksag.list_attention(model)).splitlines()
    assert [line.split()[0] for line in lines if line.endswith("yes")] == [MID_ATTN1]
    guided.close()
    assert repr(guided).endswith("attention closed)") and not any(listed().values())


def test_it_says_that_it_was_left_out():
    model, _ = unet()
    guided = ksag.SAGDenoiser(Denoiser(model, diffusers_call), check_attention=False)
    guided(X, torch.ones(2))
    assert repr(guided).endswith("attention not checked yet)") or repr(guided).endswith("attention not checked)")
    assert not any(layer.checked for layer in ksag.list_attention(model))


# Compiled, with models small enough to compile in a second


def comfy_denoiser(**options):
    model, block = comfy(**options)
    return Denoiser(model, lambda model, x: model(x)), block


def test_a_compiled_model_takes_its_first_recorded_pass_eagerly(fresh_dynamo):
    denoiser, _ = comfy_denoiser()
    guided = ksag.SAGDenoiser(denoiser)
    counter = CompileCounterWithBackend("eager")
    denoiser.unet = torch.compile(denoiser.unet, backend=counter)
    first = guided(PIXELS, torch.ones(2))
    assert repr(guided).endswith("attention checked)")
    assert counter.frame_count == 1  # the pass that is not recorded
    for _ in range(2):
        assert (guided(PIXELS, torch.ones(2)) - first).norm() / first.norm() < 1e-5
        assert counter.frame_count == 2


@pytest.mark.parametrize("in_place", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_misread_layer_is_refused_in_a_compiled_model(in_place, fresh_dynamo):
    denoiser, block = comfy_denoiser(optimized_attention_override=other_temperature)
    guided, unchecked = ksag.SAGDenoiser(denoiser), ksag.SAGDenoiser(denoiser, check_attention=False)
    if in_place:
        denoiser.unet.compile(backend="eager")
    else:
        denoiser.unet = torch.compile(denoiser.unet, backend="eager")
    unchecked(PIXELS, torch.ones(2))
    for _ in range(2):
        with pytest.raises(ValueError, match=PATCH):
            guided(PIXELS, torch.ones(2))
    block.options = {}  # and it is compiled as ever once it attends as usual
    guided(PIXELS, torch.ones(2))
    assert repr(guided).endswith("attention checked)")


def test_a_wrapper_that_is_compiled_whole_says_that_it_was_not_checked(fresh_dynamo):
    denoiser, _ = comfy_denoiser()
    guided = ksag.SAGDenoiser(denoiser)
    torch.compile(guided, backend="eager")(PIXELS, torch.ones(2))
    assert repr(guided).endswith("attention not checked yet)")
    first = guided(PIXELS, torch.ones(2))
    assert repr(guided).endswith("attention checked)")
    compiled = torch.compile(guided, backend="eager", fullgraph=True)(PIXELS, torch.ones(2))
    assert (compiled - first).norm() / first.norm() < 1e-5
    assert repr(guided).endswith("attention checked)")


# Tensors that say nothing


def test_tensors_without_data_are_not_checked_and_no_error():
    with FakeTensorMode():
        unet = K.models.ImageDenoiserModelV1(3, 32, [1, 1], [32, 128], [False, True]).eval().requires_grad_(False)
        guided = ksag.SAGDenoiser(K.layers.Denoiser(unet, 0.5))
        for _ in range(2):
            assert guided(torch.randn(2, 3, 16, 16), torch.ones(2)).shape == (2, 3, 16, 16)
    assert repr(guided).endswith("attention cannot be checked)")


def test_a_latent_with_a_nan_is_not_taken_for_a_misreading():
    denoiser = models.make_denoiser()
    guided = ksag.SAGDenoiser(denoiser)
    x = torch.randn(2, 3, 16, 16)
    x[:, 0, 0, 0] = torch.nan
    assert guided(x, torch.ones(2)).isnan().any()
    assert not repr(guided).endswith("attention checked)")
    guided(torch.randn(2, 3, 16, 16), torch.ones(2))
    assert repr(guided).endswith("attention checked)")
