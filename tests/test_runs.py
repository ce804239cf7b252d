"""What is kept between calls is kept for each run and sample: other runs, earlier runs and other threads do not affect it."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn

import ksag
from ksag import cfg
from tests.forms import FORMS, LAYERS, SIGMAS, latents, plain, relative, run, sag, tiny, wrap
from tests.models import hooks

gc.freeze()  # so that gc.collect() looks at what a test made, and not at all of PyTorch

KEEPS = ["SAG in one pass", "SAG, every 2nd call", "SAG in one pass, PAG and SEG", "PAG, every 3rd call", "a rule's momentum"]
"""The forms in which a call depends on those before it."""


def make(form, model=None):
    model = tiny() if model is None else model
    if form == "PAG, every 3rd call":
        return ksag.GuidedDenoiser(model, ksag.PAG(0.7, LAYERS, every=3))
    if form == "a rule's momentum":
        return ksag.GuidedDenoiser(model, ksag.PAG(0.7, LAYERS[0]), cfg_rule=cfg.apg())
    return wrap(form, model)


@pytest.fixture(params=KEEPS)
def form(request):
    return request.param


def steps(seed, denoiser):
    """The calls of a run, one by one."""
    x, args = latents(seed=seed)
    for i, sigma in enumerate(SIGMAS):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed * 10 + i))
        yield denoiser(x + noise * sigma, torch.full((2,), sigma), **args)


def image(seed, denoiser):
    return torch.stack(list(steps(seed, denoiser)))


def alone(form, seed):
    return image(seed, make(form))


# A run of its own


def interleaved(*denoisers):
    """The calls of two runs, alternating."""
    both = [steps(seed, denoiser) for seed, denoiser in enumerate(denoisers)]
    pairs = list(zip(*both, strict=True))
    return [torch.stack([pair[i] for pair in pairs]) for i in range(2)]


def test_interleaved_runs_are_the_runs_alone(form):
    guided = make(form)
    results = interleaved(guided.run(), guided.run())
    assert all(torch.equal(result, alone(form, seed)) for seed, result in enumerate(results))
    disturbed = interleaved(guided, guided)  # called directly, they are taken for one run
    assert relative(disturbed[1], results[1]) > 1e-4


def test_a_run_or_a_copy_of_a_wrapper_with_compile_does_not_call_the_wrapper():
    guided = wrap("PAG")
    guided.compile(backend=lambda *_: pytest.fail("the wrapper was called"))
    run_of_it, copied = guided.run(), pickle.loads(pickle.dumps(guided))
    assert torch.equal(run(run_of_it), run(wrap("PAG"))) and torch.equal(run(copied), run(run_of_it))


def test_the_wrapper_itself_goes_on_with_its_own_run_beside_others(form):
    guided = make(form)
    direct, other = interleaved(guided, guided.run())
    assert torch.equal(direct, alone(form, 0)) and torch.equal(other, alone(form, 1))


def test_a_run_moves_between_threads(form):
    one_run, results = make(form).run(), []
    calls = steps(0, one_run)
    for _ in SIGMAS:
        thread = threading.Thread(target=lambda: results.append(next(calls)))
        thread.start()
        thread.join()
    assert torch.equal(torch.stack(results), alone(form, 0))


def test_runs_in_several_threads_at_once(form):
    guided, results = make(form), {}
    barrier = threading.Barrier(3, timeout=60)

    def work(seed):
        calls, images = steps(seed, guided.run()), []
        for _ in SIGMAS:
            barrier.wait()
            images.append(next(calls))
        results[seed] = torch.stack(images)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        assert relative(results[seed], alone(form, seed)) < 1e-6


def test_each_run_begins_anew_whatever_was_left_by_others(form):
    guided = make(form)
    calls = steps(0, guided.run())
    next(calls), next(calls)  # given up
    assert torch.equal(image(1, guided.run()), alone(form, 1))


def test_reset_of_a_run_is_its_own(form):
    guided = make(form)
    first, other = guided.run(), guided.run()
    calls, others = steps(0, first), steps(1, other)
    results = [next(others), next(others)]
    next(calls), next(calls)
    first.reset()
    assert torch.equal(image(2, first), alone(form, 2))
    assert torch.equal(torch.stack([*results, *others]), alone(form, 1))


def test_a_run_shares_settings_model_and_traces():
    guided = wrap("SAG and PAG")
    one_run = guided.run()
    guided.directions[1].scale = 0.1
    with guided.trace() as traced:
        result = run(one_run)
    assert torch.equal(result, run(guided)) and len(traced) == 8
    assert repr(one_run) == repr(guided)
    assert one_run.inner_model is guided.inner_model and hooks(guided.inner_model) > 0
    guided.close()
    with pytest.raises(RuntimeError, match="was closed"):
        run(one_run)


def test_a_run_keeps_the_hooks_of_a_wrapper_that_is_dropped():
    model = tiny()
    expected = run(wrap("PAG"))
    one_run = wrap("PAG", model).run()
    gc.collect()
    assert torch.equal(run(one_run), expected)
    of_run = one_run.run()
    del one_run
    gc.collect()
    assert torch.equal(run(of_run), expected)
    del of_run
    gc.collect()
    assert hooks(model) == 0


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_run_is_a_wrapper_of_its_own(form, copied):
    one_run = make(form).run()
    calls = steps(0, one_run)
    first = [next(calls), next(calls)]
    twin = copied(one_run)
    assert torch.equal(image(1, twin), alone(form, 1))
    assert torch.equal(torch.stack([*first, *calls]), alone(form, 0))
    twin.close()
    assert hooks(one_run.inner_model) > 0


def test_a_run_of_sag_denoiser_has_its_settings():
    guided = ksag.SAGDenoiser(tiny(), 0.8, blur_kernel_size=5, one_pass=True)
    one_run = guided.run()
    assert isinstance(one_run, ksag.SAGDenoiser) and one_run.sag_scale == 0.8
    guided.sag_scale = 0.25
    assert one_run.sag_scale == 0.25


# What ends a run that the wrapper has for a thread


def after(form, between):
    """The calls of a run after one call of another and what comes between, which sigma does not tell apart; and alone."""
    guided = make(form)
    next(steps(0, guided))
    between(guided)
    x, args = latents(seed=1)
    return image_from(x, guided, args), image_from(x, make(form), args)


def image_from(x, guided, args):
    return torch.stack([guided(x * sigma, torch.full((2,), sigma), **args) for sigma in (2.9, 2.0, 1.5)])


def test_without_anything_between_the_run_goes_on(form):
    went_on, fresh = after(form, lambda guided: None)
    assert relative(went_on, fresh) > 1e-4


BAD = {
    "a latent of another kind": {"x": torch.zeros(3)},
    "sigma for too many": {"sigma": torch.ones(3)},
    "no uncond": {"uncond": None},
    "a scale that is no number": {"cond_scale": float("nan")},
    "a strength that is no number": {"pag_scale": "strong"},
    "a keyword of nobody": {"strength": 1.0},
}


@pytest.mark.parametrize("bad", BAD)
def test_an_error_of_the_input_checks_ends_it(form, bad):
    def fails(guided):
        x, args = latents()
        with pytest.raises((ValueError, TypeError)):
            guided(**{"x": x, "sigma": torch.full((2,), 2.9), **args, **BAD[bad]})

    assert torch.equal(*after(form, fails))


def test_a_nan_of_a_run_that_was_given_up_does_not_reach_the_next(form):
    def diverges(guided):
        x, args = latents()
        assert guided(x * torch.nan, torch.full((2,), 2.9), **args).isnan().all()

    next_run, fresh = after(form, diverges)
    assert next_run.isfinite().all()
    if form not in ("SAG, every 2nd call", "PAG, every 3rd call"):  # where the count of calls goes on
        assert torch.equal(next_run, fresh)
    guided = make(form)
    diverges(guided)
    assert torch.equal(image(1, guided.run()), alone(form, 1))
    guided.reset()
    assert torch.equal(image(1, guided), alone(form, 1))


# Samples do not see their neighbours

HISTORIES = {
    "goes on": (4.0, 3.0, 2.5, 2.0, 1.5, 1.2, 1.0, 0.8),
    "begins again": (4.0, 3.0, 2.5, 9.0, 7.0, 6.0, 4.0, 3.0),
    "begins again often": (1.0, 4.0, 1.0, 4.0, 3.0, 2.0, 9.0, 1.5),
    "rises a little": (2.0, 2.8, 2.0, 2.8, 2.0, 2.8, 2.0, 2.8),
}
OF_NEIGHBOURS = {
    **FORMS,
    "SAG, every 3rd call": lambda: [sag(every=3)],
    "SAG in one pass, every 3rd call": lambda: [sag(one_pass=True, every=3)],
    "PAG, every 3rd call, in a range": lambda: [ksag.PAG(0.7, LAYERS, every=3, sigma_range=(1.9, 5.0))],
    "SAG in one pass, in a range": lambda: [sag(one_pass=True, sigma_range=(1.9, 5.0))],
    "SAG in one pass, every 3rd call, in a range, and SEG": lambda: [
        sag(one_pass=True, every=3, sigma_range=(1.9, 5.0)), ksag.SEG(0.9, 1.0, LAYERS[1], every=2, sigma_range=(0.0, 3.0)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", OF_NEIGHBOURS)
def test_each_sample_is_as_it_is_alone(name):
    model, sigmas = tiny().double(), torch.tensor(list(HISTORIES.values())).double().T
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(sigmas), 4, 3, 6, 8, generator=generator).double() * 2
    cond, uncond = torch.randn(2, 4, 4, generator=generator).double()

    def images(rows):
        guided = ksag.GuidedDenoiser(model, OF_NEIGHBOURS[name](), cfg_rule=cfg.apg())
        args = {"cond": cond[rows], "uncond": uncond[rows], "cond_scale": 2.0}
        return torch.stack([guided(latent[rows], sigma[rows], **args) for latent, sigma in zip(x, sigmas, strict=True)])

    together, reordered = images(slice(None)), images([2, 0, 3, 1])
    for row in range(4):
        single = images(slice(row, row + 1))
        assert relative(together[:, row : row + 1], single) < 1e-12
        where = [2, 0, 3, 1].index(row)
        assert relative(reordered[:, where : where + 1], single) < 1e-12
    assert relative(together[:, 0], together[:, 1]) > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_every_1_is_every_call(form):
    expected = run(wrap(form))
    guided = wrap(form)
    for direction in guided.directions:
        if direction.every == 2:
            direction.every = 1
            assert not torch.equal(run(guided), expected)
            expected = run(ksag.GuidedDenoiser(tiny(), sag()))
    assert torch.equal(run(guided), expected)
    assert not torch.equal(expected, plain(guided))


class SinceLast(ksag.Direction):
    """Goes on in the direction in which the prediction moved since the run's last call."""

    name = "since last"

    def direction(self, call, answers):
        before = call.last(like=call.u)
        call.remember(call.u)
        return call.u - before


class OneBuffer(nn.Module):
    """A model that returns the same tensor every time, as one does that was compiled with mode="reduce-overhead"."""

    def __init__(self, inner_model):
        super().__init__()
        self.inner_model, self.buffers_by_shape = inner_model, {}

    def forward(self, x, sigma, cond):
        denoised = self.inner_model(x, sigma, cond)
        return self.buffers_by_shape.setdefault(x.shape, torch.empty_like(denoised)).copy_(denoised)


def test_what_a_direction_remembers_outlives_the_models_own_tensors():
    expected = run(ksag.GuidedDenoiser(tiny(), SinceLast(0.5)))
    assert torch.equal(run(ksag.GuidedDenoiser(OneBuffer(tiny()), SinceLast(0.5))), expected)
