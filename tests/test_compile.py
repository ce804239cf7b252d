"""Hooks are set once and switched by a flag, so that a compiled model runs them."""

import k_diffusion as K
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import ksag
from ksag.adapters.diffusers import denoiser as as_denoiser
from ksag.model.module_edit import ModuleTap
from ksag.samplers import sample
from tests import forms
from tests.diffusers_pipelines import scheduler
from tests.diffusers_pipelines import unet as make_unet
from tests.models import hooks
from tests.own_directions import SkipBlock


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


FAST = [("SAG", True), ("SAG in one pass, PAG and SEG", False), ("a user's own", False)]
"""Which between them have every kind of hook."""
SLOW = [(form, whole) for form in forms.FORMS for whole in (False, True) if (form, whole) not in FAST]


@pytest.mark.parametrize(("form", "whole"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_compiled_after_wrapping_gives_the_eager_image(form, whole):
    expected = forms.run(forms.wrap(form))
    guided = forms.wrap(form)
    counter = CompileCounterWithBackend("eager")
    compiled = guided
    if whole:
        forms.run(guided)  # checks the attention, which a compiled wrapper cannot
        guided.reset()
        compiled = torch.compile(guided, fullgraph="every" not in form, backend=counter)  # which reads sigma
    else:
        guided.inner_model = torch.compile(guided.inner_model, fullgraph=True, backend=counter, dynamic=False)
    for _ in range(2):
        assert forms.relative(forms.run(compiled), expected) < 1e-5
        guided.reset()
        frames = counter.frame_count
    assert 0 < frames == counter.frame_count
    assert forms.relative(forms.plain(guided), expected) > 1e-3


@pytest.mark.slow
def test_inductor_gives_the_eager_image():
    directions = [ksag.SAG(0.8, 1.5, blur_kernel_size=5, attention=forms.LAYERS[0], one_pass=True), ksag.PAG(0.7, forms.LAYERS[1])]
    guided = ksag.GuidedDenoiser(forms.tiny(), directions)
    expected = forms.run(guided)
    guided.reset()
    guided.inner_model = torch.compile(guided.inner_model, fullgraph=True)
    assert forms.relative(forms.run(guided), expected) < 1e-5


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
    guided.inner_model.inner_model = torch.compile(guided.inner_model.inner_model, fullgraph=True, backend="aot_eager")
    assert (image() - expected).norm() / expected.norm() < 1e-3
    assert (unguided - expected).norm() / expected.norm() > 1e-2


def counted(guided):
    """Compiles the inner model, and counts."""
    counter = CompileCounterWithBackend("eager")
    guided.inner_model = torch.compile(guided.inner_model, fullgraph=True, backend=counter, dynamic=False)
    return counter


@pytest.mark.parametrize(("form", "compilations"), [("SAG and PAG", 2), ("SAG in one pass", 1)])
def test_does_not_recompile_from_step_to_step(form, compilations):
    """[uncond, cond, perturbed], which is read and changed, and uncond alone; or all in one."""
    guided = forms.wrap(form)
    counter = counted(guided)
    for seed in range(3):
        forms.run(guided, seed=seed)
    assert counter.frame_count == compilations


def test_sigma_range_takes_one_more_compilation():
    guided = ksag.SAGDenoiser(forms.tiny(), blur_kernel_size=5, sigma_range=(0.3, 4.0))
    _, args = forms.latents()
    sigmas = K.sampling.get_sigmas_karras(7, 0.05, 10.0)
    with guided.trace() as steps:
        expected = sample("dpmpp_2m", guided, (3, 6, 8), sigmas, [0, 1], args)
    assert 0 < len(steps) < 7
    counter = counted(guided)
    for _ in range(2):
        result = sample("dpmpp_2m", guided, (3, 6, 8), sigmas, [0, 1], args)
        assert forms.relative(result, expected) < 1e-5
        assert counter.frame_count == 3  # plain guidance, and the two passes of SAG


@pytest.mark.slow
def test_scales_that_vary_are_compiled_once_more_at_most():
    guided = forms.wrap("SAG and PAG")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(guided, backend=counter)
    for scale in 1.5, 2.5, 3.5, 4.5:
        forms.run(compiled, cond_scale=scale, sag_scale=scale, pag_scale=-scale)
    assert counter.frame_count <= 2  # the first value, and then any


def compile_child(denoiser):
    denoiser.middle_block[0] = torch.compile(denoiser.middle_block[0], backend="eager")


def compile_in_place(denoiser):
    denoiser.middle_block[0].compile(backend="eager")


def compile_forward(denoiser):
    denoiser.middle_block[0].forward = torch.compile(denoiser.middle_block[0].forward, backend="eager")


def compile_layer(denoiser):
    denoiser.middle_block[0].attn1.compile(backend="eager")


@pytest.mark.parametrize("compile_", [compile_child, compile_in_place, compile_forward, compile_layer])
def test_compiled_before_wrapping_is_a_clear_error(compile_):
    """Where a layer's hooks are set, or a module's whose output a user's own direction replaces."""
    denoiser = forms.tiny()
    compile_(denoiser)
    of_a_block = [] if compile_ is compile_layer else [SkipBlock(1.0, "middle_block.0")]
    for direction in ksag.SAG(), ksag.PAG(), *of_a_block:
        with pytest.raises(RuntimeError, match=r"compiled before it was wrapped.*Wrap first, compile afterwards"):
            ksag.GuidedDenoiser(denoiser, direction)
    assert hooks(denoiser) == 0


def test_a_compiled_denoiser_is_a_clear_error():
    with pytest.raises(RuntimeError, match="compiled before it was wrapped"):
        ksag.SAGDenoiser(torch.compile(forms.tiny(), backend="eager"))  # type: ignore


def test_a_hook_on_a_module_sees_that_what_holds_it_was_compiled():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    tap = ModuleTap(model, "0.0")
    assert not tap.is_compiled(model)
    model[0] = torch.compile(model[0], backend="eager")
    assert tap.is_compiled(model)
