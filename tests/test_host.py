"""A host that computes its own predictions, such as a user interface, gets what SAGDenoiser gives: with a tap and one function."""

import functools
import gc
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import ksag
from ksag import cfg
from ksag.attention.tap import AttentionTap
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
    with pytest.raises(RuntimeError, match="ran for 2 of 4 samples"):
        seen.saliency()


# The code of docs/hosts.md


def page_names(heading):
    """What the code under a heading of the page defines."""
    page = Path(__file__).parents[1] / "docs" / "hosts.md"
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    names = {}
    exec(compile(code, f"{page.name}: {heading}", "exec"), names)
    return names


# ComfyUI's calling convention


class Model:
    """A substitute for ComfyUI's model: a k-diffusion denoiser under its apply_model."""

    def __init__(self, denoiser):
        self.diffusion_model = denoiser

    def apply_model(self, x, t, c_crossattn, transformer_options):
        return self.diffusion_model(x, t, mapping_cond=c_crossattn)


class Patcher:
    """A substitute for ComfyUI's ModelPatcher, as far as nodes see it."""

    def __init__(self, model, options=None):
        self.model, self.model_options = model, options or {}

    def clone(self):
        return Patcher(self.model, dict(self.model_options))

    def set_model_unet_function_wrapper(self, function):
        self.model_options["model_function_wrapper"] = function

    def set_model_sampler_post_cfg_function(self, function, disable_cfg1_optimization=False):
        self.model_options["sampler_post_cfg_function"] = [function]
        self.model_options["disable_cfg1_optimization"] = disable_cfg1_optimization


def conds_of(tensor, mask=None):
    """A prompt as ComfyUI's samplers keep it, where its mask says how much it counts at each place."""
    return [{"c_crossattn": tensor, "mask": torch.ones(1, 1, 1, 1) if mask is None else mask}]


class Comfy:
    """A substitute for comfy.samplers, which batches as many prompts as `at_once` says, those last in the list first."""

    def __init__(self, at_once):
        self.at_once = at_once

    def calc_cond_batch(self, model, conds, x, sigma, options):
        sums, counts = [torch.zeros_like(x) for _ in conds], [torch.full_like(x, 1e-37) for _ in conds]
        to_run = [(part, i) for i, prompts in enumerate(conds) for part in prompts or ()][::-1]
        for start in range(0, len(to_run), self.at_once):
            batch = to_run[start : start + self.at_once]
            inputs, sigmas = torch.cat([x] * len(batch)), torch.cat([sigma] * len(batch))
            which = [i for _, i in batch]
            c = {"c_crossattn": torch.cat([part["c_crossattn"] for part, _ in batch])}
            c["transformer_options"] = {"cond_or_uncond": which, "sigmas": sigma}
            if wrapper := options.get("model_function_wrapper"):
                output = wrapper(model.apply_model, {"input": inputs, "timestep": sigmas, "c": c, "cond_or_uncond": which})
            else:
                output = model.apply_model(inputs, sigmas, **c)
            for (part, i), prediction in zip(batch, output.chunk(len(batch)), strict=True):
                sums[i] += prediction * part["mask"]
                counts[i] += part["mask"]
        return [total / count for total, count in zip(sums, counts, strict=True)]

    def sampling_function(self, patcher, x, sigma, uncond, cond, cond_scale):
        options = patcher.model_options
        if cond_scale == 1 and not options.get("disable_cfg1_optimization"):
            uncond = None
        g, u = self.calc_cond_batch(patcher.model, [cond, uncond], x, sigma, options)
        denoised = u + (g - u) * cond_scale
        for function in options.get("sampler_post_cfg_function", []):
            denoised = function({
                "denoised": denoised, "cond": cond, "uncond": uncond, "cond_scale": cond_scale, "model": patcher.model,
                "cond_denoised": g, "uncond_denoised": u, "sigma": sigma, "model_options": options, "input": x,
            })  # fmt: skip
        return denoised


@pytest.fixture(params=[1, 2, 8])
def comfy(request, monkeypatch):
    """The substitute, as the page's code imports it."""
    host = Comfy(at_once=request.param)
    module = types.ModuleType("comfy.samplers")
    module.calc_cond_batch = host.calc_cond_batch
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.samplers", module)
    host.patch = page_names("ComfyUI")["patch"]
    return host


def directions(denoiser, x, sigma, cond, uncond):
    """What SAGDenoiser adds to plain guidance, and the plain guidance."""
    args = {"cond": cond, "uncond": uncond, "cond_scale": COND_SCALE if uncond is not None else 1.0}
    with ksag.SAGDenoiser(denoiser, SAG_SCALE, blur_sigma=1.5, cond_key="mapping_cond") as guided:
        plain = guided(x, sigma, **args, sag_scale=0.0)
        return guided(x, sigma, **args) - plain, plain


@pytest.mark.parametrize("has_uncond", [True, False])
def test_comfyui_gets_what_the_wrapper_gives(comfy, has_uncond):
    denoiser = make_denoiser()
    x, sigma, cond, uncond = inputs(2)
    direction, plain = directions(denoiser, x, sigma, cond, uncond if has_uncond else None)
    patched = comfy.patch(Patcher(Model(denoiser)), SAG_SCALE, 1.5)
    for _ in range(2):
        result = comfy.sampling_function(
            patched, x, sigma.clone(), conds_of(uncond) if has_uncond else None, conds_of(cond), COND_SCALE if has_uncond else 1.0
        )
        assert (result - plain - direction).norm() / direction.norm() < 1e-4
    del patched
    gc.collect()
    assert hooks(denoiser) == 0


def test_comfyui_with_several_prompts_and_masks(comfy):
    """The prompts weigh in cfg, and SAG is that of the one uncond."""
    denoiser = make_denoiser()
    x, sigma, cond, uncond = inputs(2)
    left = torch.zeros(1, 1, *x.shape[2:])
    left[..., :10] = 1
    several = conds_of(cond, left) + conds_of(cond.flip(0), 1 - left) + conds_of(-cond, torch.full_like(left, 0.3))
    direction, _ = directions(denoiser, x, sigma, cond, uncond)
    plain = comfy.sampling_function(Patcher(Model(denoiser)), x, sigma, conds_of(uncond), several, COND_SCALE)
    patched = comfy.patch(Patcher(Model(denoiser)), SAG_SCALE, 1.5)
    result = comfy.sampling_function(patched, x, sigma, conds_of(uncond), several, COND_SCALE)
    assert (result - plain - direction).norm() / direction.norm() < 1e-4


def test_comfyui_with_several_negative_prompts(comfy):
    """The formulas on the weighted prediction, and the mean of the prompts' maps."""
    denoiser = make_denoiser()
    x, sigma, cond, uncond = inputs(2)
    negatives = [uncond, cond.flip(0) / 2]
    mask = torch.rand(1, 1, *x.shape[2:])
    weights = [mask, 1 - mask]

    def weighted(x):
        return sum(denoiser(x, sigma, mapping_cond=c) * weight for c, weight in zip(negatives, weights, strict=True))

    tap = AttentionTap(denoiser)
    maps = []
    for c in negatives:
        with tap.recording(rows=2) as seen:
            denoiser(x, sigma, mapping_cond=c)
        maps.append(seen.saliency())
    tap.close()
    u, g = weighted(x), denoiser(x, sigma, mapping_cond=cond)
    guidance = ksag.self_attention_guidance(u, x, (maps[0] + maps[1]) / 2, weighted, blur_sigma=1.5)
    expected = u + (g - u) * COND_SCALE + guidance.direction * SAG_SCALE

    patched = comfy.patch(Patcher(Model(denoiser)), SAG_SCALE, 1.5)
    uncond = [part for c, weight in zip(negatives, weights, strict=True) for part in conds_of(c, weight)]
    result = comfy.sampling_function(patched, x, sigma, uncond, conds_of(cond), COND_SCALE)
    assert (result - expected).norm() / (guidance.direction * SAG_SCALE).norm() < 1e-4


def test_comfyui_is_guided_at_a_cond_scale_of_one(comfy):
    denoiser = make_denoiser()
    x, sigma, cond, uncond = inputs(2)
    with ksag.SAGDenoiser(denoiser, SAG_SCALE, blur_sigma=1.5, cond_key="mapping_cond") as guided:
        expected = guided(x, sigma, cond=cond, uncond=uncond, cond_scale=1.0)
    patched = comfy.patch(Patcher(Model(denoiser)), SAG_SCALE, 1.5)
    result = comfy.sampling_function(patched, x, sigma, conds_of(uncond), conds_of(cond), 1.0)
    assert (result - expected).norm() / expected.norm() < 1e-5


def test_comfyui_after_a_step_that_was_interrupted(comfy):
    denoiser = make_denoiser()
    x, sigma, cond, uncond = inputs(2)
    patched = comfy.patch(Patcher(Model(denoiser)), SAG_SCALE, 1.5)
    expected = comfy.sampling_function(patched, x, sigma.clone(), conds_of(uncond), conds_of(cond), COND_SCALE)
    function, patched.model_options["sampler_post_cfg_function"] = patched.model_options["sampler_post_cfg_function"], [interrupt]
    with pytest.raises(KeyboardInterrupt):
        comfy.sampling_function(patched, x * 2, sigma.clone(), conds_of(cond), conds_of(uncond), COND_SCALE)
    patched.model_options["sampler_post_cfg_function"] = function
    again = comfy.sampling_function(patched, x, sigma.clone(), conds_of(uncond), conds_of(cond), COND_SCALE)
    assert torch.equal(again, expected)


def interrupt(args):
    raise KeyboardInterrupt


def test_comfyui_keeps_another_nodes_wrapper(comfy):
    """One that scales the prediction, so that its absence would show, and that sees SAG's own call, too."""
    denoiser = make_denoiser()
    x, sigma, cond, uncond = inputs(2)
    calls = []

    def scaled(apply, args):
        calls.append(args["input"].shape[0])
        return apply(args["input"], args["timestep"], **args["c"]) * 0.9

    class Scaled(torch.nn.Module):
        """The model that the wrapper makes of the denoiser."""

        def __init__(self):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, x, sigma, mapping_cond):
            return self.denoiser(x, sigma, mapping_cond=mapping_cond) * 0.9

    args = {"cond": cond, "uncond": uncond, "cond_scale": COND_SCALE}
    with ksag.SAGDenoiser(Scaled(), SAG_SCALE, blur_sigma=1.5, cond_key="mapping_cond") as guided:
        expected = guided(x, sigma, **args)
    model = Patcher(Model(denoiser))
    model.set_model_unet_function_wrapper(scaled)
    patched = comfy.patch(model, SAG_SCALE, 1.5)
    result = comfy.sampling_function(patched, x, sigma, conds_of(uncond), conds_of(cond), COND_SCALE)
    assert (result - expected).norm() / expected.norm() < 1e-5
    assert sum(calls) == 3 * x.shape[0] and model.model_options["model_function_wrapper"] is scaled


# A1111's calling convention


def test_a1111_gets_what_the_wrapper_gives():
    """On a substitute for the denoiser that its CFGDenoiser calls, whose conditioning is the keyword cond."""
    denoiser = make_denoiser()
    x, sigma, cond, uncond = inputs(3)
    batches = []

    def inner_model(x, sigma, cond):
        batches.append(x.shape[0])
        return denoiser(x, sigma, mapping_cond=cond)

    direction, plain = directions(denoiser, x, sigma, cond, uncond)
    cfg_denoiser = page_names("A1111")["with_sag"](denoiser, inner_model, SAG_SCALE, 1.5)
    result = cfg_denoiser(x, sigma, cond, uncond, COND_SCALE)
    assert (result - plain - direction).norm() / direction.norm() < 1e-4
    assert batches == [6, 3]
    del cfg_denoiser
    gc.collect()
    assert hooks(denoiser) == 0
