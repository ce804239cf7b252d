"""Hooks are set once and switched by a flag, so that a compiled model runs them."""

import k_diffusion as K
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ksag
from ksag.adapters.diffusers import denoiser as as_denoiser
from ksag.samplers import sample
from tests.diffusers_pipelines import scheduler
from tests.diffusers_pipelines import unet as make_unet
from tests.models import inputs, make_denoiser


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calls():
    x, _, cond, uncond = inputs()
    for sigma in 3.0, 2.0, 1.0:
        yield x, torch.full((2,), sigma), {"cond": cond, "uncond": uncond, "cond_scale": 2.0}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_after_wrapping_gives_the_eager_image(backend, whole):
    guided = ksag.SAGDenoiser(make_denoiser(), cond_key="mapping_cond")
    expected = [guided(x, sigma, **args) for x, sigma, args in calls()]
    unguided = [guided(x, sigma, **args, sag_scale=0.0) for x, sigma, args in calls()]
    compiled = guided
    if whole:
        compiled = torch.compile(guided, fullgraph=True, backend=backend)
    else:
        guided.inner_model = torch.compile(guided.inner_model, fullgraph=True, backend=backend)
    for want, plain, (x, sigma, args) in zip(expected, unguided, calls(), strict=True):
        got = compiled(x, sigma, **args)
        assert (got - want).norm() / want.norm() < 1e-5
        assert (plain - want).norm() / want.norm() > 1e-3


@pytest.mark.slow
def test_a_small_unet_compiled_in_float16_gives_the_eager_image_to_a_thousandth():
    # At threshold 0 all is masked: elsewhere a token within rounding of the threshold may change sides, and the image with it
    guided = ksag.SAGDenoiser(as_denoiser(make_unet().half(), scheduler()), cond_key=None, mask_threshold=0.0)
    x, cond, uncond = torch.randn(2, 4, 16, 24) * 10, torch.randn(2, 7, 32).half(), torch.randn(2, 7, 32).half()
    args = {"cond": {"encoder_hidden_states": cond}, "uncond": {"encoder_hidden_states": uncond}, "cond_scale": 2.0}
    sigmas = K.sampling.get_sigmas_karras(6, 0.05, 10.0)

    def image(**options):
        return K.sampling.sample_euler(guided, x, sigmas, extra_args={**args, **options}, disable=True)

    expected, unguided = image(), image(sag_scale=0.0)
    guided.inner_model.inner_model = torch.compile(guided.inner_model.inner_model, fullgraph=True)
    assert (image() - expected).norm() / expected.norm() < 1e-3
    assert (unguided - expected).norm() / expected.norm() > 1e-2


def test_does_not_recompile_from_step_to_step():
    guided = ksag.SAGDenoiser(make_denoiser(), cond_key="mapping_cond")
    counter = CompileCounterWithBackend("aot_eager")
    guided.inner_model = torch.compile(guided.inner_model, fullgraph=True, backend=counter, dynamic=False)
    for x, sigma, args in [*calls(), *calls()]:
        guided(x, sigma, **args)
    assert counter.frame_count == 2  # [uncond, cond], recorded, and uncond, not recorded


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("whole", [False, True])
def test_sigma_range_takes_one_more_compilation(sampler, whole):
    guided = ksag.SAGDenoiser(make_denoiser(), cond_key="mapping_cond", sigma_range=(0.3, 4.0))
    _, _, cond, uncond = inputs()
    args = {"cond": cond, "uncond": uncond, "cond_scale": 2.0}
    sigmas = K.sampling.get_sigmas_karras(7, 0.05, 10.0)
    with guided.trace() as steps:
        expected = sample(sampler, guided, (3, 12, 16), sigmas, [0, 1], args)
    assert 0 < len(steps) < 7
    counter = CompileCounterWithBackend("aot_eager")
    compiled = guided
    if whole:
        compiled = torch.compile(guided, backend=counter)
    else:
        guided.inner_model = torch.compile(guided.inner_model, fullgraph=True, backend=counter, dynamic=False)
    for _ in range(2):
        result = sample(sampler, compiled, (3, 12, 16), sigmas, [0, 1], args)
        assert (result - expected).norm() / expected.norm() < 1e-5
        assert counter.frame_count == 3  # whole: reading sigma, a guided step, and a plain one


def test_scales_that_vary_are_compiled_once_more_at_most():
    guided = ksag.SAGDenoiser(make_denoiser(), cond_key="mapping_cond")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(guided, backend=counter)
    for scale in 1.5, 2.5, 3.5, 4.5:
        for x, sigma, args in calls():
            compiled(x, sigma, **{**args, "cond_scale": scale}, sag_scale=scale)
    assert counter.frame_count <= 2  # the first value, and then any


def compile_child(denoiser):
    denoiser.inner_model = torch.compile(denoiser.inner_model, backend="eager")


def compile_in_place(denoiser):
    denoiser.inner_model.compile(backend="eager")


def compile_forward(denoiser):
    denoiser.inner_model.forward = torch.compile(denoiser.inner_model.forward, backend="eager")


def compile_layer(denoiser):
    denoiser.inner_model.u_net.d_blocks[1][2].compile(backend="eager")


@pytest.mark.parametrize("compile_", [compile_child, compile_in_place, compile_forward, compile_layer])
def test_compiled_before_wrapping_is_a_clear_error(compile_):
    denoiser = make_denoiser()
    compile_(denoiser)
    with pytest.raises(RuntimeError, match=r"compiled before it was wrapped.*Wrap first, compile afterwards"):
        ksag.SAGDenoiser(denoiser, cond_key="mapping_cond")


def test_a_compiled_denoiser_is_a_clear_error():
    with pytest.raises(RuntimeError, match="compiled before it was wrapped"):
        ksag.SAGDenoiser(torch.compile(make_denoiser(), backend="eager"), cond_key="mapping_cond")  # type: ignore
