"""What does a guided step cost on a GPU, and how near is it to the passes it cannot avoid?  `python benchmarks/gpu.py`

On diffusers' UNet2DConditionModel at the shapes of Stable Diffusion 1.5 and XL, random weights, float16, channels last, side by
side in one run: the floor (one pass of batch 2B and one of B) eager and as CUDA graphs, plain classifier-free guidance, ksag eager,
compiled and with CUDA graphs, and diffusers' own SAG pipeline. Times are medians of CUDA events over rounds in which each takes
three steps in a row, as a sampler does; ratios are medians of the rounds' ratios; memory is the peak above the weights. Writes
DIR/gpu.md and DIR/gpu.json.
"""

import copy
import gc
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionSAGPipeline, UNet2DConditionModel
from measure import Step, peak_bytes, seconds
from torch import Tensor
from tqdm import tqdm, trange
from transformers import CLIPTextConfig, CLIPTextModel

import ksag
from ksag.adapters.diffusers import denoiser as as_denoiser

DEVICE, DTYPE = torch.device("cuda"), torch.float16
UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {"sample_size": 64, "cross_attention_dim": 768},
    "SDXL": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
TIMED = [("SD 1.5", 64, 1), ("SD 1.5", 64, 4), ("SDXL", 256, 1), ("SDXL", 128, 4), ("SDXL", 128, 1)]
COMPILED = {("SD 1.5", 64, 1), ("SDXL", 128, 1)}  # each compiles for minutes
STEPS = 3
SIDES = (64, 128, 256)
FLOOR, FLOOR_GRAPHED = "floor: 2B + B", "floor, CUDA graphs"
CFG, EAGER, COMPILE, GRAPHED = "plain CFG: 2B", "ksag", "ksag, torch.compile", "ksag, use_cuda_graphs"
PIPELINE = "diffusers SAG pipeline"


class Inputs(NamedTuple):
    x: Tensor
    sigma: Tensor
    cond: dict[str, Any]
    uncond: dict[str, Any]


def make_unet(model: str) -> Any:
    torch.manual_seed(0)
    with DEVICE:
        unet: Any = UNet2DConditionModel(**UNETS[model])
    return unet.to(DTYPE).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def make_inputs(model: str, side: int, batch: int) -> Inputs:
    width = UNETS[model]["cross_attention_dim"]

    def conditioning() -> dict[str, Any]:
        text = {"encoder_hidden_states": torch.randn(batch, 77, width, device=DEVICE, dtype=DTYPE)}
        if model != "SDXL":
            return text
        pixels = torch.full((batch, 6), 8.0 * side, device=DEVICE, dtype=DTYPE)
        pooled = torch.randn(batch, 1280, device=DEVICE, dtype=DTYPE)
        return {**text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": pixels}}

    x = torch.randn(batch, 4, side, side, device=DEVICE, dtype=DTYPE) * 4
    return Inputs(x, torch.full((batch,), 4.0, device=DEVICE), conditioning(), conditioning())


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def floor_passes(denoiser: torch.nn.Module, inputs: Inputs) -> tuple[Step, Step]:
    """The passes of 2B and of B that a guided step cannot avoid, on their own."""
    x, sigma, cond, uncond = inputs
    both = ksag.conditioning.concatenate(uncond, cond)
    x2, sigma2 = torch.cat([x, x]), torch.cat([sigma, sigma])
    return lambda: denoiser(x2, sigma2, **both), lambda: denoiser(x, sigma, **uncond)


def graphed_floor(passes: tuple[Step, Step]) -> Step:
    graphs: list[torch.cuda.CUDAGraph] = []
    for model_pass in passes:
        model_pass()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            model_pass()
        graphs.append(graph)

    def replay() -> None:
        for graph in graphs:
            graph.replay()

    return replay


def guided_step(guided: ksag.SAGDenoiser, inputs: Inputs, **options: float) -> Callable[[], Tensor]:
    x, sigma, cond, uncond = inputs
    return partial(guided, x, sigma, cond=cond, uncond=uncond, cond_scale=7.5, **options)


def compiled_wrapper(unet: Any) -> ksag.SAGDenoiser:
    denoiser = as_denoiser(unet, scheduler())
    guided = ksag.SAGDenoiser(denoiser, cond_key=None)
    denoiser.inner_model = torch.compile(unet, fullgraph=True, dynamic=False)
    return guided


def sag_pipeline(unet: Any, inputs: Inputs, steps: int = STEPS + 1) -> Callable[[], float]:
    """Seconds of one step of diffusers' pipeline: the median of the steps of a run, its first left out."""
    vae = AutoencoderKL(block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    pipe: Any = StableDiffusionSAGPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.to(DEVICE, DTYPE)
    pipe.set_progress_bar_config(disable=True)

    def step_seconds() -> float:
        events = []

        def record(*_: Any) -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        pipe(
            prompt_embeds=inputs.cond["encoder_hidden_states"], negative_prompt_embeds=inputs.uncond["encoder_hidden_states"],
            latents=inputs.x, num_inference_steps=steps, output_type="latent", callback=record,
        )  # fmt: skip
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events))

    return step_seconds


def first_call(step: Step) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(model: str, side: int, batch: int, rounds: int, compile_: bool) -> dict[str, Any]:
    """Times and memory of every way to take the step, by name."""
    inputs = make_inputs(model, side, batch)
    bare = make_unet(model)  # the floor's UNet has no hooks
    guided, graphed = (ksag.SAGDenoiser(as_denoiser(make_unet(model), scheduler()), cond_key=None) for _ in range(2))
    graphed.use_cuda_graphs()

    first_calls = {name: first_call(guided_step(wrapper, inputs)) for name, wrapper in ((EAGER, guided), (GRAPHED, graphed))}
    graphed.use_cuda_graphs()
    gc.collect()
    peaks = {GRAPHED: peak_bytes(guided_step(graphed, inputs), DEVICE)}

    passes = floor_passes(as_denoiser(bare, scheduler()), inputs)
    steps: dict[str, Callable[[], Any]] = {
        FLOOR: lambda: [model_pass() for model_pass in passes],
        FLOOR_GRAPHED: graphed_floor(passes),
        CFG: guided_step(guided, inputs, sag_scale=0.0),
        EAGER: guided_step(guided, inputs),
        GRAPHED: guided_step(graphed, inputs),
    }
    if compile_ and (model, side, batch) in COMPILED:
        steps[COMPILE] = guided_step(compiled_wrapper(copy.deepcopy(bare)), inputs)
    timers: dict[str, Callable[[], float]] = {name: partial(seconds, step, DEVICE, STEPS) for name, step in steps.items()}
    if model == "SD 1.5":
        timers[PIPELINE] = sag_pipeline(bare, inputs)
    for timer in timers.values():
        timer()
    peaks |= {name: peak_bytes(steps[name], DEVICE) for name in (FLOOR, CFG, EAGER, COMPILE) if name in steps}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for i in trange(rounds, desc=f"{model}, {side} × {side}, batch {batch}"):
        names = list(timers)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(timers[name]())
    images = {name: steps[name]().double() for name in (EAGER, COMPILE, GRAPHED) if name in steps}
    errors = {name: float((image - images[EAGER]).norm() / images[EAGER].norm()) for name, image in images.items()}
    return {
        "model": model, "side": side, "batch": batch, "times": times, "peaks": peaks, "first_calls": first_calls, "errors": errors,
    }  # fmt: skip


def memory(model: str, side: int) -> dict[str, Any]:
    """Peak memory of an eager step at batch 1."""
    inputs = make_inputs(model, side, 1)
    guided = ksag.SAGDenoiser(as_denoiser(make_unet(model), scheduler()), cond_key=None)
    steps = {CFG: guided_step(guided, inputs, sag_scale=0.0), EAGER: guided_step(guided, inputs)}
    for step in steps.values():
        step()
    return {"model": model, "side": side, **{name: peak_bytes(step, DEVICE) for name, step in steps.items()}}


def ratio(times: dict[str, list[float]], name: str, over: str) -> str:
    if name not in times or over not in times:
        return ""
    return f"{statistics.median(a / b for a, b in zip(times[name], times[over], strict=True)):.3f}"


def mib(peaks: dict[str, int], name: str) -> str:
    return f"{peaks[name] / 2**20:.0f} MiB" if name in peaks else ""


def error(result: dict[str, Any], name: str) -> str:
    return f"{result['errors'][name]:.1e}" if name in result["errors"] else ""


def report(results: list[dict[str, Any]], memories: list[dict[str, Any]], rounds: int) -> str:
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, float16, channels last, medians of {rounds} rounds.", "",
        "| | one step | over its own floor | over plain CFG | peak memory |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for result in results:
        times, peaks = result["times"], result["peaks"]
        lines.append(f"| **{result['model']}, {result['side']} × {result['side']}, batch {result['batch']}** | | | | |")
        for name in (FLOOR, CFG, EAGER, PIPELINE, COMPILE, FLOOR_GRAPHED, GRAPHED):
            if name in times:
                floor = FLOOR_GRAPHED if name in (FLOOR_GRAPHED, GRAPHED) else FLOOR
                lines.append(
                    f"| {name} | {statistics.median(times[name]) * 1e3:.1f} ms | {ratio(times, name, floor)} "
                    f"| {ratio(times, name, CFG)} | {mib(peaks, name)} |"
                )
    lines += [
        "", "| | diffusers' pipeline over ksag with CUDA graphs | first call, eager | first call with CUDA graphs "
        "| its image against eager | the compiled one |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {r['model']}, {r['side']} × {r['side']}, batch {r['batch']} | {ratio(r['times'], PIPELINE, GRAPHED)} "
        f"| {r['first_calls'][EAGER]:.1f} s | {r['first_calls'][GRAPHED]:.1f} s | {error(r, GRAPHED)} | {error(r, COMPILE)} |"
        for r in results
    ]
    lines += ["", "| peak memory, batch 1, eager | plain CFG | a step guided by ksag | ratio |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {m['model']}, {m['side']} × {m['side']} | {mib(m, CFG)} | {mib(m, EAGER)} | {m[EAGER] / m[CFG]:.3f} |" for m in memories
    ]
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("."), show_default=True, help="Where gpu.md and gpu.json go.")
@click.option("--model", "models", multiple=True, type=click.Choice(list(UNETS)), default=list(UNETS), show_default=True)
@click.option("--rounds", default=10, show_default=True)
@click.option("--compile/--no-compile", "compile_", default=True, show_default=True)
@torch.no_grad()
def main(out: Path, models: tuple[str, ...], rounds: int, compile_: bool) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("This measures a CUDA GPU, and there is none here. benchmarks/overhead.py runs on a CPU.")
    warnings.filterwarnings("ignore", category=FutureWarning)
    results: list[dict[str, Any]] = []
    memories: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        """After every case, so that a run that is cut short leaves what it measured."""
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rounds": rounds}
        (out / "gpu.md").write_text(report(results, memories, rounds))
        (out / "gpu.json").write_text(json.dumps({"machine": machine, "steps": results, "memory": memories}, indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()

    for model in models:
        for side in tqdm(SIDES, desc=f"memory, {model}"):
            memories.append(memory(model, side))
            write()
    for case in TIMED:
        if case[0] in models:
            results.append(measure(*case, rounds, compile_))
            write()
    click.echo(f"\n{(out / 'gpu.md').read_text()}")


if __name__ == "__main__":
    main()
