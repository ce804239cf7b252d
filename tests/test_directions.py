"""PAG, SEG and a user's own directions: which rows change and how, guided steps and runs against formulas, and the model calls."""

import functools
import math
import re
from pathlib import Path

import k_diffusion as K
import pytest
import torch
from torch import nn

import ksag
from ksag.attention.tap import AttentionTap
from ksag.guidance.pag import identity
from ksag.guidance.seg import BlurredQueries
from tests import campaign, reference
from tests.forms import BLOCK, FORMS, LAYERS, Tiny, latents, plain, relative, run, sag, tiny, wrap
from tests.models import CASES, Around, EDMBlock, hooks, randomise, seeded
from tests.own_directions import PerturbTokens, SkipBlock

# What each row attends to, in every family

HOWS = {
    "PAG": ("identity", identity),
    "SEG": (math.inf, BlurredQueries()),
    "SEG, blurred": (0.8, BlurredQueries(0.8)),
    "SEG, blurred over more than the grid": (3.0, BlurredQueries(3.0)),
}


def peaked(layer, factor=4.0):
    """With random weights a layer attends everywhere alike. Larger queries and keys make it choose."""
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] in ("to_q", "to_k", "to_qkv", "qkv", "attn_qkv", "qkv_proj"):
            module.weight.data.mul_(factor)


def outputs(model, layer, call):
    """What the layer and the whole model return."""
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    whole = call()
    handle.remove()
    [of_layer] = seen
    return of_layer, whole if isinstance(whole, torch.Tensor) else whole.sample


@pytest.mark.parametrize("name", CASES)
def test_edited_rows_follow_the_formula_and_the_others_are_bit_for_bit_what_they_were(name):
    case = CASES[name]
    model, size = seeded(case.model), case.sizes[-1]
    layer, x = model.get_submodule(case.path), torch.randn(4, case.channels, *size)
    peaked(layer)
    call = functools.partial(outputs, model, layer, functools.partial(case.call, model, x))
    before = call()
    tap = AttentionTap(model, case.attention)
    for name, (how, formula) in HOWS.items():
        with tap.changing(1, 3, formula):
            changed = call()
        with reference.Perturbed([layer], how, tuple(side // case.factor for side in size)):
            expected = call()
        for usual, got, want in zip(before, changed, expected, strict=True):
            assert torch.equal(got[0], usual[0]) and torch.equal(got[3], usual[3]), name
            assert relative(got[1:3], want[1:3]) < 1e-5, name
            assert relative(usual[1:3], want[1:3]) > 1e-4, name
    tap.close()
    assert all(map(torch.equal, call(), before))


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_the_same_rows_are_changed_however_the_model_splits_its_batch(pieces):
    model, x, sigma = tiny(), torch.randn(6, 3, 6, 8), torch.ones(6)
    tap = AttentionTap(model, LAYERS[0])
    with tap.changing(1, 4, identity):
        whole = model(x, sigma)
    with tap.changing(1, 4, identity):
        in_pieces = torch.cat([model(*piece) for piece in zip(x.chunk(pieces), sigma.chunk(pieces), strict=True)])
    torch.testing.assert_close(in_pieces, whole, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole[1:4], model(x, sigma)[1:4], atol=1e-3)


class LeavesOut(Tiny):
    """A model that does not run its layers."""

    def forward(self, x, sigma, cond=None):
        return x


def test_a_layer_that_does_not_run_for_every_row_is_an_error():
    model = tiny()
    with pytest.raises(RuntimeError, match="ran for 2 of 3 samples"), AttentionTap(model, LAYERS[0]).changing(1, 3, identity):
        model(torch.randn(2, 3, 6, 8), torch.ones(2))
    for direction in SkipBlock(0.5, BLOCK), ksag.PAG(attention=LAYERS[0]):
        with pytest.raises(RuntimeError, match="ran for 0 of 4 samples"):
            ksag.GuidedDenoiser(LeavesOut(), direction)(torch.randn(2, 3, 6, 8), torch.ones(2))


# Whole guided steps in float64, by the formulas, with the model's own code


def edm():
    model = campaign.Model(lambda: Around("dec.8x8_in0", EDMBlock(32, 2), "emb"), lambda m, x, s, c: m(x), None)
    torch.manual_seed(0)
    return K.layers.Denoiser(campaign.Adapter(randomise(model.build()), model), sigma_data=0.5).double().eval()


STEPS = ["k-diffusion", "k-diffusion transformer v1", "OpenAI, legacy order", "OpenAI, new order", "diffusers, DiT", "EDM"]


@pytest.mark.parametrize("name", STEPS)
def test_a_guided_step_is_what_the_formulas_give(name):
    if name == "EDM":
        denoiser, kind = edm(), campaign.Model(edm, None, None)
        exact, layers, size = denoiser, ["inner_model.unet.dec.8x8_in0"] * 2, (8, 12)
    else:
        kind, (denoiser, exact), layers = campaign.MODELS[name], campaign.denoisers(name, torch.float64), campaign.layers(name)
        size = (kind.size,) * 2 if kind.size else (8, 12)
    sigma = torch.tensor([0.5, 4.0]).double()
    x = torch.randn(2, kind.channels, *size).double() * 2
    cond, uncond = torch.tensor([1, 2]), torch.tensor([9, 9])
    if kind.cond != ():
        cond, uncond = torch.randn(2, 2, *(kind.cond or (kind.channels,))).double()
    args = {"nesting": "tensor"}
    with torch.no_grad():
        u, g = (exact(x, sigma, cond=c, **args) for c in (uncond, cond))
        with campaign.watched(exact, layers) as received:
            exact(x, sigma, cond=uncond, **args)
        saliency = campaign.as_map(received[layers[0]], size)
        mask = reference.upsampled((saliency > 1).double(), size)
        d = mask * reference.blurred(u, 1.5, 5) + (1 - mask) * u
        r = exact(d + (x - u), sigma, cond=uncond, **args)
        perturbed = []
        for path, how in (layers[0], "identity"), (layers[-1], math.inf), (layers[0], 0.8):
            layer = exact.get_submodule(path)
            grid = campaign.as_map(received[path], size).shape[1:]
            with reference.Perturbed([layer], how, grid):
                perturbed.append(exact(x, sigma, cond=cond, **args))
    parts = [d - r, *(g - p for p in perturbed)]
    scales = [0.8, 0.7, 1.5, -0.4]
    expected = u + (g - u) * 3 + sum(scale * part for scale, part in zip(scales, parts, strict=True))
    directions = [
        ksag.SAG(0.8, 1.5, blur_kernel_size=5, attention=layers[0]),
        ksag.PAG(0.7, layers[0]),
        ksag.SEG(1.5, attention=layers[-1]),
        ksag.SEG(-0.4, 0.8, layers[0]),
    ]
    with ksag.GuidedDenoiser(denoiser, directions) as guided, guided.trace() as steps, torch.no_grad():
        result = guided(x, sigma, cond=cond, uncond=uncond, cond_scale=3.0, **args)
    tolerance = 1e-5 if kind.attends_in_float32 else 1e-11
    assert relative(result, expected) < tolerance
    for step, part in zip(steps, parts, strict=True):
        assert relative(step.direction, part) < tolerance * 100 and part.norm() > 1e-4 * u.norm()


# Runs of every form, against the formulas


@pytest.mark.parametrize("form", FORMS)
def test_a_run_is_what_the_formulas_give(form):
    model = tiny().double()
    result = run(wrap(form, model), dtype=torch.float64)
    expected = run(Reference(model, FORMS[form]()), dtype=torch.float64)
    assert relative(result, expected) < 1e-12
    assert relative(plain(wrap(form, model), dtype=torch.float64), expected) > 1e-2


@pytest.mark.parametrize("size", [(16,), (3, 6, 5)])
@pytest.mark.parametrize("form", FORMS)
def test_a_run_with_latents_of_one_or_three_dimensions(form, size):
    model = tiny(dims=len(size)).double()
    result = run(wrap(form, model), dtype=torch.float64, size=size)
    expected = run(Reference(model, FORMS[form]()), dtype=torch.float64, size=size)
    assert relative(result, expected) < 1e-12
    assert relative(plain(wrap(form, model), dtype=torch.float64, size=size), expected) > 1e-2


@pytest.mark.parametrize("blur_time", [False, True])
def test_a_video_is_blurred_in_time_if_that_is_wanted(blur_time):
    model, size = tiny(dims=3).double(), (4, 6, 5)
    result = run(ksag.GuidedDenoiser(model, sag(blur_time=blur_time)), dtype=torch.float64, size=size)
    expected = run(Reference(model, [sag(blur_time=blur_time)]), dtype=torch.float64, size=size)
    other = run(Reference(model, [sag(blur_time=not blur_time)]), dtype=torch.float64, size=size)
    assert relative(result, expected) < 1e-12 and relative(other, expected) > 1e-3


class Reference:
    """The forms on `Tiny` once more, one sample after another, in float64."""

    def __init__(self, model, directions):
        self.model, self.directions = model, directions
        self.kept = {}

    def __call__(self, x, sigma, cond, uncond, cond_scale):
        rows = [self.one(i, x[i : i + 1], sigma[i : i + 1], cond[i : i + 1], uncond[i : i + 1], cond_scale) for i in range(len(x))]
        return torch.cat(rows)

    def one(self, i, x, sigma, cond, uncond, cond_scale):
        def D(x, c=cond, **perturbed):
            return self.model(x, sigma, c)

        u, attention = reference.applied_attention(lambda: D(x, uncond), LAYERS.index(LAYERS[0]))
        saliency = reference.saliency_of(attention, x.shape[2:])
        g = D(x)
        result = u + (g - u) * cond_scale
        for number, direction in enumerate(self.directions):
            low, high = direction.sigma_range
            if not low <= sigma <= high:
                self.kept.pop((i, number), None)
                continue
            before = self.kept.get((i, number))
            if before is None or sigma > 1.5 * before["sigma"]:
                before = {"n": -1, "sigma": sigma, "value": torch.zeros_like(x), "delta": torch.zeros_like(x)}
            n, one_pass = before["n"] + 1, getattr(direction, "one_pass", False)
            now = {"n": n, "sigma": sigma, "value": before["value"] * sigma / before["sigma"], "delta": before["delta"]}
            due = (n - one_pass) % direction.every == 0
            if isinstance(direction, ksag.SAG):
                mask = (saliency > direction.mask_threshold).double()[:, None]
                blur_sigma = direction.blur_sigma if x.ndim < 5 or direction.blur_time else (0, *[direction.blur_sigma] * 2)
                d = mask * reference.blurred(u, blur_sigma, direction.blur_kernel_size) + (1 - mask) * u
                now["delta"] = u - d
                if one_pass and due:
                    delta = before["delta"]
                    common = ((delta * (u - d)).sum() / (delta**2).sum()).clamp(0, 1) if delta.any() else 0
                    now["value"] = (u - delta - D(x - delta, uncond)) * common
                elif due:
                    now["value"] = d - D(d + x - u, uncond)
            elif due:
                now["value"] = g - self.perturbed(direction, x, sigma, cond)
            self.kept[i, number] = now
            result = result + direction.scale * now["value"]
        return result

    def perturbed(self, direction, x, sigma, cond):
        modules = [self.model.get_submodule(path) for path in direction.layers]
        if isinstance(direction, SkipBlock):
            handle = self.model.get_submodule(BLOCK).register_forward_hook(lambda module, args, output: args[0])
        elif isinstance(direction, PerturbTokens):
            handle = modules[0].to_v.register_forward_hook(lambda module, args, output: output.roll(1, 1))
            with reference.Perturbed(modules, "identity", x.shape[2:]):
                p = self.model(x, sigma, cond)
            handle.remove()
            return p
        else:
            how = "identity" if isinstance(direction, ksag.PAG) else direction.blur_sigma
            with reference.Perturbed(modules, how, x.shape[2:]):
                return self.model(x, sigma, cond)
        p = self.model(x, sigma, cond)
        handle.remove()
        return p


# What the model is asked


class Count(nn.Module):
    """The tiny model, and the batch of every call that reached it."""

    def __init__(self):
        super().__init__()
        self.inner_model, self.batches = tiny(), []

    def forward(self, x, sigma, cond=None):
        self.batches.append(x.shape[0])
        return self.inner_model(x, sigma, cond if cond is None or cond.ndim == 2 else cond.mean(1))


ROWS = {
    "SAG": [[4, 2]] * 4,
    "SAG in one pass": [[6]] * 4,
    "SAG, every 2nd call": [[4, 2], [4], [4, 2], [4]],
    "PAG": [[6]] * 4,
    "PAG on two layers": [[6]] * 4,
    "SEG": [[6]] * 4,
    "SEG, blurred": [[6]] * 4,
    "SAG and PAG": [[6, 2]] * 4,
    "SAG in one pass, PAG and SEG": [[10]] * 4,
    "a user's own": [[8]] * 4,
}


@pytest.mark.parametrize("form", FORMS)
def test_all_that_can_be_asked_in_advance_is_one_batch(form):
    count = Count()
    with ksag.GuidedDenoiser(count, FORMS[form]()) as guided:
        together = run(guided)
    assert count.batches == [batch for call in ROWS[form] for batch in call]
    count.batches.clear()
    with ksag.GuidedDenoiser(count, FORMS[form](), batch_cond=False) as guided:
        apart = run(guided)
    assert count.batches == [2] * (sum(sum(call) for call in ROWS[form]) // 2)
    assert relative(apart, together) < 1e-5


def test_conditionings_of_two_lengths_are_two_batches():
    """[u, x − δ'] and [g, p, p]."""
    count = Count()
    x, args = latents()
    args = {**args, "cond": args["cond"][:, None].expand(-1, 3, -1), "uncond": args["uncond"][:, None]}
    directions = FORMS["SAG in one pass, PAG and SEG"]
    with ksag.GuidedDenoiser(count, directions()) as guided:
        result = guided(x, torch.full((2,), 3.0), **args)
    assert count.batches == [4, 6]
    with ksag.GuidedDenoiser(tiny(), directions()) as guided:
        expected = guided(x, torch.full((2,), 3.0), **{**args, "cond": args["cond"][:, 0], "uncond": args["uncond"][:, 0]})
    assert relative(result, expected) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_scale_zero_is_plain_guidance_bit_for_bit_at_its_cost(form):
    count = Count()
    zero = {word: 0.0 for direction in FORMS[form]() for word, name in direction.keywords.items() if name == "scale"}
    with ksag.GuidedDenoiser(count, FORMS[form]()) as guided:
        expected = plain(guided)
        count.batches.clear()
        assert torch.equal(run(guided, **zero), expected)
        assert count.batches == [4] * 4
        for direction in guided.directions:
            direction.scale = 0.0
        assert torch.equal(run(guided), expected)
        for direction in guided.directions:
            direction.scale, direction.sigma_range = 1.0, (5.0, math.inf)
        assert torch.equal(run(guided), expected)
    assert count.batches == [4] * 12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", ["cond", "nothing"])
def test_one_prediction_is_both_u_and_g(form, given):
    """Which is guidance for a model without a conditioning, or for a prompt alone."""
    x, args = latents()
    args = {"cond": args["cond"]} if given == "cond" else {}
    guided, both = wrap(form), wrap(form)
    for sigma in 4.0, 3.0, 2.5:
        result = guided(x, torch.full((2,), sigma), **args)
        cond = args.get("cond")
        if cond is not None:
            twice = both(x, torch.full((2,), sigma), cond=cond, uncond=cond, cond_scale=3.0)
            assert relative(result, twice) < 1e-5
        without = guided.inner_model(x, torch.full((2,), sigma), cond)
    assert relative(result, without) > 1e-3


# Settings


@pytest.mark.parametrize("form", FORMS)
def test_a_strength_for_each_sample(form):
    def at(*scales):
        with wrap(form) as guided:
            for direction in guided.directions:
                direction.scale = torch.tensor(scales) if len(scales) > 1 else scales[0]
            return run(guided)

    both = at(0.25, 1.5)
    assert relative(both[:, 0], at(0.25)[:, 0]) < 1e-5 and relative(both[:, 1], at(1.5)[:, 1]) < 1e-5
    with pytest.raises(ValueError, match=r"_scale must be a number, or a tensor with one for each of the 2 samples"):
        at(1.0, 2.0, 3.0)


def test_settings_of_a_call_are_those_of_the_direction_they_name():
    with ksag.GuidedDenoiser(tiny(), [sag(), ksag.PAG(0.7, LAYERS[0]), ksag.SEG(0.9, attention=LAYERS[1])]) as guided:
        usual = run(guided)
        changed = run(guided, sag_scale=0.2, pag_scale=0.1, seg_scale=-0.5, blur_sigma=1.0, mask_threshold=0.9)
        assert torch.equal(run(guided), usual)
        first, second, third = guided.directions
        first.scale, first.blur_sigma, first.mask_threshold, second.scale, third.scale = 0.2, 1.0, 0.9, 0.1, -0.5
        assert torch.equal(run(guided), changed) and not torch.equal(changed, usual)
        assert math.isinf(third.blur_sigma)
        with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
            run(guided, pag_scale=math.nan)
        with pytest.raises(ValueError, match=r"blur_sigma is a standard deviation in tokens, .* got -1"):
            third.blur_sigma = -1
        with pytest.raises(AttributeError):
            first.attention = LAYERS[1]
        with pytest.raises(AttributeError, match="directions is chosen when a GuidedDenoiser is made: make a new one"):
            guided.directions = []


def test_a_keyword_may_replace_a_plain_attribute_of_a_users_direction():
    class Power(ksag.Direction):
        keywords = {"power": "power"}  # noqa: RUF012
        power = 1.0

        def direction(self, call, answers):
            return call.u * call.options["power"]

    (x, args), sigma = latents(), torch.full((2,), 3.0)
    with ksag.GuidedDenoiser(tiny(), Power()) as guided:
        once, thrice = guided(x, sigma, **args), guided(x, sigma, power=3.0, **args)
        u = tiny()(x, sigma, args["uncond"])
    assert torch.allclose(thrice - once, 2 * u, atol=1e-5)


def test_a_keyword_of_no_direction_goes_to_the_model():
    with wrap("PAG") as guided, pytest.raises(TypeError, match="unexpected keyword argument 'sag_scale'"):
        run(guided, sag_scale=0.5)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (ksag.PAG, r"directions are objects such as ksag.SAG\(0.5\) or ksag.PAG\(\), in a list, got .*: call it, PAG\(\)"),
        ([ksag.PAG(attention=LAYERS), 3], "in a list, got the int 3"),
        (None, "in a list, got None"),
    ],
)
def test_what_is_no_direction_is_a_clear_error(directions, message):
    with pytest.raises(TypeError, match=message):
        ksag.GuidedDenoiser(tiny(), directions)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (SkipBlock(1.0, "middle_block.7"), "modules= names 'middle_block.7', which does not exist in Tiny. Give the whole path"),
        (SkipBlock(1.0, "attn1"), r"which could be any of middle_block.0.attn1, middle_block.1.attn1 in Tiny"),
        (ksag.PAG(attention=[LAYERS[0], "nowhere"]), "attention='nowhere' does not exist in Tiny"),
    ],
)
def test_a_layer_that_is_not_there_is_a_clear_error_and_leaves_no_hook(direction, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        ksag.GuidedDenoiser(model, [ksag.PAG(attention=LAYERS), direction])
    assert hooks(model) == 0


@pytest.mark.parametrize("returned", [None, 0.5, torch.zeros(2, 3, 1, 1)])
def test_a_direction_that_returns_no_latent_is_a_clear_error(returned):
    class Wrong(PerturbTokens):
        def direction(self, call, answers):
            return returned

    with pytest.raises(TypeError, match=r"tokens.direction must return a tensor of shape \(2, 3, 6, 8\), as u has, got"):
        run(ksag.GuidedDenoiser(tiny(), Wrong(1.0, LAYERS[0])))


def test_a_direction_without_the_layers_or_modules_that_it_changes_is_a_clear_error():
    class SkipNothing(SkipBlock):
        __init__ = ksag.Direction.__init__

    for direction, setting in (PerturbTokens(0.6), "attention"), (SkipNothing(0.6), "modules"):
        with ksag.GuidedDenoiser(tiny(), direction) as guided, pytest.raises(ValueError, match=f"give it {setting}="):
            run(guided)


def test_the_documents_have_the_direction_of_these_tests():
    root = Path(__file__).parents[1]
    [quoted] = re.findall(
        r"# region: docs/directions.md\n+(.*?)\n+# endregion", (root / "tests/own_directions.py").read_text(), re.S
    )
    assert quoted in (root / "docs/directions.md").read_text()


# What a trace has, and how a direction shows


@pytest.mark.parametrize("form", FORMS)
def test_a_trace_has_a_step_for_each_direction_that_is_computed(form):
    guided = wrap(form)
    with guided.trace() as steps:
        result = run(guided)
    assert torch.equal(result, run(wrap(form)))
    names = [direction.name for direction in guided.directions]
    if form == "SAG, every 2nd call":
        assert len(steps) == 2
    else:
        assert [step.name for step in steps] == names * 4
        added = sum(step.direction * d.scale for step, d in zip(steps[-len(names) :], guided.directions, strict=True))
        assert relative(result[-1] - plain(guided)[-1], added) < 1e-4
    for step in steps:
        if step.name == "SAG":
            assert step.saliency.shape == (2, 6, 8) and step.mask.shape == (2, 1, 6, 8)
            if "one pass" not in form:
                assert torch.equal(step.direction, step.degraded - step.reevaluated)
        elif step.name != "skip":
            assert torch.equal(step.direction, step.cond - step.perturbed)


def test_directions_show_their_settings():
    assert repr(ksag.PAG(1, ["a", "b"])) == "PAG(scale=1, attention=['a', 'b'], sigma_range=(0.0, inf), every=1)"
    assert repr(ksag.SEG(every=3)) == "SEG(scale=3.0, blur_sigma=inf, attention='middle', sigma_range=(0.0, inf), every=3)"
    with wrap("SAG and PAG") as guided:
        assert repr(guided.directions[1]) in repr(guided) and "<td>directions</td>" in guided._repr_html_()


# Dtypes, modes and gradients


def without_edges(form):
    """At threshold 0 all is masked, so that rounding moves no token across it."""
    return {"mask_threshold": 0.0} if "SAG" in form else {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form, dtype):
    options = without_edges(form)
    exact, bare = run(wrap(form), **options), plain(wrap(form))
    result = run(wrap(form, tiny().to(dtype)), dtype=dtype, **options)
    assert result.dtype == dtype
    usual = relative(plain(wrap(form, tiny().to(dtype)), dtype=dtype), bare)
    assert relative(result, exact) < 4 * max(usual, torch.finfo(dtype).eps) < 0.1


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    options = without_edges(form)
    exact, bare = run(wrap(form), **options), plain(wrap(form))
    with torch.autocast("cpu", torch.bfloat16):
        result = run(wrap(form), **options)
        usual = relative(plain(wrap(form)), bare)
    assert relative(result, exact) < 4 * max(usual, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("form", FORMS)
def test_inference_mode_and_gradients_give_the_same_image(form):
    expected = run(wrap(form))
    for mode in torch.inference_mode, torch.no_grad:
        with mode():
            assert torch.equal(run(wrap(form)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    """Through the second call of a run; the first one's memory is a constant."""
    guided = wrap(form, tiny().double())
    x, args = latents()
    x, args["cond"], args["uncond"] = (t.double() for t in (x, args["cond"], args["uncond"]))
    weight, towards = torch.randn(2, *x.shape).double()

    def objective(x):
        guided.reset()
        with torch.no_grad():
            guided(x.detach() * 0 + 1, torch.full((2,), 4.0).double(), **args)
        return (guided(x, torch.full((2,), 3.0).double(), **args) * weight).sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(x), x)
    with torch.no_grad():
        numeric = (objective(x + 1e-6 * towards) - objective(x - 1e-6 * towards)) / 2e-6
    torch.testing.assert_close((gradient * towards).sum(), numeric, rtol=1e-6, atol=1e-9)
