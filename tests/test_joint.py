"""Is the attention of diffusers' transformers read, and changed, as they apply it? Against the tests' own computations.

Every class is the real one, tiny, with random weights; `tests/image_transformers.py` calls them as their pipelines do.
"""

import functools
import re
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from packaging import version
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import ksag
from ksag.adapters.diffusers.transformers import KINDS as PIPELINES
from ksag.attention.find import find_attention
from ksag.attention.tap import AttentionTap
from ksag.guidance.pag import identity
from ksag.guidance.seg import BlurredQueries
from tests.attending import Attending, Image, step
from tests.image_transformers import KINDS, REFUSED, TEXT, build, ids, inputs, packed, transformer


def grid_of(name):
    return tuple(side // 2 for side in KINDS[name].size)


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def image_of(name):
    return Image(KINDS[name].start, grid_of(name))


@pytest.mark.parametrize("name", KINDS)
def test_read_as_applied(name):
    model, (x, sigma, text) = build(name), inputs(name)
    assert find_attention(model, "middle")[0] == f"transformer.{KINDS[name].middle}"
    plain = model(x, sigma, text)
    tap = AttentionTap(model)
    with tap.recording(2) as seen:
        assert torch.equal(model(x, sigma, text), plain)
    with Attending(tap.layer) as own:
        model(x, sigma, text)
    expected = image_of(name).received(own.weights)
    torch.testing.assert_close(seen.saliency().double(), expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 0.01 and tap.checker.status == "checked"
    (shown,) = [layer for layer in ksag.list_attention(model) if layer.path == tap.path]
    assert shown.grid == grid_of(name) and shown.checked and shown.heads


@pytest.mark.parametrize("name", KINDS)
def test_the_tokens_are_where_the_image_is(name):
    """A patch of the latent that changes alone changes its own key alone, at a layer that no other token has reached yet."""
    model, (x, sigma, text) = build(name), inputs(name)
    keys = []

    def keep(attention):
        keys.append(attention.k[:, :, attention.of_image(attention.k.shape[2])])
        return identity(attention)

    tap = AttentionTap(model, KINDS[name].first or ksag.list_attention(model)[0].path)
    other = x.clone()
    other[:, :, 2:4, 6:8] += 1
    for latent in x, other:
        with tap.changing(0, 2, keep):
            model(latent, sigma, text)
    changed = (keys[1] - keys[0]).abs().amax(dim=(0, 1, 3)) > 1e-6
    if not KINDS[name].first:
        assert changed.nonzero().flatten().tolist() == [1 * grid_of(name)[1] + 3]
    else:  # where a refiner has told all of the image's tokens, but not the text's
        assert changed.all()


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_step(name):
    """SAG, PAG and SEG together against their formulas, in float64 where the class can."""
    dtype = KINDS[name].widest
    model, (x, sigma, text) = build(name).to(dtype), (t.to(dtype) for t in inputs(name))
    other = text.flip(1) * 0.3
    directions = [ksag.SAG(0.7, 1.5, blur_kernel_size=5), ksag.PAG(1.3), ksag.SEG(0.9)]
    guided = ksag.GuidedDenoiser(model, directions)
    result = guided(x, sigma, cond=text, uncond=other, cond_scale=3.0)
    layer = model.get_submodule(find_attention(model, "middle")[0])
    u, g, parts, *_ = step(lambda x, text: model(x, sigma, text), layer, image_of(name), x, text, other, 1.5, 5)
    expected = u + (g - u) * 3 + sum(scale * part for scale, part in zip((0.7, 1.3, 0.9), parts, strict=True))
    assert relative(result, expected) < (1e-9 if dtype == torch.float64 else 1e-5)
    for part in parts:
        assert part.norm() / u.norm() > 1e-5


# Processors of the tests' own, in place of diffusers'


def rotated(x, angles):
    """(b, tokens, heads, d) with pairs of channels turned by angles (tokens, d / 2)."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (t[..., None, :].float() for t in angles)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


def of_flux(rotary):
    return [t[:, ::2] for t in rotary]


def of_complex(rotary):
    return rotary.real, rotary.imag


class Own:
    """Softmax(q kᵀ) over both sequences, and nothing of diffusers'.

    Args:
        text_first: their order in attention.
        angles: the model's rotary embedding → the cosines and sines.
    """

    _attention_backend = _parallel_config = None

    def __init__(self, text_first, angles=None):
        self.text_first, self.angles, self.weights = text_first, angles, None

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, freqs_cis=None,
        encoder_hidden_states_mask=None, **kwargs,
    ):  # fmt: skip
        is_joint = getattr(attn, "add_q_proj", None) is not None
        image = [attn.to_q, attn.to_k, attn.to_v], [attn.norm_q, attn.norm_k, None], hidden_states
        sequences = [image]
        if is_joint:
            names = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            parts = [[getattr(attn, name, None) for name in of_kind] for of_kind in names]
            sequences = [(parts[0], [*parts[1], None], encoder_hidden_states), image]
        rotary = freqs_cis if image_rotary_emb is None else image_rotary_emb
        split = []
        for i, (projections, norms, x) in enumerate(sequences):
            qkv = [to(x).unflatten(-1, (-1, to_head(attn))) for to in projections]
            qkv = [t if norm is None else norm(t) for t, norm in zip(qkv, norms, strict=True)]
            if isinstance(rotary, tuple) and rotary[0].is_complex():  # Qwen-Image: the image's and the text's
                qkv[:2] = (rotated(t, self.angles(rotary[1 - i])) for t in qkv[:2])
            split.append(qkv)
        order = split if self.text_first else split[::-1]
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*order, strict=True))
        if rotary is not None and not (isinstance(rotary, tuple) and rotary[0].is_complex()):
            q, k = (rotated(t, self.angles(rotary)) for t in (q, k))
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        if encoder_hidden_states_mask is not None:
            logits[..., : encoder_hidden_states_mask.shape[1]].masked_fill_(~encoder_hidden_states_mask[:, None, None], -torch.inf)
        if attention_mask is not None and attention_mask.ndim == 4:  # as diffusers 0.38 has it for Qwen-Image
            logits = logits.masked_fill(~attention_mask, -torch.inf)
        self.weights = logits.softmax(-1)
        output = torch.einsum("bhqk,bkhd->bqhd", self.weights, v).flatten(2)
        if not is_joint:
            return attn.to_out[0](output) if hasattr(attn, "to_out") else output
        n = encoder_hidden_states.shape[1]
        text, image = (output[:, :n], output[:, n:]) if self.text_first else (output[:, -n:], output[:, :-n])
        text = text if getattr(attn, "context_pre_only", False) else attn.to_add_out(text)
        return attn.to_out[0](image), text


def to_head(attn):
    return attn.to_q.out_features // attn.heads


@pytest.mark.parametrize(
    ("name", "own", "layer"),
    [
        ("SD3Transformer2DModel", Own(False), "middle"),
        ("AuraFlowTransformer2DModel", Own(True), "middle"),
        ("AuraFlowTransformer2DModel", Own(True), "joint_transformer_blocks.0.attn"),
        ("FluxTransformer2DModel", Own(True, of_flux), "middle"),
        ("FluxTransformer2DModel", Own(True, of_flux), "single_transformer_blocks.0.attn"),
        ("ChromaTransformer2DModel", Own(True, of_flux), "middle"),
        ("QwenImageTransformer2DModel", Own(True, of_complex), "middle"),
        ("Lumina2Transformer2DModel", Own(True, of_complex), "middle"),
        ("ZImageTransformer2DModel", Own(False, of_complex), "middle"),
    ],
)
def test_against_a_processor_of_its_own(name, own, layer):
    model, (x, sigma, text) = build(name), inputs(name)
    tap = AttentionTap(model, layer)
    with tap.recording(2) as seen:
        expected = model(x, sigma, text)
    tap.layer.set_processor(own)
    assert relative(model(x, sigma, text), expected) < 1e-5
    torch.testing.assert_close(seen.saliency(), image_of(name).received(own.weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_offloaded_weights(name):
    """Read by hooks and at the call: accelerate loads each module's weights as it runs."""
    model, (x, sigma, text) = build(name), inputs(name, batch=1)
    expected = ksag.GuidedDenoiser(model, [ksag.SAG(), ksag.PAG()])(x, sigma, cond=text)
    cpu_offload(model.transformer, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    guided = ksag.GuidedDenoiser(model, [ksag.SAG(), ksag.PAG()])
    assert relative(guided(x, sigma, cond=text), expected) < 1e-6
    assert "attention checked" in repr(guided)


# Text of several lengths, other backends, and what is refused


def ragged(m, x, t, text, lengths=(7, 4, 2, 5)):
    mask = torch.arange(text.shape[1]) < torch.tensor(lengths[: len(x)])[:, None]
    return m(x, 1 - t, text, mask.long(), return_dict=False)


def test_texts_of_several_lengths_in_a_batch():
    """Lumina 2 puts the image where each sample's text ends."""
    name = "Lumina2Transformer2DModel"
    x, sigma, text = inputs(name, batch=4)
    model = build(name)
    model.call = ragged
    together = model(x, sigma, text)
    tap = AttentionTap(model)
    with tap.recording(4) as seen:
        assert torch.equal(model(x, sigma, text), together)
    with tap.changing(1, 4, BlurredQueries()):
        changed = model(x, sigma, text)
    assert relative(changed[:1], together[:1]) < 1e-6 < 1e-3 < relative(changed[1:], together[1:])
    for i, n in enumerate((7, 4, 2, 5)):
        model.call = functools.partial(ragged, lengths=(n,))
        one = slice(i, i + 1)
        with tap.recording(1) as alone:
            model(x[one], sigma[one], text[one, :n])
        torch.testing.assert_close(seen.saliency()[one], alone.saliency(), rtol=1e-5, atol=1e-6)
        if i:
            with tap.changing(0, 1, BlurredQueries()):
                assert relative(changed[one], model(x[one], sigma[one], text[one, :n])) < 1e-5


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_a_backend_of_pytorch_is_read_and_another_is_refused_by_name(name):
    model, (x, sigma, text) = build(name), inputs(name)
    guided = ksag.GuidedDenoiser(model, [ksag.SAG(), ksag.PAG()])
    expected = guided(x, sigma, cond=text)
    model.transformer.set_attention_backend("_native_math")
    assert relative(guided(x, sigma, cond=text), expected) < 1e-5
    try:
        model.transformer.set_attention_backend("flex")
        with pytest.raises(ValueError, match="diffusers' attention backend is 'flex'; set one of PyTorch's"):
            guided(x, sigma, cond=text)
    finally:
        model.transformer.set_attention_backend("native")  # it is set for all models
    assert relative(guided(x, sigma, cond=text), expected) < 1e-5


@pytest.mark.parametrize("layer", ["transformer_blocks.1.attn", "single_transformer_blocks.0.attn"])
def test_tokens_of_a_reference_image_are_refused(layer):
    """As in Flux Kontext, they would pass for the latent's."""
    model, (x, sigma, text) = build("FluxTransformer2DModel"), inputs("FluxTransformer2DModel")

    def call(m, tokens, t, text, h, w):
        return m(
            torch.cat([tokens, tokens.flip(0)], dim=1), encoder_hidden_states=text, pooled_projections=text.mean(1), timestep=t,
            img_ids=ids(h, w).repeat(2, 1), txt_ids=torch.zeros(TEXT, 3), return_dict=False,
        )[0][None, :, : h * w]  # fmt: skip

    model.call = packed(call)
    guided = ksag.SAGDenoiser(model, attention=layer)
    with pytest.raises(ValueError, match=r"was given 48 image tokens, which cannot be the patches of a latent of \(8, 12\)"):
        guided(x, sigma, cond=text)


def test_patches_of_an_unknown_size_are_refused():
    model, (x, sigma, text) = build("ZImageTransformer2DModel"), inputs("ZImageTransformer2DModel")
    model.patch_size = None
    with pytest.raises(ValueError, match="nothing around it says how large the image's patches are"):
        ksag.SAGDenoiser(model)(x, sigma, cond=text)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    options, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        ksag.SAGDenoiser(transformer(name, **options))


def test_every_image_transformer_of_diffusers_is_in_one_of_the_tables():
    if version.parse(diffusers.__version__) >= version.parse("0.43"):
        pytest.skip("a later diffusers may have more")
    names = {name for name in dir(diffusers) if name.endswith(("Transformer2DModel", "DiT2DModel"))}
    assert names - {*KINDS, *REFUSED} <= {"Transformer2DModel", "DreamLiteTransformer2DModel"}  # parts of UNets


# torch.compile and CUDA graphs


def sag_and_pag(model):
    """Both in one pass."""
    return ksag.GuidedDenoiser(model, [ksag.SAG(1.0, blur_kernel_size=3, one_pass=True), ksag.PAG(1.0)])


WHOLE = ("SD3Transformer2DModel", "FluxTransformer2DModel", "ZImageTransformer2DModel", "Lumina2Transformer2DModel")
"""Read by hooks, at the call with the text first, with the image first, and with texts of several lengths. Of the others, only the
layer is compiled, which takes less time.
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_compiled(name):
    """In one graph, if the bare model can be."""
    model, (x, sigma, text) = build(name), inputs(name, batch=1)
    guided, breaks = sag_and_pag(model), KINDS[name].breaks if name in WHOLE else ""
    expected = [guided(x, sigma * share, cond=text) for share in (1.0, 0.9)]
    guided.reset()
    torch._dynamo.reset()
    compiled = "transformer" if name in WHOLE else f"transformer.{KINDS[name].middle}"
    model.get_submodule(compiled).compile(backend="eager", fullgraph=not breaks)
    for before, share in zip(expected, (1.0, 0.9), strict=True):
        try:
            assert relative(guided(x, sigma * share, cond=text), before) < 1e-5
        except RuntimeError as error:  # a layer in a frame that the bare model breaks may not be readable: an error, no wrong image
            assert breaks and "ran for 0 of" in str(error)
            return


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_read_on_the_host(name):
    """Nothing, if CUDA graphs are to capture it. Fake tensors have no values that could be read."""
    model = build(name)
    guided = ksag.GuidedDenoiser(model, sag_and_pag(model).directions, check_attention=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, sigma, text = (mode.from_tensor(t) for t in inputs(name, batch=1))
        if KINDS[name].reads:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                model(x, sigma, text)
        else:
            denoiser = guided if name in WHOLE else model
            assert denoiser(x, sigma, cond=text).shape == x.shape


# The page


def row(name):
    """Of the page's table, by what the tests above find."""
    if name in REFUSED:
        return f"| `{name}` | no: {REFUSED[name][1]} | | | |"
    compiled, captured = ("no: " + why if why else "yes" for why in (KINDS[name].breaks, KINDS[name].reads))
    return f"| `{name}` | yes | {compiled} | {captured} | {'yes' if name in PIPELINES else 'no'} |"


def test_the_page_says_for_every_image_transformer_what_works():
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    shown = re.findall(r"^\| `\w+Transformer[23]DModel` .*$|^\| `\w+DiT2DModel` .*$", page, re.M)
    assert shown == [row(name) for name in sorted({*KINDS, *REFUSED})]
