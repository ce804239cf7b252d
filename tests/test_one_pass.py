"""SAG in one pass, and directions that are reused between calls: runs under every sampler against the formulas.

The formulas are written once more here, in float64, one sample after another. The model computes in float64 too, so that rounding
moves no token across the threshold.
"""

import threading

import k_diffusion as K
import pytest
import torch
import torchdiffeq
from torch import nn

import ksag
from ksag import cfg
from ksag.guidance.runs import Memory
from ksag.guidance.sag import overlap
from ksag.samplers import SAMPLERS, sample
from tests import forms, reference
from tests.forms import relative

SIZE = GRID = (6, 8)
FORMS = [
    pytest.param({"one_pass": True}, id="one pass"),
    pytest.param({"every": 2}, id="every 2"),
    pytest.param({"every": 3}, id="every 3"),
    pytest.param({"one_pass": True, "every": 3}, id="one pass, every 3"),
]


class InDouble(nn.Module):
    """The tiny denoiser, computing in float64, and the batch of every call."""

    def __init__(self):
        super().__init__()
        self.inner = forms.tiny().double()
        self.batches = []

    def forward(self, x, sigma, cond=None, **kwargs):
        self.batches.append(x.shape[0])
        cond = None if cond is None else cond.double()
        return self.inner(x.double(), sigma.double(), cond, **kwargs).to(x.dtype)


def inputs(batch=2, sigma=3.0):
    """x, sigma, and the arguments of a call."""
    x, args = forms.latents(batch)
    return x * sigma, torch.full((batch,), sigma), {**args, "cond_scale": 3.0}


class Unseen(nn.Module):
    """Calls a model that `sample` cannot find in it, and so does not reset."""

    def __init__(self, call):
        super().__init__()
        self.call = [call]

    def forward(self, *args, **kwargs):
        return self.call[0](*args, **kwargs)


class Reference(nn.Module):
    """The formulas for one pass, and for a difference of noise predictions that later calls reuse, for each sample."""

    def __init__(self, model, sag_scale=0.8, one_pass=False, every=1, sigma_range=(0.0, float("inf")), rule=None):
        super().__init__()
        self.model, self.sag_scale, self.one_pass, self.every, self.sigma_range = model, sag_scale, one_pass, every, sigma_range
        self.rule = rule or (lambda u, g, w, x, sigma: u + w * (g - u))
        self.runs = {}

    def forward(self, x, sigma, cond=None, uncond=None, cond_scale=1.0):
        rows = [self.one(i, x[i : i + 1], sigma[i : i + 1], *(c if c is None else c[i : i + 1] for c in (cond, uncond)), cond_scale)
                for i in range(len(x))]  # fmt: skip
        return torch.cat(rows).to(x.dtype)

    def one(self, i, x, sigma, cond, uncond, cond_scale):
        def D(x, c):
            return self.model.inner(x.double(), sigma.double(), None if c is None else c.double())

        base = cond if uncond is None else uncond
        u, attention = reference.applied_attention(lambda: D(x, base), 0)
        guided = u if uncond is None else self.rule(u, D(x, cond), cond_scale, x.double(), sigma.double())
        if not self.sigma_range[0] <= sigma <= self.sigma_range[1]:
            self.runs.pop(i, None)
            return guided
        run = self.runs.get(i)
        if run is None or sigma > 1.5 * run["sigma"]:
            run = {"n": 0, "delta": torch.zeros_like(u), "epsilon": torch.zeros_like(u)}
        mask = reference.upsampled((reference.saliency_of(attention, GRID) > 1).double(), SIZE)
        d = mask * reference.blurred(u, 1.5, 5) + (1 - mask) * u
        epsilon = run["epsilon"]
        if self.one_pass and run["n"] % self.every == 1 % self.every:
            before, now = run["delta"].flatten(), (u - d).flatten()
            common = (before @ now / (before @ before)).clamp(0, 1) if before.any() else 0.0
            epsilon = common * (u - run["delta"] - D(x.double() - run["delta"], base)) / sigma
        elif not self.one_pass and run["n"] % self.every == 0:
            epsilon = (d - D(d + (x.double() - u), base)) / sigma
        self.runs[i] = {"n": run["n"] + 1, "sigma": sigma, "delta": u - d, "epsilon": epsilon}
        return guided + self.sag_scale * epsilon * sigma


@pytest.fixture
def model():
    return InDouble()


def wrap(model, **options):
    return ksag.SAGDenoiser(model, **{"sag_scale": 0.8, "blur_sigma": 1.5, "blur_kernel_size": 5, **options})


def conditions(cond_scale=3.0):
    generator = torch.Generator().manual_seed(5)
    return {"cond": torch.randn(2, 4, generator=generator), "uncond": torch.zeros(2, 4), "cond_scale": cond_scale}


SIGMAS = K.sampling.get_sigmas_karras(7, 0.1, 10.0)


def run(model, sampler="euler", seeds=(0, 1), args=None, sigmas=SIGMAS, size=SIZE):
    return sample(sampler, model, (3, *size), sigmas, seeds, conditions() if args is None else args)


# The formulas


ONE_PASS, EVERY_3, BOTH = {"one_pass": True}, {"every": 3}, {"one_pass": True, "every": 3}
UNDER_SAMPLERS = [
    *((sampler, ONE_PASS) for sampler in SAMPLERS),
    *((sampler, form) for sampler in ("heun", "dpmpp_2m", "dpmpp_sde") for form in (EVERY_3, BOTH)),
]
MORE = [(sampler, form) for sampler in SAMPLERS for form in (EVERY_3, BOTH) if (sampler, form) not in UNDER_SAMPLERS]


@pytest.mark.parametrize(("sampler", "form"), [*UNDER_SAMPLERS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_a_run_is_what_the_formulas_give(model, sampler, form):
    expected = run(Reference(model, **form), sampler)
    assert relative(run(wrap(model, **form), sampler), expected) < 1e-5
    assert relative(run(Reference(model), sampler), expected) > 1e-3  # exact SAG is another image


@pytest.mark.parametrize("form", FORMS)
def test_under_as_much_churn_as_heun_can_have(model, form):
    def image(denoiser):
        torch.manual_seed(3)
        return K.sampling.sample_heun(denoiser, x, SIGMAS, conditions(), disable=True, s_churn=20.0)

    x = torch.randn(2, 3, *SIZE) * SIGMAS[0]
    assert relative(image(wrap(model, **form)), image(Reference(model, **form))) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("args", [{}, {"cond": conditions()["cond"]}], ids=["no cond", "cond alone"])
def test_one_prediction_is_both_u_and_cfg(model, form, args):
    assert relative(run(wrap(model, **form), args=args), run(Reference(model, **form), args=args)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("sigma_range", [(0.3, 4.0), (0.0, 0.2), (1.0, float("inf"))])
def test_a_run_that_enters_and_leaves_the_range(model, form, sampler, sigma_range):
    expected = run(Reference(model, **form, sigma_range=sigma_range), sampler)
    assert relative(run(wrap(model, **form, sigma_range=sigma_range), sampler), expected) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_beside_another_rule(model, form):
    expected = run(Reference(model, **form, rule=cfg.rescale(0.7)))
    assert relative(run(wrap(model, **form, cfg_rule=cfg.rescale(0.7))), expected) < 1e-5
    momentum = run(Reference(model, **form, rule=PerSample()))
    assert relative(run(wrap(model, **form, cfg_rule=cfg.apg())), momentum) < 1e-5


class PerSample:
    """`cfg.apg` with a momentum for each of the samples that `Reference` computes one by one."""

    def __init__(self):
        self.rules, self.calls = [cfg.apg(), cfg.apg()], 0

    def __call__(self, *args):
        self.calls += 1
        return self.rules[(self.calls - 1) % 2](*args)


@pytest.mark.parametrize("form", FORMS)
def test_image_to_image(model, form):
    x = torch.randn(2, 3, *SIZE) * SIGMAS[3]
    guided, expected = wrap(model, **form), Reference(model, **form)
    images = [K.sampling.sample_euler(denoiser, x, SIGMAS[3:], conditions(), disable=True) for denoiser in (guided, expected)]
    assert relative(*images) < 1e-5


def test_with_this_calls_delta_it_is_exact_sag(model):
    """A second call at the same x and sigma has it."""
    x, sigma, args = inputs()
    guided, exact = wrap(model, one_pass=True), wrap(model)(x, sigma, **args)
    first, second = guided(x, sigma, **args), guided(x, sigma, **args)
    assert relative(first, wrap(model)(x, sigma, **args, sag_scale=0.0)) < 1e-6
    assert relative(second, exact) < 1e-6
    assert relative(first, exact) > 1e-3


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_a_direction_kept_for_one_call_is_that_of_every_call(model, sampler):
    assert torch.equal(run(wrap(model, every=1), sampler), run(wrap(model), sampler))


# What the model is asked


@pytest.mark.parametrize(("options", "batches"), [
    ({"one_pass": True}, [6] * 6),
    ({"every": 2}, [4, 2, 4, 4, 2, 4, 4, 2, 4]),
    ({"one_pass": True, "every": 2}, [4, 6, 4, 6, 4, 6]),
    ({"one_pass": True, "every": 3}, [4, 6, 4, 4, 6, 4]),
    ({"one_pass": True, "batch_cond": False}, [2, 2, 2] * 6),
    ({"one_pass": True, "sigma_range": (0.0, 1.0)}, [4, 4, 4, 6, 6, 6]),
    ({"one_pass": True, "sag_scale": 0.0}, [4] * 6),
])  # fmt: skip
def test_the_number_and_the_size_of_the_models_calls(model, options, batches):
    run(wrap(model, **options), sigmas=torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.0]))
    assert model.batches == batches


@pytest.mark.parametrize("form", FORMS)
def test_cond_and_uncond_that_cannot_be_batched(form):
    class Adds(nn.Module):  # a stand-in for a model that takes prompts of any length
        def __init__(self):
            super().__init__()
            self.inner, self.batches = forms.tiny().double(), []

        def forward(self, x, sigma, cond):
            self.batches.append(x.shape[0])
            return self.inner(x.double(), sigma.double(), cond.mean(1).double()).to(x.dtype)

    generator = torch.Generator().manual_seed(1)
    short, long = (torch.randn(2, n, 4, generator=generator) for n in (3, 5))
    args = {"cond": long, "uncond": short, "cond_scale": 3.0}
    of_means = {"cond": long.mean(1), "uncond": short.mean(1), "cond_scale": 3.0}
    adds = Adds()
    result = run(wrap(adds, **form), args=args)
    assert relative(result, run(Reference(InDouble(), **form), args=of_means)) < 1e-5
    assert (4 in adds.batches) == ("one_pass" in form)  # uncond, of x and of x − δ'


@pytest.mark.parametrize("form", FORMS)
def test_batch_cond_changes_nothing(model, form):
    assert relative(run(wrap(model, **form, batch_cond=False)), run(wrap(model, **form))) < 1e-6


# A run begins


@pytest.mark.parametrize(("sampler", "form"), [case for case in UNDER_SAMPLERS if case[1] != EVERY_3])
def test_two_runs_after_each_other_are_two_runs_alone(sampler, form):
    """Without `reset`, which `sample` would call."""
    sigmas, denoiser = K.sampling.get_sigmas_karras(4, 0.1, 10.0), forms.tiny()
    guided = wrap(denoiser, **form)
    for seeds in [0, 1], [2, 3]:
        alone = run(wrap(denoiser, **form), sampler, seeds, sigmas=sigmas)
        assert torch.equal(run(Unseen(guided), sampler, seeds, sigmas=sigmas), alone)


def after(model, form, between, second=None, calls=2):
    """The images of a run that follows half another one and what comes between; and alone."""
    guided = wrap(model, **form)
    x, sigma, args = inputs()
    for i in range(5):
        guided(x, sigma * 0.9**i, **args)
    between(guided, x, sigma, args)
    x, sigma, args = second or (x.flip(0), sigma * 0.5, args)

    def images(guided):
        return torch.stack([guided(x, sigma * 0.9**i, **args) for i in range(calls)])

    return images(guided), images(wrap(model, **form))


def nothing(guided, x, sigma, args):
    pass


def reset(guided, x, sigma, args):
    guided.reset()


def an_error(guided, x, sigma, args):
    fail(guided, x, sigma, args, lambda: 1 / 0, ZeroDivisionError)


def ctrl_c(guided, x, sigma, args):
    def interrupt():
        raise KeyboardInterrupt

    fail(guided, x, sigma, args, interrupt, KeyboardInterrupt)


def fail(guided, x, sigma, args, raise_, error):
    handle = guided.inner_model.register_forward_hook(lambda *_: raise_())
    with pytest.raises(error):
        guided(x, sigma * 0.55, **args)
    handle.remove()


def a_call_out_of_range(guided, x, sigma, args):
    guided.sigma_range = (0.0, 1.0)
    guided(x, sigma, **args)
    guided.sigma_range = (0.0, float("inf"))


def a_plain_call(guided, x, sigma, args):
    guided(x, sigma * 0.55, **args, sag_scale=0.0)


def another_form(guided, x, sigma, args):
    one_pass, every = guided.one_pass, guided.every
    guided.one_pass, guided.every = False, 1
    guided(x, sigma * 0.55, **args)
    guided.one_pass, guided.every = one_pass, every


def another_size(guided, x, sigma, args):
    guided(x[..., :6], sigma * 0.55, **args)


def another_batch(guided, x, sigma, args):
    guided(x[:1], sigma[:1] * 0.6, **{**args, "cond": args["cond"][:1], "uncond": args["uncond"][:1]})


def another_dtype(guided, x, sigma, args):
    guided(x.double(), sigma * 0.55, **args)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "between",
    [reset, an_error, ctrl_c, a_call_out_of_range, a_plain_call, another_form, another_size, another_batch, another_dtype],
)
def test_what_begins_a_run(model, form, between):
    went_on, alone = after(model, form, nothing)
    assert relative(went_on, alone) > 1e-4
    assert torch.equal(*after(model, form, between))


@pytest.mark.parametrize("form", FORMS)
def test_a_higher_sigma_begins_a_run_and_churn_does_not(model, form):
    x, sigma, args = inputs()
    assert torch.equal(*after(model, form, nothing, (x, sigma * 0.9**4 * 1.6, args)))
    assert relative(*after(model, form, nothing, (x, sigma * 0.9**4 * 2**0.5, args))) > 1e-4


def test_each_sample_begins_its_own_run(model):
    x, sigma, args = inputs()
    guided, oracle = wrap(model, one_pass=True), Reference(model, one_pass=True)
    for factors in [1.0, 1.0], [0.9, 0.9], [2.0, 0.8], [1.8, 0.7]:
        sigmas = sigma * torch.tensor(factors)
        assert relative(guided(x, sigmas, **args), oracle(x, sigmas, **args)) < 1e-6


def test_each_sample_enters_the_range_by_itself(model):
    x, sigma, args = inputs()
    options = {"one_pass": True, "sigma_range": (0.0, 3.0)}
    guided, oracle = wrap(model, **options), Reference(model, **options)
    for factors in [1.2, 1.0], [1.1, 0.9], [0.99, 0.8], [0.9, 0.7]:
        sigmas = sigma * torch.tensor(factors)
        assert relative(guided(x, sigmas, **args), oracle(x, sigmas, **args)) < 1e-6


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_sample_that_left_the_range_is_plain_while_another_is_inside(model, form):
    x, sigma, args = inputs()
    guided = wrap(model, **form, sigma_range=(1.0, 12.0))
    for sigmas in [1.3, 5.0], [1.2, 4.0], [0.9, 3.0], [0.8, 2.0]:
        sigma = torch.tensor(sigmas)
        result = guided(x, sigma, **args)
        if sigmas[0] < 1:
            plain = wrap(model)(x, sigma, **args, sag_scale=0.0)
            assert relative(result[0], plain[0]) < 1e-6 and relative(result[1], plain[1]) > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_threads_have_runs_of_their_own(model, form):
    guided = wrap(model, **form)
    alone = [run(wrap(model, **form), seeds=seeds) for seeds in ([0, 1], [2, 3])]
    barrier, results = threading.Barrier(2, timeout=120), {}

    def work(i):
        def in_turns(*args, **kwargs):
            barrier.wait()
            return guided(*args, **kwargs)

        results[i] = run(Unseen(in_turns), seeds=[[0, 1], [2, 3]][i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[0], alone[0]) and torch.equal(results[1], alone[1])


@pytest.mark.parametrize("form", FORMS)
def test_another_wrapper_on_the_same_model_is_another_run(model, form):
    x, sigma, args = inputs()
    one, other = wrap(model, **form), wrap(model, **form)
    alone = [one(x, sigma * s, **args) for s in (1.0, 0.9, 0.8)]
    one.reset()
    for s, expected in zip((1.0, 0.9, 0.8), alone, strict=True):
        assert torch.equal(one(x, sigma * s, **args), expected)
        other(x.flip(0), sigma * s, **args)


@pytest.mark.parametrize("form", FORMS)
def test_log_likelihood_runs_upwards(form, monkeypatch):
    def fixed_steps(*args, atol, rtol, method):  # an adaptive solver takes up to hundreds, as rounding has it
        return torchdiffeq.odeint(*args, method="rk4", options={"step_size": 1.0})

    monkeypatch.setattr(K.sampling, "odeint", fixed_steps)

    def likelihood(guided):
        torch.manual_seed(0)
        x, *_ = inputs(1)
        return K.sampling.log_likelihood(guided, x / 3, 0.1, 10.0, extra_args={})[0]

    guided = wrap(forms.tiny(), **form)
    first = likelihood(guided)
    assert first.isfinite().all()
    guided.reset()  # it ends high, so that the next run would not be seen to begin
    assert torch.equal(likelihood(guided), first)


def test_half_precision_holds_the_sums_of_what_two_calls_have_in_common():
    delta = torch.full((1, 4, 64, 64), 20.0, dtype=torch.float16)  # its square sums to 6.6 million
    assert overlap(delta, delta) == 1 and overlap(delta, delta / 2) == 0.5 and overlap(delta, -delta) == 0


def test_a_direction_is_kept_between_noise_levels_in_integers():
    memory = Memory()
    memory.keep(torch.tensor([4]), torch.ones(1, 1, 1, 1))
    assert memory.last(torch.tensor([2]), torch.zeros(1, 1, 1, 1), with_sigma=True).item() == 0.5


def test_a_direction_kept_at_sigma_zero_stays_finite():
    run = Memory()
    for sigma in 0.0, 1.0:
        run.keep(torch.zeros(1), torch.ones(1, 3, 2, 2))
        assert run.last(torch.tensor([sigma]), torch.ones(1, 3, 2, 2), with_sigma=True).eq(0).all()


# Beside everything else


def test_the_trace_has_a_step_for_each_direction(model):
    x, sigma, args = inputs()
    guided = wrap(model, one_pass=True)
    with guided.trace() as steps:
        results = [guided(x, sigma * s, **args) for s in (1.0, 0.9)]
    taken_away = steps[0].mask * (steps[0].uncond - reference.blurred(steps[0].uncond, 1.5, 5))
    assert relative(steps[1].uncond - steps[1].degraded, taken_away) < 1e-4
    plain = wrap(model)(x, sigma * 0.9, **args, sag_scale=0.0)
    assert relative(results[1], plain + 0.8 * (steps[1].degraded - steps[1].reevaluated)) < 1e-6


@pytest.mark.parametrize(("form", "steps"), [({"every": 3}, 2), ({"one_pass": True, "every": 3}, 2), ({"one_pass": True}, 6)])
def test_tracing_changes_nothing(model, form, steps):
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.0])
    guided = wrap(model, **form)
    untraced = run(guided, sigmas=sigmas)
    with guided.trace() as trace:
        assert torch.equal(run(guided, sigmas=sigmas), untraced)
    assert len(trace) == steps
    for step in trace:
        assert step.saliency.mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_other_settings_from_call_to_call(model, form):
    x, sigma, args = inputs()
    guided = wrap(model, **form)
    for i in range(5):
        guided(x, sigma * 0.9**i, **args)
    by_call = wrap(model, **form)
    for i in range(5):
        result = by_call(x, sigma * 0.9**i, **args, sag_scale=0.8, blur_sigma=1.5, mask_threshold=1.0)
    guided.reset()
    for i in range(5):
        expected = guided(x, sigma * 0.9**i, **args)
    assert torch.equal(result, expected)
    assert not torch.equal(by_call(x, sigma * 0.5, **args, blur_sigma=0.5, sag_scale=2.0), guided(x, sigma * 0.5, **args))


@pytest.mark.parametrize("form", FORMS)
def test_autocast_keeps_the_run(form):
    """The model returns half precision then, and the latent is float32."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = forms.tiny()

        def forward(self, x, sigma, **kwargs):
            return self.inner(x, sigma, **kwargs).bfloat16()

    x, sigma, args = inputs()
    guided, exact = wrap(Half(), **form, sag_scale=2.0), wrap(Half(), sag_scale=2.0)
    for _ in range(2 if form.get("one_pass") else 1):
        result = guided(x, sigma, **args)
    assert result.dtype == torch.bfloat16
    plain = exact(x, sigma, **args, sag_scale=0.0)
    assert relative(result - plain, exact(x, sigma, **args) - plain) < 0.05
