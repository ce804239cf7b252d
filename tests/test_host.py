"""A host that computes its own predictions, such as a user interface, gets what SAGDenoiser gives: with a tap and one function."""

import functools

import pytest
import torch

import ksag
from ksag import cfg
from ksag.tap import AttentionTap
from tests.models import hooks, inputs, make_denoiser

SETTINGS = {"blur_sigma": 1.5, "blur_kernel_size": 7, "mask_threshold": 0.9}
COND_SCALE, SAG_SCALE = 5.0, 0.8


def in_one_batch(denoiser, tap, x, sigma, conds):
    """A host that puts the samples that are recorded first."""
    with tap.recording(rows=x.shape[0]) as seen:
        both = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), mapping_cond=torch.cat(conds))
    return *both.chunk(2), seen.saliency()


def cond_first(denoiser, tap, x, sigma, conds):
    """A host that puts them last, and so records all."""
    with tap.recording(rows=2 * x.shape[0]) as seen:
        both = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), mapping_cond=torch.cat(conds[::-1]))
    g, u = both.chunk(2)
    return u, g, seen.saliency()[x.shape[0] :]


def in_parts(denoiser, tap, x, sigma, conds):
    """A host that is short of memory: one sample after the other, first all without the condition."""
    with tap.recording(rows=x.shape[0]) as seen:
        predictions = [
            denoiser(x[i : i + 1], sigma[i : i + 1], mapping_cond=c[i : i + 1]) for c in conds for i in range(x.shape[0])
        ]
    return torch.cat(predictions[: x.shape[0]]), torch.cat(predictions[x.shape[0] :]), seen.saliency()


def interleaved(denoiser, tap, x, sigma, conds):
    """A host that goes through the prompts as they come, and records only the calls without a condition."""
    us, gs, maps = [], [], []
    for i in range(x.shape[0]):
        one = functools.partial(denoiser, x[i : i + 1], sigma[i : i + 1])
        gs.append(one(mapping_cond=conds[1][i : i + 1]))
        with tap.recording(rows=1) as seen:
            us.append(one(mapping_cond=conds[0][i : i + 1]))
        maps.append(seen.saliency())
    return torch.cat(us), torch.cat(gs), torch.cat(maps)


HOSTS = [in_one_batch, cond_first, in_parts, interleaved]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("rule", [cfg.plain, cfg.rescale(0.7)])
def test_a_host_gets_what_the_wrapper_gives(host, rule):
    denoiser = make_denoiser()
    x, sigma, cond, uncond = inputs(3)
    sigma = sigma * torch.tensor([1.0, 0.5, 2.0])
    with ksag.SAGDenoiser(denoiser, SAG_SCALE, **SETTINGS, cfg_rule=rule, cond_key="mapping_cond") as guided:
        expected = guided(x, sigma, cond=cond, uncond=uncond, cond_scale=COND_SCALE)
        plain = guided(x, sigma, cond=cond, uncond=uncond, cond_scale=COND_SCALE, sag_scale=0.0)

    tap = AttentionTap(denoiser)
    u, g, saliency = host(denoiser, tap, x, sigma, [uncond, cond])
    guidance = ksag.self_attention_guidance(
        u, x, saliency, lambda degraded: denoiser(degraded, sigma, mapping_cond=uncond), **SETTINGS
    )
    result = rule(u, g, COND_SCALE, x, sigma) + guidance.direction * SAG_SCALE
    tap.close()
    assert (result - expected).norm() / expected.norm() < 1e-5
    assert (plain - expected).norm() / expected.norm() > 1e-3
    assert guidance.mask.shape == (3, 1, 16, 24) and guidance.degraded.shape == guidance.reevaluated.shape == x.shape
    assert hooks(denoiser) == 0


def test_what_the_host_runs_outside_a_recording_is_not_seen():
    denoiser = make_denoiser()
    x, sigma, cond, uncond = inputs()
    tap = AttentionTap(denoiser)
    with tap.recording(rows=4) as seen:
        denoiser(x, sigma, mapping_cond=uncond)
    denoiser(x * 2, sigma, mapping_cond=cond)
    with pytest.raises(RuntimeError, match="ran for 2 of the latent's 4 samples"):
        seen.saliency()
