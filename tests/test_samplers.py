"""Every sampler of k-diffusion takes a guided denoiser as it takes any model."""

import inspect

import k_diffusion as K
import pytest
import torch
from torch import nn

import ksag
from ksag import zoo
from ksag.samplers import SAMPLERS, sample
from tests import forms, reference

EXPECTED_SAMPLERS = {
    "euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral",
    "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde",
}  # fmt: skip


@pytest.fixture
def denoiser():
    return forms.tiny()


class Reference(nn.Module):
    """SAG's steps, computed independently, as a model for the same samplers."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x, sigma, cond, uncond, cond_scale):
        def D(x, c):
            return self.denoiser(x, sigma, c)

        return reference.sag(D, x, cond, uncond, cond_scale, 0.5, 2.0, 5, grid=(6, 8)).to(x.dtype)


def test_all_of_k_diffusions_samplers_are_named():
    of_k_diffusion = {name.removeprefix("sample_") for name, _ in inspect.getmembers(K.sampling) if name.startswith("sample_")}
    assert set(SAMPLERS) == EXPECTED_SAMPLERS == of_k_diffusion


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_gives_the_image_of_the_reference(denoiser, sampler):
    _, args = forms.latents()
    sigmas = K.sampling.get_sigmas_karras(6, 0.05, 10.0)
    guided = ksag.SAGDenoiser(denoiser, blur_kernel_size=5)
    with guided.trace() as steps:
        result = sample(sampler, guided, (3, 6, 8), sigmas, [0, 1], args)
    expected = sample(sampler, Reference(denoiser), (3, 6, 8), sigmas, [0, 1], args)
    unguided = sample(sampler, guided, (3, 6, 8), sigmas, [0, 1], {**args, "sag_scale": 0.0})
    assert len(steps) >= 5
    # A token whose saliency is the threshold to rounding may fall on either side; none does here
    assert (result - expected).norm() / expected.norm() < 1e-4
    assert (result - unguided).norm() / expected.norm() > 1e-2


class Sure(nn.Module):
    """A model that is sure of its picture at every noise level."""

    def forward(self, x, sigma):
        return torch.full_like(x, 0.25)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_noise_is_left_however_high_the_lowest_level(sampler):
    result = sample(sampler, Sure(), (3, 4, 4), K.sampling.get_sigmas_karras(6, 0.5, 10.0), [0, 1])
    torch.testing.assert_close(result, torch.full_like(result, 0.25), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_lms_solves_the_guided_equation():
    sigmas, shape = K.sampling.get_sigmas_karras(24, 0.32, 160.0), (3, 64, 64)
    with ksag.SAGDenoiser(zoo.load(), **zoo.SETTINGS) as guided:
        expected, found = (sample(sampler, guided, shape, sigmas, [0]) for sampler in ("dpmpp_2m", "lms"))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))[None]
        to_0 = K.sampling.sample_lms(guided, noise * sigmas[0], sigmas, disable=True)
    assert (found - expected).norm() / expected.norm() < 0.1 and found.abs().max() < 1.2
    assert (to_0 - expected).norm() / expected.norm() > 0.6  # what the page warns of


def test_dpm_fast_makes_as_many_calls_as_there_are_steps(denoiser):
    calls = []
    denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    for steps in 2, 3, 7:
        calls.clear()
        sample("dpm_fast", denoiser, (3, 6, 8), K.sampling.get_sigmas_karras(steps, 0.05, 10.0), [0])
        assert len(calls) == steps


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_kept_from_call_to_call_is_kept_for_a_whole_run(denoiser, sampler):
    """Under every sampler, one pass acts at each call after the first, and the other directions at every call."""
    _, args = forms.latents()
    count = []
    handle = denoiser.register_forward_pre_hook(lambda *_: count.append(1))
    guided = forms.wrap("SAG in one pass, PAG and SEG", denoiser)
    sigmas = K.sampling.get_sigmas_karras(6, 0.05, 10.0)
    with guided.trace() as steps:
        sample(sampler, guided, (3, 6, 8), sigmas, [0, 1], args)
    handle.remove()
    assert [step.name for step in steps] == ["SAG", "PAG", "SEG"] * len(count)
    acts = [bool(step.direction.any()) for step in steps if step.name == "SAG"]
    if sampler == "dpm_adaptive":  # which goes back where a step was too long
        assert acts[1:].count(False) <= 0.1 * len(acts)
    else:
        assert acts == [False] + [True] * (len(count) - 1)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "dpm_adaptive"])
def test_the_same_seed_gives_the_same_image_in_any_batch(denoiser, sampler):
    _, args = forms.latents(3)
    sigmas = K.sampling.get_sigmas_karras(5, 0.05, 10.0)
    guided = forms.wrap("SAG in one pass, PAG and SEG", denoiser)

    def images(seeds, rows):
        of_rows = {name: value[rows] if name != "cond_scale" else value for name, value in args.items()}
        return sample(sampler, guided, (3, 6, 8), sigmas, seeds, of_rows)

    together = images([7, 8, 9], slice(0, 3))
    assert torch.equal(images([7, 8, 9], slice(0, 3)), together)
    torch.testing.assert_close(images([8], slice(1, 2)), together[1:2], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together[0], together[1])


def test_log_likelihood_differentiates_through_the_guidance(denoiser):
    x = forms.latents()[0] * 0.1
    guided = ksag.SAGDenoiser(denoiser, 0.5, blur_kernel_size=5)
    results = []
    for scale in 0.5, 0.0:
        torch.manual_seed(0)
        args = {"sag_scale": scale}
        results.append(K.sampling.log_likelihood(guided, x, 0.5, 10.0, extra_args=args, atol=1e-3, rtol=1e-3)[0])
    assert results[0].shape == (2,) and results[0].isfinite().all()
    assert not torch.allclose(results[0], results[1])
