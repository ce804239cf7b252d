"""Is a velocity model under FlowDenoiser the same model, in the coordinates of k-diffusion's samplers?"""

import itertools

import k_diffusion as K
import pytest
import torch
from torch import nn

import ksag
from ksag.flow import SIGMA_MAX, FlowDenoiser
from ksag.samplers import SAMPLERS, sample
from tests.diffusers_pipelines import relative
from tests.models import CLASSES, inputs, make_denoiser


class Velocity(nn.Module):
    """v(x_t, t) of a model that denoises x_0 + sigma · ε."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x, t, **kwargs):
        wide = t[:, None, None, None]
        return (x - self.denoiser(x / (1 - wide), t / (1 - t), **kwargs)) / wide


class OfNormalData(nn.Module):
    """The exact velocity for independent pixels of mean 0.3 and standard deviation `std`."""

    def __init__(self, std):
        super().__init__()
        self.std = std

    def forward(self, x, t):
        t = t.view(-1, *[1] * (x.ndim - 1))
        image = 0.3 + (x - (1 - t) * 0.3) * (1 - t) * self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2)
        return (x - image) / t


# The same model


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_denoiser_as_a_velocity_and_back_samples_the_same_images(sampler):
    denoiser = make_denoiser().double()
    sigmas = K.sampling.get_sigmas_karras(3, 0.05, 20.0).double()
    args = {"mapping_cond": torch.randn(2, CLASSES, dtype=torch.float64)}
    start = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    one, other = (
        sample(sampler, model, (3, 16, 16), sigmas, [1, 2], args, start=start)
        for model in (denoiser, FlowDenoiser(Velocity(denoiser)))
    )
    assert one.dtype == other.dtype == torch.float64
    assert relative(other, one) < 1e-5


def test_with_sag_too():
    denoiser = make_denoiser().double()
    x, sigma, cond, uncond = inputs()
    args = {"cond": cond.double(), "uncond": uncond.double(), "cond_scale": 3.0}
    results = []
    for model in denoiser, FlowDenoiser(Velocity(denoiser)):
        with ksag.SAGDenoiser(model, 1.5, cond_key="mapping_cond") as guided:
            results.append(guided(x.double(), sigma.double(), **args))
            plain = guided(x.double(), sigma.double(), **args, sag_scale=0.0)
    assert relative(results[1], results[0]) < 1e-9 < 1e-3 < relative(results[1], plain)


@pytest.mark.parametrize("shape", [(16,), (8, 12), (2, 4, 6)])
def test_any_number_of_dimensions(shape):
    """Against the formula D = x_t − t · v."""
    velocity = OfNormalData(0.5).double()
    x, sigma = torch.randn(3, 2, *shape, dtype=torch.float64), torch.tensor([0.1, 2.0, 300.0], dtype=torch.float64)
    t = sigma / (1 + sigma)
    wide = t.view(3, *[1] * (x.ndim - 1))
    expected = x * (1 - wide) - wide * velocity(x * (1 - wide), t)
    torch.testing.assert_close(FlowDenoiser(velocity)(x, sigma), expected)


def test_keywords_and_names_are_k_diffusions():
    denoiser = FlowDenoiser(Velocity(make_denoiser()), shift=2.0)
    guided = ksag.SAGDenoiser(denoiser, cond_key="mapping_cond")
    assert guided.sigma_max == denoiser.sigmas[-1] and guided.sigma_min == denoiser.sigmas[0]
    assert torch.equal(guided.get_sigmas(7), denoiser.get_sigmas(7))


# The noise levels


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_levels_are_uniform_in_t_before_the_shift(shift):
    """With the shift as SD3's paper writes it, t' = s t / (1 + (s − 1) t)."""
    denoiser = FlowDenoiser(OfNormalData(1.0), shift)
    t = torch.arange(10, -1, -1) / 10
    shifted = shift * t / (1 + (shift - 1) * t)
    sigmas = denoiser.get_sigmas(10)
    torch.testing.assert_close(denoiser.sigma_to_t(sigmas)[1:], shifted[1:])
    torch.testing.assert_close(sigmas[1:], shift * FlowDenoiser(OfNormalData(1.0)).get_sigmas(10)[1:])
    assert sigmas[0] == denoiser.sigma_max == SIGMA_MAX and sigmas[-1] == 0
    assert len(denoiser.get_sigmas()) == 1001 and torch.equal(denoiser.get_sigmas()[:-1], denoiser.sigmas.flip(0))


def test_t_and_sigma_are_inverse_up_to_the_largest_t():
    denoiser = FlowDenoiser(OfNormalData(1.0))
    t = torch.tensor([0.0, 0.001, 0.5, 0.99, 0.9999], dtype=torch.float64)
    torch.testing.assert_close(denoiser.sigma_to_t(denoiser.t_to_sigma(t)), t)
    assert denoiser.t_to_sigma(torch.tensor([0.9999, 1.0])).tolist() == pytest.approx([SIGMA_MAX, SIGMA_MAX], rel=1e-3)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("inf"), float("nan")])
def test_a_shift_that_is_none(shift):
    with pytest.raises(ValueError, match="shift multiplies sigma: it is a finite number above 0, got"):
        FlowDenoiser(OfNormalData(1.0), shift)


@pytest.mark.parametrize(("output", "got"), [((), "got tuple"), (torch.zeros(1, 3, 6, 6), r"got a tensor of shape \(1, 3, 6, 6\)")])
def test_what_is_no_velocity(output, got):
    model = OfNormalData(1.0)
    model.forward = lambda x, t: output
    with pytest.raises(TypeError, match=rf"must return the velocity, a tensor of shape \(1, 3, 8, 8\) as x_t has, {got}"):
        FlowDenoiser(model)(torch.zeros(1, 3, 8, 8), torch.ones(1))


# t = 1


def euler_from_1(velocity, noise, shift, steps):
    """In the flow's own coordinates, as diffusers' scheduler does it."""
    t = 1 - torch.arange(steps + 1, dtype=noise.dtype) / steps
    t = shift * t / (1 + (shift - 1) * t)
    x = noise
    for now, then in itertools.pairwise(t):
        x = x + (then - now) * velocity(x, now.expand(len(x)))
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 28])
def test_beginning_below_1_changes_an_image_as_little_as_documented(shift, steps):
    velocity, noise = OfNormalData(0.8), torch.randn(2, 3, 16, 16)
    denoiser = FlowDenoiser(velocity, shift)
    sigmas = denoiser.get_sigmas(steps)
    expected = euler_from_1(velocity, noise, shift, steps)
    assert 1e-5 < relative(K.sampling.sample_euler(denoiser, noise * sigmas[0], sigmas, disable=True), expected) < 2e-4


@pytest.mark.parametrize(("shift", "long", "short"), [(1.0, 0.40, 0.013), (3.0, 0.012, 0.0013)])
def test_heuns_first_step_is_as_documented(shift, long, short):
    noise = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    denoiser = FlowDenoiser(OfNormalData(1.0), shift)
    sigmas, exact = denoiser.get_sigmas(24).double(), 0.3 + noise
    for expected in long, short:
        result = K.sampling.sample_heun(denoiser, noise * sigmas[0], sigmas, disable=True)
        assert relative(result, exact) == pytest.approx(expected, rel=0.2)
        sigmas[0] = 10 * sigmas[1]


# Half precision


class Half(nn.Module):
    """A network that takes its own dtype only."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float32).to(dtype)

    def forward(self, x, t):
        assert t.dtype in (torch.float32, torch.float64)
        return self.conv(x)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_model_in_half_precision(dtype, error):
    half, full = FlowDenoiser(Half(dtype)), FlowDenoiser(Half(torch.float32))
    x, sigma = torch.randn(2, 3, 8, 8) * 3000, torch.tensor([3000.0, SIGMA_MAX])
    assert half(x, sigma).dtype == torch.float32 and relative(half(x, sigma), full(x, sigma)) < error
    small = half(x.to(dtype), sigma.to(dtype))
    assert small.dtype == dtype and relative(small.float(), full(x, sigma)) < 2 * error


def test_a_small_change_of_a_large_latent_reaches_a_model_in_half_precision():
    """As SAG makes it, x − δ. At sigma 100, x in float16 has steps of 0.06."""
    half, full = FlowDenoiser(Half(torch.float16)), FlowDenoiser(Half(torch.float32))
    x, delta, sigma = torch.randn(2, 3, 32, 32) * 100, torch.randn(2, 3, 32, 32) * 0.1, torch.tensor([100.0, 100.0])
    expected = full(x, sigma) - full(x - delta, sigma)
    assert relative(half(x, sigma) - half(x - delta, sigma), expected) < 0.3
    assert relative((half(x.half(), sigma) - half((x - delta).half(), sigma)).float(), expected) > 0.3
