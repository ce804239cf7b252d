"""Whole runs at the parameters of the implementations that people come from, against the design's seven steps.

The UNet is the real one of Stable Diffusion 1.x and 2.x (`ldm`), under k-diffusion's own CompVis wrappers. Its attention
is watched as its softmax, its blur is SciPy's.
"""

import k_diffusion as K
import pytest
import torch

import ksag
from tests import reference
from tests.models import LatentDiffusion, WatchSoftmax


def seven_steps(denoiser, x, sigma, cond, uncond, cond_scale, sag_scale, blur_sigma, kernel_size, threshold):
    names = [n for n, _ in denoiser.named_modules() if n.endswith(("attn1", "attn2"))]
    index = names.index("inner_model.model.middle_block.1.transformer_blocks.0.attn1")
    grid = (x.shape[2] // 2, x.shape[3] // 2)
    tokens = grid[0] * grid[1]
    with WatchSoftmax() as watch:
        u = denoiser(x, sigma, cond=uncond).double()
    g = denoiser(x, sigma, cond=cond).double()
    attention = watch.results[index].double().view(x.shape[0], -1, tokens, tokens)
    mask = reference.upsampled((reference.saliency_of(attention, grid) > threshold).double(), x.shape[2:])
    d = mask * reference.blurred(u, blur_sigma, kernel_size) + (1 - mask) * u
    r = denoiser((d + (x.double() - u)).float(), sigma, cond=uncond).double()
    return (u + (g - u) * cond_scale + (d - r) * sag_scale).float()


@pytest.mark.parametrize("wrapper", [K.external.CompVisDenoiser, pytest.param(K.external.CompVisVDenoiser, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("sag_scale", "blur_sigma", "kernel_size", "threshold", "size"),
    [
        pytest.param(0.5, 2.0, 9, 1.0, (10, 14), id="ComfyUI"),
        pytest.param(-2.0, 10.0, 9, 1.0, (10, 14), id="ComfyUI, its extremes"),
        pytest.param(0.75, 1.0, 9, 1.1, (10, 14), id="A1111"),
        pytest.param(0.1, 3.0, 31, 1.0, (16, 18), id="the paper, guide_scale 1.1"),
    ],
)
def test_whole_run(wrapper, sag_scale, blur_sigma, kernel_size, threshold, size):
    denoiser = wrapper(LatentDiffusion(), quantize=True)
    sigmas = denoiser.get_sigmas(6)
    x = torch.randn(2, 4, *size) * sigmas[0]
    cond, uncond = ({"c_crossattn": [torch.randn(2, 7, 64)]} for _ in range(2))
    args = {"cond": cond, "uncond": uncond, "cond_scale": 5.0}
    guided = ksag.SAGDenoiser(denoiser, sag_scale, blur_sigma, blur_kernel_size=kernel_size, mask_threshold=threshold)

    def expected(x, sigma, cond, uncond, cond_scale):
        return seven_steps(denoiser, x, sigma, cond, uncond, cond_scale, sag_scale, blur_sigma, kernel_size, threshold)

    result = K.sampling.sample_euler(guided, x, sigmas, args, disable=True)
    reference_run = K.sampling.sample_euler(expected, x, sigmas, args, disable=True)
    plain = K.sampling.sample_euler(guided, x, sigmas, {**args, "sag_scale": 0.0}, disable=True)
    assert (result - reference_run).norm() / reference_run.norm() < 1e-5
    assert (result - plain).norm() / reference_run.norm() > 1e-3
