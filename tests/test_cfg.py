"""The rules for classifier-free guidance against the formulas of their papers: alone, with SAG, and in runs of samplers.

The formulas are written once more here, in NumPy and float64.
"""

import functools
import threading

import k_diffusion as K
import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import ksag
from ksag import cfg
from tests import forms, reference
from tests.forms import LAYERS


@pytest.fixture
def denoiser():
    return forms.tiny()


def inputs(batch=2, size=(6, 8)):
    """x, sigma, cond, uncond."""
    x, args = forms.latents(batch, size)
    return x * 3, torch.full((batch,), 3.0), args["cond"], args["uncond"]


# The formulas


def plain():
    return lambda u, g, w, x, sigma: u + w * (g - u)


def rescale(phi):
    """arXiv:2305.08891, equations 15 and 16, of v as a variance-preserving model predicts it."""

    def rule(u, g, w, x, sigma):
        sigma = sigma[:, None, None, None]
        alpha = 1 / np.sqrt(sigma**2 + 1)

        def v_of(denoised):
            noise = (x - denoised) / sigma
            return alpha * noise - alpha * sigma * denoised

        v_neg, v_pos = v_of(u), v_of(g)
        v_cfg = v_neg + w * (v_pos - v_neg)
        v_rescaled = v_cfg * v_pos.std(axis=(1, 2, 3), keepdims=True) / v_cfg.std(axis=(1, 2, 3), keepdims=True)
        v_final = phi * v_rescaled + (1 - phi) * v_cfg
        return alpha * (alpha * x) - alpha * sigma * v_final

    return rule


class apg:
    """arXiv:2410.02416, algorithm 1, one sample after another. It is told of no sigma, and lives for one run."""

    def __init__(self, eta=0.0, r=None, beta=-0.5):
        self.eta, self.r, self.beta = eta, r, beta
        self.averages = {}

    def __call__(self, u, g, w, x, sigma):
        return np.stack([self.one(i, u[i].ravel(), g[i].ravel(), w).reshape(u[i].shape) for i in range(len(u))])

    def one(self, i, u, g, w):
        difference = g - u + self.beta * self.averages.get(i, 0.0)
        self.averages[i] = difference
        if self.r is not None:
            difference = difference * min(1.0, self.r / np.linalg.norm(difference))
        parallel = np.dot(difference, g) / np.dot(g, g) * g
        return g + (w - 1) * (difference - parallel + self.eta * parallel)


RULES = {
    "plain": (lambda: cfg.plain, plain),
    "rescale": (cfg.rescale, functools.partial(rescale, 0.7)),
    "rescale(1)": (functools.partial(cfg.rescale, 1), functools.partial(rescale, 1.0)),
    "apg": (cfg.apg, apg),
    "apg(0.3, 2, -0.75)": (functools.partial(cfg.apg, 0.3, 2.0, -0.75), functools.partial(apg, 0.3, 2.0, -0.75)),
    "apg(1, None, 0.5)": (functools.partial(cfg.apg, 1.0, None, 0.5), functools.partial(apg, 1.0, None, 0.5)),
    "apg(0, 2, 0)": (functools.partial(cfg.apg, 0.0, 2.0, 0.0), functools.partial(apg, 0.0, 2.0, 0.0)),
}
MOMENTUM = [name for name in RULES if name.startswith("apg") and not name.endswith(", 0)")]


@pytest.fixture(params=RULES)
def rule(request):
    return request.param


def in_numpy(formula, u, g, w, x, sigma):
    return torch.from_numpy(formula(*(t.double().numpy() for t in (u, g)), w, *(t.double().numpy() for t in (x, sigma))))


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def wrap(denoiser, name, **options):
    return ksag.SAGDenoiser(denoiser, cfg_rule=RULES[name][0](), blur_kernel_size=5, **options)


class Reference(nn.Module):
    """The seven steps in float64 with a rule in NumPy, for one run."""

    def __init__(self, denoiser, formula, sag_scale):
        super().__init__()
        self.denoiser, self.formula, self.sag_scale = denoiser, formula, sag_scale

    def forward(self, x, sigma, cond, uncond, cond_scale):
        def denoise(x, c):
            return self.denoiser(x, sigma, c)

        u, g = denoise(x, uncond).double(), denoise(x, cond).double()
        sag = reference.sag(denoise, x, uncond, uncond, 1.0, self.sag_scale, 2.0, 5, grid=x.shape[2:])  # u, and SAG's part
        return (in_numpy(self.formula, u, g, cond_scale, x, sigma) + sag - u).to(x.dtype)


# One call


@pytest.mark.parametrize("cond_scale", [7.5, 1.0, 0.0, -2.0])
def test_the_formula(rule, cond_scale):
    make, formula = RULES[rule]
    u, g, x = torch.randn(3, 3, 4, 6, 8).double()
    sigma = torch.tensor([0.1, 1.0, 20.0]).double()
    ours = make()(u, g, cond_scale, x * sigma[:, None, None, None], sigma)
    assert relative(ours, in_numpy(formula(), u, g, cond_scale, x * sigma[:, None, None, None], sigma)) < 1e-12


@pytest.mark.parametrize("sag_scale", [0.0, 0.8])
@pytest.mark.parametrize("batch_cond", [True, False])
def test_a_guided_call(denoiser, rule, sag_scale, batch_cond):
    x, sigma, cond, uncond = inputs()
    args = {"cond": cond, "uncond": uncond, "cond_scale": 6.0}
    guided = wrap(denoiser, rule, sag_scale=sag_scale, batch_cond=batch_cond)
    expected = Reference(denoiser, RULES[rule][1](), sag_scale)(x, sigma, **args)
    assert relative(guided(x, sigma, **args), expected.double()) < 1e-5
    if rule not in ("plain", "apg(1, None, 0.5)"):  # which is plain guidance at the first call of a run
        usual = Reference(denoiser, plain(), sag_scale)(x, sigma, **args)
        assert relative(usual, expected.double()) > 1e-2


def test_without_uncond_there_is_nothing_to_guide_away_from(denoiser, rule):
    x, sigma, cond, _ = inputs()
    expected = reference.sag(lambda x, c: denoiser(x, sigma, c), x, cond, cond, 1.0, 0.5, 2.0, 5, grid=(6, 8))
    assert relative(wrap(denoiser, rule)(x, sigma, cond=cond), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sigma_dtype", ["the same", torch.float32])
def test_half_precision(rule, dtype, sigma_dtype):
    make, formula = RULES[rule]
    u, g = (torch.randn(2, 2, 4, 96, 96) * 500).to(dtype)  # longer than float16 can tell
    sigma = torch.tensor([0.5, 30.0]).to(dtype)
    x = u + torch.randn(u.shape).to(dtype) * sigma[:, None, None, None]
    ours = make()(u, g, 5.0, x, sigma if sigma_dtype == "the same" else sigma.to(sigma_dtype))
    assert ours.dtype == dtype
    expected = in_numpy(formula(), u, g, 5.0, x, sigma)
    assert relative(ours, expected) < 4 * torch.finfo(dtype).eps


def test_gradients(rule):
    make, _ = RULES[rule]
    u, g, x = (torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sigma = torch.tensor([0.5, 3.0]).double()
    assert torch.autograd.gradcheck(lambda u, g, x: make()(u, g, 3.0, x, sigma), (u, g, x))


def test_gradients_through_a_guided_run_of_two_calls(denoiser, rule):
    x, sigma, cond, uncond = inputs()
    x, cond = x.requires_grad_(), cond.requires_grad_()
    guided = wrap(denoiser, rule)
    once = guided(x, sigma, cond=cond, uncond=uncond, cond_scale=4.0)
    again = guided(once, sigma * 0.7, cond=cond, uncond=uncond, cond_scale=4.0)
    for gradient in torch.autograd.grad(again.square().sum(), (x, cond)):
        assert gradient.isfinite().all() and gradient.any()


def test_gradients_are_finite_where_the_prompt_is_empty(denoiser, rule):
    """u is g then, to the last bit."""
    x, sigma, cond, _ = inputs()
    x.requires_grad_()
    wrap(denoiser, rule)(x, sigma, cond=cond, uncond=cond, cond_scale=4.0).sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


# Under samplers


def noise_of(x, sigmas):
    return K.sampling.BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max(), seed=3)


def euler(model, x, sigmas, args):
    return K.sampling.sample_euler(model, x, sigmas, extra_args=args, disable=True)


def heun_with_churn(model, x, sigmas, args):
    torch.manual_seed(3)
    return K.sampling.sample_heun(model, x, sigmas, extra_args=args, disable=True, s_churn=20.0)  # as much as there can be


def dpmpp_2m(model, x, sigmas, args):
    return K.sampling.sample_dpmpp_2m(model, x, sigmas, extra_args=args, disable=True)


def dpmpp_sde(model, x, sigmas, args):
    return K.sampling.sample_dpmpp_sde(model, x, sigmas, extra_args=args, disable=True, noise_sampler=noise_of(x, sigmas))


SAMPLERS = [euler, heun_with_churn, dpmpp_2m, dpmpp_sde]
SIGMAS = K.sampling.get_sigmas_karras(5, 0.2, 8.0)


def run(model, sampler=euler, seed=0, size=(6, 8), cond_scale=4.0, sigmas=SIGMAS):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, *size, generator=generator) * sigmas[0]
    cond = torch.randn(2, 4, generator=generator)
    return sampler(model, x, sigmas, {"cond": cond, "uncond": torch.zeros(2, 4), "cond_scale": cond_scale})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sag_scale", [pytest.param(0.0, marks=pytest.mark.slow), 0.8])
def test_a_run_is_what_the_formula_gives(denoiser, rule, sampler, sag_scale):
    guided = wrap(denoiser, rule, sag_scale=sag_scale)
    expected = run(Reference(denoiser, RULES[rule][1](), sag_scale), sampler)
    assert relative(run(guided, sampler), expected.double()) < 1e-4
    if rule in MOMENTUM:
        alone = RULES[rule][1]()
        alone.beta = 0.0
        assert relative(run(Reference(denoiser, alone, sag_scale), sampler), expected.double()) > 1e-3


# The momentum lives and dies with a run


@pytest.fixture(params=MOMENTUM)
def momentum(request):
    return request.param


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_runs_after_each_other_are_two_runs_alone(denoiser, momentum, sampler):
    guided = wrap(denoiser, momentum)
    for seed in range(2):
        assert torch.equal(run(guided, sampler, seed), run(wrap(denoiser, momentum), sampler, seed))


def two_calls(denoiser, momentum, between=lambda guided: None, second=None):
    """The second call at a slightly lower sigma, after the first and alone."""
    x, sigma, cond, uncond = inputs()
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    guided = wrap(denoiser, momentum)
    guided(x, sigma, **args)
    between(guided)
    x, sigma, args = second or (x, sigma * 0.9, args)
    return guided(x, sigma, **args), wrap(denoiser, momentum)(x, sigma, **args)


def test_a_run_goes_on_from_call_to_call(denoiser, momentum):
    after, alone = two_calls(denoiser, momentum)
    assert relative(after, alone.double()) > 1e-3


def test_a_setting_that_is_changed_between_two_calls_counts(denoiser):
    x, sigma, cond, uncond = inputs()
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    guided = ksag.SAGDenoiser(denoiser, 0.0, cfg_rule=cfg.apg(eta=0.0))
    guided(x, sigma, **args)
    guided.cfg_rule.eta = 1.0
    expected = ksag.SAGDenoiser(denoiser, 0.0, cfg_rule=cfg.apg(eta=1.0))(x, sigma, **args)
    assert torch.equal(guided(x, sigma, **args), expected)


def test_reset_begins_a_run(denoiser, momentum):
    assert torch.equal(*two_calls(denoiser, momentum, lambda guided: guided.reset()))


def test_an_error_begins_a_run(denoiser, momentum):
    def fail(guided):
        x, sigma, cond, uncond = inputs()
        handle = denoiser.out.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            guided(x, sigma, cond=cond, uncond=uncond, cond_scale=4.0)
        handle.remove()

    assert torch.equal(*two_calls(denoiser, momentum, fail))


def test_an_error_in_the_last_pass_begins_a_run(denoiser, momentum):
    """The rule has kept something by then."""

    def fail(guided):
        x, sigma, cond, uncond = inputs()
        calls = []
        handle = denoiser.register_forward_hook(lambda *_: calls.append(1) or (1 / 0 if len(calls) == 2 else None))
        with pytest.raises(ZeroDivisionError):
            guided(x, sigma, cond=cond, uncond=uncond, cond_scale=4.0)
        handle.remove()

    assert torch.equal(*two_calls(denoiser, momentum, fail))


@pytest.mark.parametrize("change", ["shape", "batch", "dtype", "sigma"])
def test_another_shape_dtype_or_a_higher_sigma_begins_a_run(denoiser, momentum, change):
    x, sigma, cond, uncond = inputs(*{"shape": (2, (8, 8)), "batch": (3, (6, 8))}.get(change, ()))
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    factor = 1.6 if change == "sigma" else 0.9

    def to_double(guided):
        if change == "dtype":
            denoiser.double()

    if change == "dtype":
        x, sigma, args = x.double(), sigma.double(), {**args, "cond": cond.double(), "uncond": uncond.double()}
    assert torch.equal(*two_calls(denoiser, momentum, to_double, (x, sigma * factor, args)))


def test_churn_begins_no_run(denoiser, momentum):
    x, sigma, cond, uncond = inputs()
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    after, alone = two_calls(denoiser, momentum, second=(x, sigma * 2**0.5, args))
    assert relative(after, alone.double()) > 1e-3


def test_each_sample_begins_its_own_run(denoiser, momentum):
    x, sigma, cond, uncond = inputs()
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    both = wrap(denoiser, momentum)
    both(x, sigma, **args)
    result = both(x, sigma * torch.tensor([2.0, 0.9]), **args)
    began = wrap(denoiser, momentum)(x, sigma * 2.0, **args)
    went_on, alone = two_calls(denoiser, momentum)
    assert relative(result[0], began[0].double()) < 1e-5
    assert relative(result[1], went_on[1].double()) < 1e-5
    assert relative(result[1], alone[1].double()) > 1e-3


def test_each_thread_has_its_own_run(denoiser, momentum):
    guided = wrap(denoiser, momentum)
    alone = [run(wrap(denoiser, momentum), seed=seed) for seed in range(2)]
    results, turn = {}, threading.Barrier(2, timeout=60)

    class Alternating(nn.Module):
        def forward(self, *args, **kwargs):
            turn.wait()  # so that neither ends before the other begins
            return guided(*args, **kwargs)

    threads = [threading.Thread(target=lambda i=i: results.update({i: run(Alternating(), seed=i)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert relative(results[i], expected.double()) < 1e-5


def test_two_wrappers_with_rules_of_their_own(denoiser, momentum):
    one, other = wrap(denoiser, momentum), wrap(denoiser, momentum)
    x, sigma, cond, uncond = inputs()
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    one(x, sigma, **args)
    assert torch.equal(other(x, sigma * 0.9, **args), two_calls(denoiser, momentum)[1])


# Compiled


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("sag_scale", [0.0, 0.8])
@pytest.mark.parametrize("rule", ["plain", "rescale", "apg(0.3, 2, -0.75)"])
def test_the_whole_wrapper_compiles_with_it(denoiser, rule, sag_scale, fresh_dynamo):
    expected = [run(wrap(denoiser, rule, sag_scale=sag_scale), seed=seed) for seed in range(2)]
    guided = wrap(denoiser, rule, sag_scale=sag_scale)
    run(guided, sigmas=SIGMAS[-2:])  # checks the attention
    guided.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(guided, fullgraph=True, backend=counter)
    for seed in range(2):
        assert relative(run(compiled, seed=seed), expected[seed].double()) < 1e-4
    assert counter.frame_count == (2 if rule in MOMENTUM else 1)  # a call with nothing before it, and any other


# A rule of one's own


def test_a_rule_of_ones_own_gets_what_the_documents_say(denoiser):
    def interval(u, g, cond_scale, x, sigma):
        inside = (sigma > 1.0) & (sigma < 5.0)
        return torch.where(inside[:, None, None, None], u + (g - u) * cond_scale, g)

    x, sigma, cond, uncond = inputs()
    sigma = torch.tensor([0.5, 3.0])
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    guided = ksag.SAGDenoiser(denoiser, 0.8, blur_kernel_size=5, cfg_rule=interval)
    formula = lambda u, g, w, x, sigma: np.stack([g[0], u[1] + w * (g[1] - u[1])])  # noqa: E731
    assert relative(guided(x, sigma, **args), Reference(denoiser, formula, 0.8)(x, sigma, **args).double()) < 1e-5
    assert "cfg_rule=interval" in repr(guided).replace("'", "")


class OneBuffer(nn.Module):
    """A denoiser that answers in the same memory every time, as a CUDA graph does."""

    def __init__(self, inner_model):
        super().__init__()
        self.inner_model = inner_model
        self.register_buffer("memory", torch.empty(6 * 3 * 6 * 8), persistent=False)

    def forward(self, x, sigma, **kwargs):
        return self.memory[: x.numel()].view_as(x).copy_(self.inner_model(x, sigma, **kwargs))


RETURNS = {
    "u": lambda u, g, cond_scale, x, sigma: u,
    "a view of u": lambda u, g, cond_scale, x, sigma: u.view(u.shape),
    "g": lambda u, g, cond_scale, x, sigma: g,
    "a view of g": lambda u, g, cond_scale, x, sigma: g.view(g.shape),
    "plain guidance": cfg.plain,
}


@pytest.mark.parametrize("batch_cond", [True, False])
@pytest.mark.parametrize("sag_scale", [0.0, 0.8])
@pytest.mark.parametrize("returns", RETURNS)
def test_a_prediction_that_the_next_pass_overwrites(denoiser, returns, sag_scale, batch_cond):
    x, sigma, cond, uncond = inputs()
    args = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    options = {"cfg_rule": RETURNS[returns], "batch_cond": batch_cond}

    def wrap(denoiser):
        directions = [ksag.SAG(sag_scale, blur_kernel_size=5), ksag.PAG(2 * sag_scale, LAYERS[1])]
        return ksag.GuidedDenoiser(denoiser, directions, **options)

    expected = wrap(denoiser)(x, sigma, **args)
    guided = wrap(OneBuffer(denoiser))
    result = guided(x, sigma, **args)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    guided(x * 2, sigma, **args)  # samplers keep the result of the call before
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sag_scale", [0.0, 0.8])
@pytest.mark.parametrize("conditional", [True, False])
def test_an_only_prediction_that_the_next_call_overwrites(denoiser, sag_scale, conditional):
    x, sigma, cond, _ = inputs()
    args = {"cond": cond} if conditional else {}
    expected = ksag.SAGDenoiser(denoiser, sag_scale, blur_kernel_size=5)(x, sigma, **args)
    guided = ksag.SAGDenoiser(OneBuffer(denoiser), sag_scale, blur_kernel_size=5)
    result = guided(x, sigma, **args)
    guided(x * 2, sigma, **args)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sag_scale", [0.0, 0.8])
@pytest.mark.parametrize(
    "returned",
    [lambda u: None, lambda u: u.mean(), lambda u: u[:, :1], lambda u: u.numpy()],
    ids=["None", "scalar", "channel", "array"],
)
def test_a_rule_that_returns_no_latent_is_a_clear_error(denoiser, returned, sag_scale):
    x, sigma, cond, uncond = inputs()
    guided = wrap(denoiser, "plain", sag_scale=sag_scale)
    guided.cfg_rule = lambda u, g, cond_scale, x, sigma: returned(u)
    with pytest.raises((TypeError, ValueError), match=r"cfg_rule.*\(2, 3, 6, 8\)"):
        guided(x, sigma, cond=cond, uncond=uncond, cond_scale=4.0)


def test_rescale_finds_a_flow_matching_model_inside_a_wrapper():
    class Around(nn.Module):
        def __init__(self, inner_model):
            super().__init__()
            self.inner_model = inner_model

    model = Around(Around(ksag.FlowDenoiser(nn.Identity())))
    cfg.rescale(flow=True).check_model(model)
    with pytest.raises(ValueError, match="flow=True"):
        cfg.rescale().check_model(model)


def test_the_class_in_place_of_a_rule_is_a_clear_error(denoiser):
    with pytest.raises((TypeError, ValueError), match=r"cfg_rule.*apg"):
        ksag.SAGDenoiser(denoiser, cfg_rule=cfg.apg)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cfg.rescale(1.5), "phi is the share of the rescaled prediction, 0 to 1, got 1.5"),
        (lambda: cfg.rescale(float("nan")), "phi .*got nan"),
        (lambda: cfg.rescale("half"), "phi must be a number, got the str 'half'"),
        (lambda: cfg.apg(eta=float("inf")), "eta must be a finite number"),
        (lambda: cfg.apg(norm_threshold=0), "norm_threshold is a length greater than 0, or None for no limit, got 0"),
        (lambda: cfg.apg(norm_threshold=float("nan")), "norm_threshold .*got nan"),
        (lambda: cfg.apg(momentum=1.0), "momentum is more than -1 and less than 1, got 1.0"),
        (lambda: cfg.apg(momentum=float("nan")), "momentum .*got nan"),
    ],
)
def test_a_parameter_out_of_range_is_a_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
