"""What does a guided step cost on a GPU, and how near is it to the passes it cannot avoid?  `python benchmarks/gpu.py`

On diffusers' UNet2DConditionModel at the shapes of Stable Diffusion 1.5 and XL, random weights, float16, channels last, side by
side in one run: the floor (one pass of batch 2B and one of B) eager and as CUDA graphs, plain classifier-free guidance, ksag eager,
compiled, with CUDA graphs and with both, and diffusers' own SAG pipeline. Times are medians of CUDA events over rounds in which
each takes one step from an idle GPU, in random order, launched on one core of the host (Linux). CUDA graphs take three in a row,
since under a sampler the host runs ahead of them, and the pipeline two, of which the second counts. Ratios are medians and
quartiles of the rounds' ratios; memory is the peak above what was there before the step, as a rule the weights. What the variants
compute is compared with each other, and with the same weights in float32. Writes gpu.md and gpu.json.
"""

import contextlib
import copy
import gc
import json
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from measure import Step, peak_bytes, seconds
from torch import Tensor
from tqdm import tqdm
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
TIMED = [("SD 1.5", 64, 1), ("SD 1.5", 64, 4), ("SDXL", 128, 1), ("SDXL", 128, 4), ("SDXL", 256, 1)]
IN_A_ROW = 3
SIDES = (64, 128, 256)
FLOOR, FLOOR_GRAPHED = "floor: 2B + B", "floor, CUDA graphs"
CFG, EAGER, COMPILE, GRAPHED = "plain CFG: 2B", "ksag", "ksag, torch.compile", "ksag, use_cuda_graphs"
BOTH = "ksag, torch.compile, use_cuda_graphs"
IN_GRAPHS = (FLOOR_GRAPHED, GRAPHED, BOTH)
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
    both = ksag.conditioning.join(uncond, cond)
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


def guided_step(guided: ksag.SAGDenoiser, inputs: Inputs, cond_scale: float = 7.5, **options: float) -> Callable[[], Tensor]:
    x, sigma, cond, uncond = inputs
    return partial(guided, x, sigma, cond=cond, uncond=uncond, cond_scale=cond_scale, **options)


def float32(tree: Any) -> Any:
    return ksag.conditioning.transform(lambda leaf: leaf.float(), tree)


class Computed(NamedTuple):
    """What a step computes, on the CPU, in float64 but for the last."""

    u: Tensor
    unscaled: Tensor
    """The image at cond_scale 1."""
    image: Tensor
    """The image at cond_scale 7.5."""
    masked: Tensor
    """(b, h', w'): the tokens above the threshold."""


def computed(guided: ksag.SAGDenoiser, inputs: Inputs) -> Computed:
    with guided.trace() as steps:
        unscaled, image = (guided_step(guided, inputs, cond_scale)().double().cpu() for cond_scale in (1.0, 7.5))
    return Computed(steps[-1].uncond.double(), unscaled, image, steps[-1].saliency > guided.mask_threshold)


def computed_in_float32(unet: Any, inputs: Inputs) -> Computed:
    guided = ksag.SAGDenoiser(as_denoiser(copy.deepcopy(unet).float(), scheduler()), cond_key=None)
    return computed(guided, Inputs(*map(float32, inputs)))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def differences(actual: Computed, expected: Computed) -> dict[str, float]:
    tensors = {name: relative(getattr(actual, name), getattr(expected, name)) for name in ("u", "unscaled", "image")}
    return {**tensors, "tokens": int((actual.masked != expected.masked).sum())}


def compiled_wrapper(unet: Any) -> ksag.SAGDenoiser:
    denoiser = as_denoiser(unet, scheduler())
    guided = ksag.SAGDenoiser(denoiser, cond_key=None)
    denoiser.inner_model = torch.compile(unet, fullgraph=True, dynamic=False)
    return guided


def sag_pipeline(unet: Any, inputs: Inputs) -> Callable[[], float]:
    """Seconds of one step of diffusers' pipeline: the second of two."""
    from diffusers import StableDiffusionSAGPipeline  # here, because it is deprecated and may go

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
            latents=inputs.x, num_inference_steps=2, output_type="latent", callback=record,
        )  # fmt: skip
        torch.cuda.synchronize()
        first, second = events
        return first.elapsed_time(second) / 1e3

    return step_seconds


def first_call(step: Step) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(model: str, side: int, batch: int, budget: float, compile_: bool) -> dict[str, Any]:
    """Times and memory of every way to take the step, by name, and how near what they compute is."""
    inputs = make_inputs(model, side, batch)
    bare = make_unet(model)  # the floor's UNet has no hooks
    exact = computed_in_float32(bare, inputs)
    wrappers = {name: ksag.SAGDenoiser(as_denoiser(make_unet(model), scheduler()), cond_key=None) for name in (EAGER, GRAPHED)}
    if compile_:
        wrappers |= {name: compiled_wrapper(copy.deepcopy(bare)) for name in (COMPILE, BOTH)}
    steps: dict[str, Step] = {name: guided_step(wrapper, inputs) for name, wrapper in wrappers.items()}

    first_calls, peaks = {EAGER: first_call(steps[EAGER])}, {}
    for name in (GRAPHED, BOTH) if compile_ else (GRAPHED,):
        wrappers[name].use_cuda_graphs()
        first_calls[name] = first_call(steps[name])
        wrappers[name].use_cuda_graphs()  # anew, now that all libraries are loaded
        gc.collect()
        peaks[name] = peak_bytes(steps[name], DEVICE)

    passes = floor_passes(as_denoiser(bare, scheduler()), inputs)
    steps |= {
        FLOOR: lambda: [model_pass() for model_pass in passes],
        CFG: guided_step(wrappers[EAGER], inputs, sag_scale=0.0),
        FLOOR_GRAPHED: graphed_floor(passes),
    }
    timers: dict[str, Callable[[], float]] = {
        name: partial(seconds, step, DEVICE, IN_A_ROW if name in IN_GRAPHS else 1) for name, step in steps.items()
    }
    if model == "SD 1.5":
        timers[PIPELINE] = sag_pipeline(bare, inputs)
    for timer in [*timers.values()] * 2:  # a wrapper's first step is checked, and therefore eager
        timer()
    peaks |= {name: peak_bytes(steps[name], DEVICE) for name in (FLOOR, CFG, EAGER, COMPILE) if name in steps}
    outputs = {name: computed(wrapper, inputs) for name, wrapper in wrappers.items()}
    shape = {"model": model, "side": side, "batch": batch}
    return {
        **shape, "peaks": peaks, "first_calls": first_calls, "tokens": exact.masked.numel(),
        "from_float32": {name: differences(output, exact) for name, output in outputs.items()},
        "from_eager": {name: differences(output, outputs[EAGER]) for name, output in outputs.items()},
        "times": rounds(timers, budget, case(shape)),
    }  # fmt: skip


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keeps this thread, which launches all kernels, on one core: to move costs it more than what is measured here."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def rounds(timers: dict[str, Callable[[], float]], budget: float, name: str) -> dict[str, list[float]]:
    """Times in rounds, each in an order of its own, until `budget` seconds are over: two at least, for quartiles."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    order = list(timers)
    ends = time.perf_counter() + budget
    with one_core(), tqdm(desc=name, unit=" rounds") as bar:
        while bar.n < 2 or time.perf_counter() < ends:
            random.shuffle(order)
            for timer in order:
                times[timer].append(timers[timer]())
            bar.update()
    return times


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
    if name == over:
        return "1"
    low, middle, high = statistics.quantiles((a / b for a, b in zip(times[name], times[over], strict=True)), n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def mib(peaks: dict[str, int], name: str) -> str:
    return f"{peaks[name] / 2**20:.0f} MiB" if name in peaks else ""


def case(result: dict[str, Any]) -> str:
    return f"{result['model']}, {result['side']} × {result['side']}, batch {result['batch']}"


def table(*rows: list[str]) -> str:
    head, *body = ("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def steps_table(results: list[dict[str, Any]]) -> str:
    rows = [["", "one step", "over the floor, graphed for graphs (quartiles)", "over plain CFG", "peak memory"]]
    for result in results:
        times, peaks = result["times"], result["peaks"]
        rows.append([f"**{case(result)}**, {len(times[FLOOR])} rounds", "", "", "", ""])
        for name in (FLOOR, CFG, EAGER, PIPELINE, COMPILE, FLOOR_GRAPHED, GRAPHED, BOTH):
            if name in times:
                floor = FLOOR_GRAPHED if name in IN_GRAPHS else FLOOR
                middle = f"{statistics.median(times[name]) * 1e3:.1f} ms"
                rows.append([name, middle, ratio(times, name, floor), ratio(times, name, CFG), mib(peaks, name)])
    return table(*rows)


def first_calls_table(results: list[dict[str, Any]]) -> str:
    over = (EAGER, GRAPHED, BOTH)
    head = ["", *(f"{PIPELINE} over {name}" for name in over), "first call, eager", "first call, CUDA graphs"]
    return table(head, *(
        [case(r), *(ratio(r["times"], PIPELINE, name) for name in over),
         *(f"{r['first_calls'][name]:.1f} s" for name in (EAGER, GRAPHED))]
        for r in results
    ))  # fmt: skip


def differences_table(results: list[dict[str, Any]]) -> str:
    """u is one prediction; the images are at cond_scale 7.5, or 1."""
    rows = [["relative difference", "u", "image, cond_scale 1", "image, cond_scale 7.5", "tokens that changed sides"]]
    for result in results:
        rows.append([f"**{case(result)}**", "", "", "", ""])
        for variant, origin, of in (
            ("eager from float32", "from_float32", EAGER), ("compiled from float32", "from_float32", COMPILE),
            ("compiled from eager", "from_eager", COMPILE), ("CUDA graphs from eager", "from_eager", GRAPHED),
            ("compiled, CUDA graphs from eager", "from_eager", BOTH),
        ):  # fmt: skip
            if of in result[origin]:
                d = result[origin][of]
                errors = (f"{d[name]:.1e}" if d[name] else "0" for name in ("u", "unscaled", "image"))
                rows.append([variant, *errors, f"{d['tokens']} of {result['tokens']}"])
    return table(*rows)


def memory_table(memories: list[dict[str, Any]]) -> str:
    head = ["peak memory, batch 1, eager", "plain CFG", "a step guided by ksag", "ratio"]
    return table(head, *(
        [f"{m['model']}, {m['side']} × {m['side']}", mib(m, CFG), mib(m, EAGER), f"{m[EAGER] / m[CFG]:.3f}"] for m in memories
    ))  # fmt: skip


def report(run: dict[str, Any]) -> str:
    """gpu.md, from what gpu.json holds."""
    steps, machine = run["steps"], f"{run['gpu']}, torch {run['torch']}, float16, channels last."
    tables = steps_table(steps), first_calls_table(steps), differences_table(steps), memory_table(run["memory"])
    return "\n\n".join((machine, *tables)) + "\n"


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("."), show_default=True, help="Where gpu.md and gpu.json go.")
@click.option("--model", "models", multiple=True, type=click.Choice(list(UNETS)), default=list(UNETS), show_default=True)
@click.option("--seconds", "budget", default=60.0, show_default=True, help="How long to take rounds of each shape.")
@click.option("--compile/--no-compile", "compile_", default=True, show_default=True)
@torch.no_grad()
def main(out: Path, models: tuple[str, ...], budget: float, compile_: bool) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("This measures a CUDA GPU, and there is none here. benchmarks/overhead.py runs on a CPU.")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.backends.cudnn.allow_tf32 = False
    gc.disable()  # as timeit does; each case ends with a collection
    run: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "steps": [], "memory": []}
    out.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        """After every case, so that a run that is cut short leaves what it measured."""
        (out / "gpu.md").write_text(report(run))
        (out / "gpu.json").write_text(json.dumps(run, indent=1) + "\n")
        torch._dynamo.reset()  # or the shapes together pass its limit of recompilations
        gc.collect()
        torch.cuda.empty_cache()

    for model in models:
        for side in tqdm(SIDES, desc=f"memory, {model}"):
            run["memory"].append(memory(model, side))
            write()
    for shape in TIMED:
        if shape[0] in models:
            run["steps"].append(measure(*shape, budget, compile_))
            write()
    click.echo(f"\n{(out / 'gpu.md').read_text()}")


if __name__ == "__main__":
    main()
