"""What does a guided step cost on a GPU, and how near is it to the passes it cannot avoid?  `python benchmarks/gpu.py`

On diffusers' UNet2DConditionModel at the shapes of Stable Diffusion 1.5 and XL, random weights, float16, channels last, side by
side in one run: the floor (one pass of batch 2B and one of B) eager and as CUDA graphs, plain classifier-free guidance, ksag eager,
compiled and with CUDA graphs, and diffusers' own SAG pipeline. Times are medians of CUDA events over rounds in which each takes
three steps in a row, as a sampler does; ratios are medians and quartiles of the rounds' ratios; memory is the peak above what was
there before the step, as a rule the weights. Images are compared with that of the same weights in float32. Writes gpu.md and
gpu.json.
"""

import copy
import gc
import itertools
import json
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionSAGPipeline, UNet2DConditionModel
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


def float32(tree: Any) -> Any:
    return ksag.conditioning.transform(lambda leaf: leaf.float(), tree)


def exact_image(unet: Any, inputs: Inputs) -> Tensor:
    """What the weights of `unet` and these inputs give in float32."""
    guided = ksag.SAGDenoiser(as_denoiser(copy.deepcopy(unet).float(), scheduler()), cond_key=None)
    return guided_step(guided, Inputs(*map(float32, inputs)))().double()


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


def host_ratio(guided: ksag.SAGDenoiser, step: Step, repeats: int = 50) -> float:
    """Host time of an eager step over that of its model passes alone, taken in the same step, so that the host's noise cancels.

    Where the host's kernel launches bound the step, this is its time over its floor's.
    """
    spent: defaultdict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - started
            return result

        return call

    model, tap, ratios = guided.inner_model, guided.tap, []
    with patch.object(model, "forward", timed("passes", model.forward)), patch.object(tap, "reduce", timed("saliency", tap.reduce)):
        for _ in range(repeats):
            torch.cuda.synchronize()
            spent.clear()
            timed("step", step)()
            ratios.append(spent["step"] / (spent["passes"] - spent["saliency"]))  # the saliency is taken within a pass
    return statistics.median(ratios)


def measure(model: str, side: int, batch: int, budget: float, compile_: bool) -> dict[str, Any]:
    """Times and memory of every way to take the step, by name, and how near the images are."""
    inputs = make_inputs(model, side, batch)
    bare = make_unet(model)  # the floor's UNet has no hooks
    exact = exact_image(bare, inputs)
    guided, graphed = (ksag.SAGDenoiser(as_denoiser(make_unet(model), scheduler()), cond_key=None) for _ in range(2))
    graphed.use_cuda_graphs()

    first_calls = {name: first_call(guided_step(wrapper, inputs)) for name, wrapper in ((EAGER, guided), (GRAPHED, graphed))}
    graphed.use_cuda_graphs()
    gc.collect()
    peaks = {GRAPHED: peak_bytes(guided_step(graphed, inputs), DEVICE)}

    passes = floor_passes(as_denoiser(bare, scheduler()), inputs)
    steps: dict[str, Callable[[], Any]] = {
        FLOOR: lambda: [model_pass() for model_pass in passes],
        EAGER: guided_step(guided, inputs),
        CFG: guided_step(guided, inputs, sag_scale=0.0),
        FLOOR_GRAPHED: graphed_floor(passes),
        GRAPHED: guided_step(graphed, inputs),
    }
    if compile_:
        steps[COMPILE] = guided_step(compiled_wrapper(copy.deepcopy(bare)), inputs)
    timers: dict[str, Callable[[], float]] = {name: partial(seconds, step, DEVICE, STEPS) for name, step in steps.items()}
    if model == "SD 1.5":
        timers[PIPELINE] = sag_pipeline(bare, inputs)
    for timer in timers.values():
        timer()
    peaks |= {name: peak_bytes(steps[name], DEVICE) for name in (FLOOR, CFG, EAGER, COMPILE) if name in steps}
    images = {name: steps[name]().double() for name in (EAGER, COMPILE, GRAPHED) if name in steps}
    shape = {"model": model, "side": side, "batch": batch}
    return {
        **shape, "peaks": peaks, "first_calls": first_calls,
        "host_ratio": host_ratio(guided, steps[EAGER]),
        "from_float32": {name: relative(image, exact) for name, image in images.items()},
        "from_eager": {name: relative(image, images[EAGER]) for name, image in images.items()},
        "times": rounds(timers, budget, case(shape)),
    }  # fmt: skip


def relative(image: Tensor, expected: Tensor) -> float:
    return float((image - expected).norm() / expected.norm())


def rounds(timers: dict[str, Callable[[], float]], budget: float, name: str) -> dict[str, list[float]]:
    """Times in rounds, each of which begins with another timer, until `budget` seconds are over: two at least, for quartiles."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    order = list(timers)
    ends = time.perf_counter() + budget
    with tqdm(desc=name, unit=" rounds") as bar:
        while bar.n < 2 or time.perf_counter() < ends:
            for timer in order:
                times[timer].append(timers[timer]())
            order = order[1:] + order[:1]
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


def error(errors: dict[str, float], name: str) -> str:
    return f"{errors[name]:.1e}" if name in errors else ""


def case(result: dict[str, Any]) -> str:
    return f"{result['model']}, {result['side']} × {result['side']}, batch {result['batch']}"


def table(*rows: list[str]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def steps_table(results: list[dict[str, Any]]) -> str:
    rows = [["", "one step", "over its own floor (quartiles)", "over plain CFG", "peak memory"]]
    for result in results:
        times, peaks = result["times"], result["peaks"]
        rows.append([f"**{case(result)}**, {len(times[FLOOR])} rounds", "", "", "", ""])
        for name in (FLOOR, CFG, EAGER, PIPELINE, COMPILE, FLOOR_GRAPHED, GRAPHED):
            if name in times:
                floor = FLOOR_GRAPHED if name in (FLOOR_GRAPHED, GRAPHED) else FLOOR
                middle = f"{statistics.median(times[name]) * 1e3:.1f} ms"
                rows.append([name, middle, ratio(times, name, floor), ratio(times, name, CFG), mib(peaks, name)])
    return table(*rows)


def launches_table(results: list[dict[str, Any]]) -> str:
    head = ["", "diffusers' pipeline over ksag with CUDA graphs", "eager: host time over that of the passes",
            "first call, eager", "first call with CUDA graphs"]  # fmt: skip
    return table(head, *(
        [case(r), ratio(r["times"], PIPELINE, GRAPHED), f"{r['host_ratio']:.3f}",
         *(f"{r['first_calls'][name]:.1f} s" for name in (EAGER, GRAPHED))]
        for r in results
    ))  # fmt: skip


def errors_table(results: list[dict[str, Any]]) -> str:
    head = ["relative difference of the images", "eager, from float32", "CUDA graphs, from float32", "compiled, from float32",
            "CUDA graphs, from eager", "compiled, from eager"]  # fmt: skip
    return table(head, *(
        [case(r), *(error(r["from_float32"], name) for name in (EAGER, GRAPHED, COMPILE)),
         *(error(r["from_eager"], name) for name in (GRAPHED, COMPILE))]
        for r in results
    ))  # fmt: skip


def memory_table(memories: list[dict[str, Any]]) -> str:
    head = ["peak memory, batch 1, eager", "plain CFG", "a step guided by ksag", "ratio"]
    return table(head, *(
        [f"{m['model']}, {m['side']} × {m['side']}", mib(m, CFG), mib(m, EAGER), f"{m[EAGER] / m[CFG]:.3f}"] for m in memories
    ))  # fmt: skip


def report(results: list[dict[str, Any]], memories: list[dict[str, Any]]) -> str:
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, float16, channels last."
    parts = machine, steps_table(results), launches_table(results), errors_table(results), memory_table(memories)
    return "\n\n".join(parts) + "\n"


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
    results: list[dict[str, Any]] = []
    memories: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        """After every case, so that a run that is cut short leaves what it measured."""
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "steps_in_a_row": STEPS}
        (out / "gpu.md").write_text(report(results, memories))
        (out / "gpu.json").write_text(json.dumps({"machine": machine, "steps": results, "memory": memories}, indent=1) + "\n")
        torch._dynamo.reset()  # or the shapes together pass its limit of recompilations
        gc.collect()
        torch.cuda.empty_cache()

    for model in models:
        for side in tqdm(SIDES, desc=f"memory, {model}"):
            memories.append(memory(model, side))
            write()
    for shape in TIMED:
        if shape[0] in models:
            results.append(measure(*shape, budget, compile_))
            write()
    click.echo(f"\n{(out / 'gpu.md').read_text()}")


if __name__ == "__main__":
    main()
