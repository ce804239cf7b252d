import math
import threading
import warnings

import k_diffusion as K
import pytest
import torch
from torch import nn

import ksag
from tests import reference
from tests.models import CASES, LatentDiffusion, compvis_unet, conditional, hooks, inputs, make_denoiser, seeded


def wrap(denoiser, *args, **kwargs):
    return ksag.SAGDenoiser(denoiser, *args, cond_key="mapping_cond", **kwargs)


def close_to(actual, expected):
    """float32 arithmetic over a UNet, three evaluations deep: some 1e-6 of the result's scale."""
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < 1e-5, f"relative error {error:.1e}"


# The seven steps


@pytest.mark.parametrize("batch_cond", [True, False])
@pytest.mark.parametrize(("sag_scale", "blur_sigma", "kernel_size", "cond_scale", "threshold"),
                         [(0.5, 2.0, 9, 7.5, 1.0), (-2.0, 1.0, 5, 1.0, 0.8), (5.0, 3.0, 15, 0.0, 1.2)])  # fmt: skip
@pytest.mark.parametrize(("batch", "size"), [(1, (16, 16)), (3, (18, 26))])
def test_the_seven_steps(denoiser, batch, size, sag_scale, blur_sigma, kernel_size, cond_scale, threshold, batch_cond):
    x, sigma, cond, uncond = inputs(batch, size)
    guided = wrap(denoiser, sag_scale, blur_sigma, blur_kernel_size=kernel_size, mask_threshold=threshold, batch_cond=batch_cond)
    expected = reference.sag(
        lambda x, c: denoiser(x, sigma, mapping_cond=c), x, cond, uncond, cond_scale, sag_scale, blur_sigma, kernel_size,
        grid=(size[0] // 2, size[1] // 2), threshold=threshold,
    )  # fmt: skip
    close_to(guided(x, sigma, cond=cond, uncond=uncond, cond_scale=cond_scale), expected)


@pytest.mark.parametrize("conditional", [True, False])
def test_one_prediction_is_both_u_and_cfg(denoiser, conditional):
    x, sigma, cond, _ = inputs()
    c = cond if conditional else None
    expected = reference.sag(lambda x, c: denoiser(x, sigma, mapping_cond=c), x, c, c, 1.0, 0.5, 2.0, 9, grid=(8, 12))
    args = {"cond": cond} if conditional else {}
    close_to(wrap(denoiser)(x, sigma, **args), expected)


def test_compvis_eps_model():
    class LatentDiffusion(nn.Module):  # a stand-in for the part of CompVis's LatentDiffusion that k-diffusion calls
        def __init__(self, unet):
            super().__init__()
            self.unet = unet
            self.alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)

        def apply_model(self, x, t, cond):
            return self.unet(x, t, cond["c_crossattn"][0])

    denoiser = K.external.CompVisDenoiser(LatentDiffusion(seeded(compvis_unet)), quantize=True)
    x, sigma = torch.randn(2, 4, 10, 12) * 4, torch.full((2,), 4.0)
    cond, uncond = ({"c_crossattn": [torch.randn(2, 7, 64)]} for _ in range(2))
    guided = ksag.SAGDenoiser(denoiser, 0.8, 2.0)
    with guided.trace() as steps:
        result = guided(x, sigma, cond=cond, uncond=uncond, cond_scale=5.0)
    u, g = denoiser(x, sigma, cond=uncond).double(), denoiser(x, sigma, cond=cond).double()
    mask = reference.upsampled((steps[0].saliency > 1).double(), (10, 12))
    d = mask * reference.blurred(u, 2.0, 9) + (1 - mask) * u
    r = denoiser((d + x - u).float(), sigma, cond=uncond).double()
    close_to(result, u + (g - u) * 5 + (d - r) * 0.8)


def test_diffusers_unet_with_a_dict_of_keywords():
    class Eps(K.external.DiscreteEpsDDPMDenoiser):
        def get_eps(self, *args, **kwargs):
            return self.inner_model(*args, **kwargs).sample

    unet = seeded(conditional)
    denoiser = Eps(unet, torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0), quantize=True)
    x, sigma = torch.randn(2, 4, 10, 12) * 4, torch.full((2,), 4.0)
    cond, uncond = torch.randn(2, 7, 64), torch.randn(2, 7, 64)
    guided = ksag.SAGDenoiser(denoiser, cond_key=None)
    result = guided(x, sigma, cond={"encoder_hidden_states": cond}, uncond={"encoder_hidden_states": uncond}, cond_scale=5.0)
    expected = reference.sag(
        lambda x, c: denoiser(x, sigma, encoder_hidden_states=c), x, cond, uncond, 5.0, 0.5, 2.0, 9, grid=(5, 6), index=2
    )
    close_to(result, expected)


# What runs and what does not


class Count(nn.Module):
    """The denoiser, and the batch of every call that reached it."""

    def __init__(self, inner_model):
        super().__init__()
        self.inner_model = inner_model
        self.batches = []

    def forward(self, x, sigma, **kwargs):
        self.batches.append(x.shape[0])
        return self.inner_model(x, sigma, **kwargs)


def plain_cfg(denoiser, x, sigma, cond, uncond, cond_scale):
    u, g = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), mapping_cond=torch.cat([uncond, cond])).chunk(2)
    return u + (g - u) * cond_scale


@pytest.mark.parametrize("options", [{"sag_scale": 0.0}, {"sigma_range": (0.0, 2.9)}, {"sigma_range": (3.1, math.inf)}])
def test_plain_cfg_bit_for_bit_without_a_third_pass(denoiser, options):
    x, sigma, cond, uncond = inputs()
    count = Count(denoiser)
    result = wrap(count, **options)(x, sigma, cond=cond, uncond=uncond, cond_scale=3.0)
    assert torch.equal(result, plain_cfg(denoiser, x, sigma, cond, uncond, 3.0))
    assert count.batches == [4]


@pytest.mark.parametrize("size", [(4, 16), (16, 4)])
def test_a_latent_too_small_for_the_blur_is_an_error(denoiser, size):
    x, sigma, cond, uncond = inputs(2, size)
    guided = wrap(denoiser)
    with pytest.raises(ValueError, match=r"too small for blur_kernel_size=9.*Set blur_kernel_size to at most 7, or .*sag_scale=0"):
        guided(x, sigma, cond=cond, uncond=uncond)
    assert torch.equal(guided(x, sigma, cond=cond, sag_scale=0), denoiser(x, sigma, mapping_cond=cond))
    guided.blur_kernel_size = 7
    assert guided(x, sigma, cond=cond, uncond=uncond).isfinite().all()


def test_sigma_range_includes_its_ends(denoiser):
    x, sigma, *_ = inputs()
    count = Count(denoiser)
    guided = wrap(count, sigma_range=(3.0, 3.0))
    guided(x, sigma)
    assert count.batches == [2, 2]


def test_uncond_is_evaluated_at_cond_scale_one(denoiser):
    x, sigma, cond, uncond = inputs()
    count = Count(denoiser)
    wrap(count)(x, sigma, cond=cond, uncond=uncond, cond_scale=1.0)
    assert count.batches == [4, 2]


def test_blur_sigma_zero_is_no_guidance_and_no_nan(denoiser):
    x, sigma, cond, uncond = inputs()
    with pytest.warns(UserWarning, match="blur_sigma=0 blurs nothing"):
        result = wrap(denoiser, 5.0, 0.0)(x, sigma, cond=cond, uncond=uncond, cond_scale=3.0)
    close_to(result, plain_cfg(denoiser, x, sigma, cond, uncond, 3.0).double())


def test_extra_args_override_the_constructor(denoiser):
    x, sigma, cond, uncond = inputs()
    args = {"cond": cond, "uncond": uncond, "cond_scale": 2.0}
    changed = {"sag_scale": 1.5, "blur_sigma": 1.0, "mask_threshold": 0.9}
    overridden = wrap(denoiser)(x, sigma, **args, **changed)
    assert torch.equal(overridden, wrap(denoiser, **changed)(x, sigma, **args))
    for name, value in changed.items():
        assert not torch.equal(wrap(denoiser)(x, sigma, **args, **{name: value}), wrap(denoiser)(x, sigma, **args))


def test_batch_cond_false_and_unequal_shapes_take_two_passes(denoiser):
    x, sigma, cond, uncond = inputs()
    count = Count(denoiser)
    wrap(count, batch_cond=False)(x, sigma, cond=cond, uncond=uncond)
    assert count.batches == [2, 2, 2]


@pytest.mark.parametrize(("batch_cond", "alone"), [(True, False), (False, False), (True, True)])
def test_a_model_that_returns_one_buffer_every_time(denoiser, batch_cond, alone):
    class Reuses(nn.Module):  # as a model does that was compiled with mode="reduce-overhead"
        def __init__(self):
            super().__init__()
            self.inner_model, self.buffers_by_shape = denoiser, {}

        def forward(self, x, sigma, **kwargs):
            denoised = self.inner_model(x, sigma, **kwargs)
            return self.buffers_by_shape.setdefault(x.shape, torch.empty_like(denoised)).copy_(denoised)

    x, sigma, cond, uncond = inputs()
    args = {"cond": cond} if alone else {"cond": cond, "uncond": uncond, "cond_scale": 3.0}
    with wrap(denoiser, batch_cond=batch_cond) as plain, plain.trace() as expected_steps:
        expected = plain(x, sigma, **args)
    guided = wrap(Reuses(), batch_cond=batch_cond)
    with guided.trace() as steps:
        assert torch.equal(guided(x, sigma, **args), expected)
    assert reference.same_steps(steps, expected_steps)


def test_77_against_154_tokens_equals_each_on_its_own():
    class Eps(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = seeded(compvis_unet)
            self.tokens = []

        def forward(self, x, sigma, cond):
            self.tokens.append(cond.shape[1])
            return x - self.unet(x, sigma * 100, cond) * sigma[:, None, None, None]

    denoiser = Eps()
    x, sigma = torch.randn(2, 4, 8, 8) * 4, torch.full((2,), 4.0)
    cond, uncond = torch.randn(2, 154, 64), torch.randn(2, 77, 64)
    result = ksag.SAGDenoiser(denoiser, sag_scale=0.0)(x, sigma, cond=cond, uncond=uncond, cond_scale=2.0)
    u, g = denoiser(x, sigma, cond=uncond), denoiser(x, sigma, cond=cond)
    assert torch.equal(result, u + (g - u) * 2.0)
    denoiser.tokens.clear()
    ksag.SAGDenoiser(denoiser)(x, sigma, cond=cond, uncond=uncond, cond_scale=2.0)
    assert denoiser.tokens == [77, 154, 77]


def test_unknown_keywords_go_to_every_call_with_a_row_per_sample():
    class Echo(Count):
        def forward(self, x, sigma, *, bias, flag, **kwargs):
            assert flag == "on" and bias.shape[0] == x.shape[0]
            return super().forward(x, sigma, **kwargs) + bias

    x, sigma, cond, uncond = inputs()
    bias = torch.randn(2, 1, 1, 1)
    echo = Echo(make_denoiser())
    batched = wrap(echo)(x, sigma, cond=cond, uncond=uncond, cond_scale=2.0, bias=bias, flag="on")
    assert echo.batches == [4, 2]
    alone = wrap(echo, batch_cond=False)(x, sigma, cond=cond, uncond=uncond, cond_scale=2.0, bias=bias, flag="on")
    close_to(batched, alone.double())


# Dtypes and gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_result_is_the_models(denoiser, dtype):
    x, sigma, cond, uncond = (t.to(dtype) for t in inputs())
    result = wrap(denoiser.to(dtype))(x, sigma, cond=cond, uncond=uncond, cond_scale=2.0)
    assert result.dtype == dtype and result.isfinite().all()


def test_a_model_in_half_precision_that_answers_in_float32_is_always_given_its_own(denoiser):
    class Answers(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner_model = denoiser.bfloat16()

        def forward(self, x, sigma, **kwargs):
            return self.inner_model(x, sigma, **kwargs).float()  # raises an error for x in float32

    x, sigma, cond, uncond = (t.bfloat16() for t in inputs())
    assert wrap(Answers())(x, sigma, cond=cond, uncond=uncond, cond_scale=2.0).dtype == torch.float32


def test_autocast_around_the_call(denoiser):
    x, sigma, cond, uncond = inputs()
    guided = wrap(denoiser)
    expected = guided(x, sigma, cond=cond, uncond=uncond, cond_scale=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        cfg = plain_cfg(denoiser, x, sigma, cond, uncond, 2.0)
        result = guided(x, sigma, cond=cond, uncond=uncond, cond_scale=2.0)
    assert result.dtype == cfg.dtype and result.isfinite().all()
    assert (result - expected).norm() / expected.norm() < 0.1


def test_gradients_flow_through_all_of_it():
    denoiser = make_denoiser().double()
    x, sigma, cond, uncond = (t.double() for t in inputs(1, (8, 8)))
    guided = wrap(denoiser, blur_kernel_size=5)
    x.requires_grad_()
    weight = torch.randn_like(x)

    def objective(x):
        return (guided(x, sigma, cond=cond, uncond=uncond, cond_scale=2.0) * weight).sum()

    (grad,) = torch.autograd.grad(objective(x), x)
    direction = torch.randn_like(x)
    with torch.no_grad():
        numeric = (objective(x + 1e-6 * direction) - objective(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-6, atol=0)


# trace, close, repr


def test_trace_keeps_what_each_guided_call_computed(denoiser):
    x, sigma, cond, uncond = inputs()
    guided = wrap(denoiser, 0.7, 1.5)
    args = {"cond": cond, "uncond": uncond, "cond_scale": 2.0}
    guided(x, sigma, **args)
    with guided.trace() as steps:
        result = guided(x, sigma, **args)
        guided(x, sigma, **args, sag_scale=0.0)
    guided(x, sigma, **args)
    (step,) = steps
    u, d, r = step.uncond, step.degraded, step.reevaluated
    assert torch.equal(step.sigma, sigma) and step.saliency.shape == (2, 8, 12) and step.mask.shape == (2, 1, 16, 24)
    torch.testing.assert_close(u, denoiser(x, sigma, mapping_cond=uncond), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(r, denoiser(d + (x - u), sigma, mapping_cond=uncond), rtol=1e-4, atol=1e-5)
    cfg = plain_cfg(denoiser, x, sigma, cond, uncond, 2.0)
    torch.testing.assert_close(result, cfg + (d - r) * 0.7)
    assert 0 < step.mask.mean() < 1
    assert all(t.device.type == "cpu" for t in reference.tensors(step))


def test_a_trace_shows_as_a_table():
    latent = torch.zeros(1, 1, 2, 2)
    saliency, mask = torch.tensor([[[0.5, 1.5], [1.25, 0.75]]]), torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    parts = {"saliency": saliency, "mask": mask}
    sag = ksag.TraceStep("SAG", torch.tensor([3.0]), latent, latent, latent + 0.75, parts)
    pag = ksag.TraceStep("PAG", torch.tensor([0.125, 3.0]), latent, latent, latent - 0.5, {"perturbed": latent})
    assert repr(sag) == "TraceStep(direction=SAG, sigma=3, peak_saliency=1.5, masked=25%, guidance=0.75, latent=1×1×2×2)"
    assert repr(ksag.Trace([sag, pag])) == (
        "step  direction    sigma  peak_saliency  masked  guidance\n"
        "   0        SAG        3            1.5     25%      0.75\n"
        "   1        PAG  0.125…3                              0.5"
    )
    assert (
        "<tbody><tr><td>0</td><td>SAG</td><td>3</td><td>1.5</td><td>25%</td><td>0.75</td></tr>" in ksag.Trace([sag])._repr_html_()
    )
    assert "masked" in repr(ksag.Trace()) and "masked" in ksag.Trace()._repr_html_()
    with pytest.raises(AttributeError, match="a step of PAG has no 'mask'; it has perturbed"):
        pag.mask  # noqa: B018


def test_a_wrapper_shows_its_model_and_parameters(denoiser):
    with wrap(denoiser, 0.75) as guided:
        shown = repr(guided)
        assert shown.startswith("SAGDenoiser(Denoiser, attention='inner_model.u_net.d_blocks.1.2', sag_scale=0.75, ")
        assert "<tr><td>inner_model</td><td>Denoiser</td></tr>" in guided._repr_html_()
        assert "<tr><td>sag_scale</td><td>0.75</td></tr>" in guided._repr_html_()
        assert shown.endswith("; attention not checked yet)") and "<th>attention not checked yet</th>" in guided._repr_html_()
        guided(*inputs()[:2])
        assert repr(guided).endswith("; attention checked)")
    assert repr(guided).endswith("; attention closed)") and "<th>attention closed</th>" in guided._repr_html_()


def test_close_and_with_remove_every_hook(denoiser):
    x, sigma, cond, uncond = inputs()
    with wrap(denoiser) as guided:
        assert hooks(denoiser) > 0
    assert hooks(denoiser) == 0
    assert torch.equal(guided(x, sigma, cond=cond, uncond=uncond, sag_scale=0.0), plain_cfg(denoiser, x, sigma, cond, uncond, 1.0))
    with pytest.raises(RuntimeError, match="closed"):
        guided(x, sigma, cond=cond, uncond=uncond)


def test_state_dict_is_the_inner_models(denoiser):
    guided = wrap(denoiser)
    assert guided.state_dict().keys() == {f"inner_model.{name}" for name in denoiser.state_dict()}


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sag_scale": math.nan}, ValueError, "sag_scale must be a finite number, got nan"),
        ({"sag_scale": math.inf}, ValueError, "sag_scale must be a finite number, got inf"),
        ({"blur_sigma": math.nan}, ValueError, "blur_sigma must be a finite number, got nan"),
        ({"blur_sigma": -1.0}, ValueError, "0 .no blur. or more, got -1.0"),
        ({"blur_kernel_size": 8}, ValueError, "odd number of latent pixels, such as 9, got the int 8"),
        ({"blur_kernel_size": 0}, ValueError, "odd number"),
        ({"mask_threshold": math.nan}, ValueError, "mask_threshold must be a finite number"),
        ({"sigma_range": (5.0, 1.0)}, ValueError, r"\(lowest, highest\) sigma, got \(5.0, 1.0\)"),
        ({"sigma_range": (math.nan, 1.0)}, ValueError, "sigma_range"),
    ],
)
def test_bad_parameters(denoiser, options, error, message):
    with pytest.raises(error, match=message):
        wrap(denoiser, **options)
    assert hooks(denoiser) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(3, 16)},
            ValueError,
            r"x must be a latent, a tensor of shape \(b, c, n\), \(b, c, h, w\) .*got a tensor of shape \(3, 16\)",
        ),
        ({"sigma": torch.ones(3)}, ValueError, r"each of the 2 samples, shape \(2,\), got a tensor of shape \(3,\)"),
        ({"sigma": torch.tensor(1.0)}, ValueError, r"got a tensor of shape \(\)"),
        ({"uncond": torch.zeros(3, 10)}, ValueError, r"uncond has shape \(3, 10\), but the latent is a batch of 2"),
        ({"uncond": [torch.zeros(2, 10)]}, ValueError, "both must have the same nesting"),
        ({"uncond": None, "cond_scale": 7.5}, ValueError, "cond_scale=7.5 .* uncond is missing"),
        ({"cond": None}, ValueError, "uncond came without cond"),
        ({"sag_scale": math.nan}, ValueError, "sag_scale must be a finite number, got nan"),
        ({"blur_sigma": math.inf}, ValueError, "blur_sigma must be a finite number, got inf"),
        ({"blur_sigma": -0.5}, ValueError, "got -0.5"),
    ],
)
def test_bad_calls(denoiser, change, error, message):
    x, sigma, cond, uncond = inputs()
    guided = wrap(denoiser)
    good = {"x": x, "sigma": sigma, "cond": cond, "uncond": uncond}
    expected = guided(**good)
    with pytest.raises(error, match=message):
        guided(**{**good, **change})
    assert torch.equal(guided(**good), expected)


def test_an_inner_model_that_raises_leaves_nothing_recording(denoiser):
    x, sigma, cond, uncond = inputs()
    guided = wrap(denoiser)
    expected = guided(x, sigma, cond=cond, uncond=uncond)
    for block in denoiser.inner_model.u_net.d_blocks[0], denoiser.inner_model.u_net.u_blocks[0]:  # before and after the layer
        handle = block.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            guided(x, sigma, cond=cond, uncond=uncond)
        handle.remove()
        assert guided.tap._visit.get() is None
        assert torch.equal(guided(x, sigma, cond=cond, uncond=uncond), expected)


def test_an_inner_model_that_is_no_module_or_no_denoiser():
    with pytest.raises(TypeError, match=r"inner_model must be an nn.Module .* got function"):
        ksag.SAGDenoiser(lambda x, sigma: x)  # type: ignore
    guided = ksag.SAGDenoiser(seeded(conditional), cond_key="encoder_hidden_states")
    with pytest.raises(TypeError, match=r"must return the denoised latent, .* got UNet2DConditionOutput"):
        guided(torch.randn(2, 4, 8, 8), torch.ones(2), cond=torch.randn(2, 7, 64))


def test_cond_key_none_needs_a_dict(denoiser):
    x, sigma, cond, _ = inputs()
    with pytest.raises(TypeError, match=r"cond must be a dict of inner_model's keywords, got a tensor of shape \(2, 10\)"):
        ksag.SAGDenoiser(denoiser, cond_key=None)(x, sigma, cond=cond)


class OfDiffusers(nn.Module):
    def __init__(self):
        super().__init__()
        self.unet = seeded(conditional)

    def forward(self, x, sigma, cond):
        return self.unet(x, 500, cond).sample


def fuse(unet, layer):
    unet.fuse_qkv_projections()


def replace_projection(unet, layer):
    layer.to_q = nn.Sequential(layer.to_q, nn.Linear(64, 64))  # what a LoRA does to a projection


@pytest.mark.parametrize("change", [fuse, replace_projection])
def test_projections_changed_after_wrapping_are_seen(change):
    args = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 7, 64)
    denoiser = OfDiffusers()
    guided = ksag.SAGDenoiser(denoiser)
    guided(*args)
    torch.manual_seed(0)
    change(denoiser.unet, guided.tap.layer)
    with guided, ksag.SAGDenoiser(denoiser) as anew:
        assert torch.equal(guided(*args), anew(*args))
    assert hooks(denoiser) == 0


def test_projections_changed_in_a_compiled_model_are_an_error_not_an_unguided_image():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = seeded(CASES["CompVis, memory efficient"].model)

        def forward(self, x, sigma):
            return self.unet(x)

    args = torch.randn(1, 3, 8, 8), torch.ones(1)
    guided = ksag.SAGDenoiser(Small())
    unet, layer = guided.inner_model.unet, guided.tap.layer
    guided.inner_model.unet = torch.compile(unet, backend="eager")
    guided(*args)
    layer.to_q = nn.Sequential(layer.to_q, nn.Linear(32, 32))
    with pytest.raises(RuntimeError, match=r"attn1' were replaced after it was wrapped .* Wrap the model again, then compile it"):
        guided(*args)


def test_what_a_model_does_to_the_containers_that_it_is_given_is_undone(denoiser):
    class Pops(nn.Module):  # as diffusers' UNet does to a T2I-Adapter's down_intrablock_additional_residuals
        def __init__(self):
            super().__init__()
            self.inner_model = denoiser

        def forward(self, x, sigma, cond, residuals):
            return self.inner_model(x, sigma, mapping_cond=cond["mapping"].pop()) + residuals.pop(0)

    x, sigma, cond, uncond = inputs()
    residuals, cond, uncond = [torch.ones(2, 1, 1, 1)], {"mapping": [cond]}, {"mapping": [uncond]}
    for batch_cond in True, False:
        guided = ksag.SAGDenoiser(Pops(), batch_cond=batch_cond)
        results = [guided(x, sigma, cond=cond, uncond=uncond, residuals=residuals) for _ in range(2)]
        assert torch.equal(*results)
        assert len(residuals) == len(cond["mapping"]) == len(uncond["mapping"]) == 1


def test_each_sample_has_its_own_sigma_in_the_range(denoiser):
    x, _, cond, uncond = inputs(3)
    sigma = torch.tensor([0.5, 3.0, 9.0])
    args = {"cond": cond, "uncond": uncond, "cond_scale": 2.0}
    everywhere, plain = (wrap(denoiser, scale)(x, sigma, **args) for scale in (0.5, 0.0))
    result = wrap(denoiser, sigma_range=(1.0, 4.0))(x, sigma, **args)
    assert torch.equal(result[1], everywhere[1]) and not torch.equal(plain[1], everywhere[1])
    assert torch.equal(result[0], plain[0]) and torch.equal(result[2], plain[2])


def test_a_trace_keeps_its_own_threads_steps(denoiser):
    x, sigma, *_ = inputs()
    guided = wrap(denoiser)
    with guided.trace() as outer, guided.trace() as inner:
        other = threading.Thread(target=guided, args=(x, sigma))
        other.start()
        other.join()
        guided(x, sigma)
    assert len(outer) == len(inner) == 1


# What a k-diffusion denoiser has, and what is warned of once


def test_what_users_ask_of_a_denoiser_is_the_inner_models():
    denoiser = K.external.CompVisDenoiser(LatentDiffusion(), quantize=True)
    guided = ksag.SAGDenoiser(denoiser)
    assert guided.sigmas is denoiser.sigmas and guided.sigma_min == denoiser.sigma_min and guided.sigma_max == denoiser.sigma_max
    assert torch.equal(guided.get_sigmas(5), denoiser.get_sigmas(5))
    sigma = torch.tensor([2.0])
    assert torch.equal(guided.t_to_sigma(guided.sigma_to_t(sigma)), denoiser.t_to_sigma(denoiser.sigma_to_t(sigma)))
    assert wrap(make_denoiser()).sigma_data == 0.5 and not hasattr(wrap(Count(make_denoiser())), "sigma_data")


def test_what_is_no_error_is_warned_of_where_the_wrapper_is_called(denoiser):
    x, sigma, *_ = inputs()
    guided = wrap(denoiser)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        guided(x, sigma)
        assert not seen
        for change in {"blur_sigma": 0.0}, {"blur_sigma": 2.0, "blur_kernel_size": 1}:
            for name, value in change.items():
                setattr(guided, name, value)
            guided(x, sigma)
        guided.blur_kernel_size = 9
        denoiser.train()
        guided(x, sigma)
    assert [str(w.message)[:34] for w in seen] == [
        "blur_sigma=0 blurs nothing, so SAG",
        "blur_kernel_size=1 blurs nothing, ",
        "inner_model is in train mode, so t",
    ]
    assert {w.filename for w in seen} == {__file__}
