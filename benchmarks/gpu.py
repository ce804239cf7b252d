"""How long does a guided step take on a GPU, and how much does ksag add to the model's calls?  `python benchmarks/gpu.py`

On diffusers' models at the shapes of Stable Diffusion 1.5, XL and 3 medium, and Flux dev, with random weights, side by side in one
run, eager and as CUDA graphs: plain classifier-free guidance (one pass of 2B), ksag's forms, and the bare passes that each cannot
avoid (its floor: 2B + B for exact SAG, 3B for SAG in one pass and for PAG, 4B for both together; a B less without uncond).
For Stable Diffusion 1.5 diffusers' own SAG pipeline is timed too, and with --comfyui ComfyUI's node.

Times are medians of CUDA events over rounds in which each form takes one step from an idle GPU, in random order, launched on one
core of the host (Linux). CUDA graphs take several steps in a row (12 with Stable Diffusion 1.5, 6 with 3 medium, otherwise 3),
since under a sampler the host runs ahead of the GPU from the second step on. The form with `every=3` takes at least three, since
only every third step computes the direction. diffusers' pipeline takes two, of which the second counts. Ratios are medians and
quartiles of the rounds' ratios. Memory is the peak above the weights. Writes gpu.md and gpu.json; a case that gpu.json holds is
not measured again.
"""

import contextlib
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
import comfyui
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from measure import Step, peak_bytes, seconds
from torch import Tensor, nn
from tqdm import tqdm

import ksag
from ksag.adapters.diffusers import denoiser as as_denoiser
from ksag.model.conditioning import join

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
TRANSFORMERS = ("SD3 medium", "Flux dev")
CASES = [("SD 1.5", 64, 1), ("SDXL", 128, 1), ("SD3 medium", 128, 1), ("Flux dev", 128, 1), ("SD 1.5", 64, 4), ("SDXL", 128, 4)]
"""(model, side of the latent, batch), the most important first."""
EAGER, GRAPHED = MODES = ("eager", "CUDA graphs")
CFG, EXACT, ONE, THIRD, PAG, BOTH = FORMS = (
    "plain CFG", "SAG", "SAG, one_pass", "SAG, one_pass, every=3", "PAG", "SAG, one_pass + PAG",
)  # fmt: skip
FLOORS = {EXACT: "floor: 2B + B", ONE: "floor: 3B", PAG: "floor: 3B", BOTH: "floor: 4B"}
SETTINGS: dict[str, dict[str, Any]] = {
    CFG: {"sag": 0.0, "pag": 0.0}, EXACT: {"pag": 0.0}, ONE: {"pag": 0.0, "one_pass": True},
    THIRD: {"pag": 0.0, "one_pass": True, "every": 3}, PAG: {"sag": 0.0}, BOTH: {"one_pass": True},
}  # fmt: skip
PIPELINE = "diffusers' SAG pipeline"
IN_A_ROW = {"SD 1.5": 12, "SD3 medium": 6}
"""Steps of CUDA graphs that are timed together; 3 where one takes longer."""


class Inputs(NamedTuple):
    x: Tensor
    sigma: Tensor
    cond: dict[str, Any]
    uncond: dict[str, Any] | None
    """None for a model that is distilled to do without."""


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def make_unet(model: str) -> Any:
    torch.manual_seed(0)
    with DEVICE:
        unet: Any = UNet2DConditionModel(**UNETS[model])
    return unet.to(DTYPE, memory_format=torch.channels_last).eval().requires_grad_(False)


def make_inputs(model: str, side: int, batch: int) -> Inputs:
    torch.manual_seed(1)
    make = partial(torch.randn, device=DEVICE, dtype=DTYPE)

    def conditioning() -> dict[str, Any]:
        tokens, width = (77, 768) if model == "SD 1.5" else (77, 2048)
        cond: dict[str, Any] = {"encoder_hidden_states": make(batch, tokens, width)}
        if model == "SDXL":
            cond["added_cond_kwargs"] = {"text_embeds": make(batch, 1280), "time_ids": make(batch, 6)}
        return cond

    x = (make(batch, 4, side, side) * 4).to(memory_format=torch.channels_last)
    return Inputs(x, torch.full((batch,), 4.0, device=DEVICE), conditioning(), conditioning())


def filled(make: Callable[[], Any]) -> Any:
    """A model whose weights are drawn on the device, in bfloat16: to draw billions of them on the host would take minutes."""
    with torch.device("meta"):
        model: Any = make().to(torch.bfloat16)
    model = model.to_empty(device=DEVICE)
    torch.manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
    return model.eval().requires_grad_(False)


def make_transformer(model: str, side: int, batch: int) -> tuple[nn.Module, Inputs]:
    """A transformer of the real size as a denoiser, and its inputs: 512 text tokens for Flux, 333 for SD3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, SD3Transformer2DModel

    torch.manual_seed(1)
    make = partial(torch.randn, device=DEVICE)
    low = partial(make, dtype=torch.bfloat16)
    x, sigma = make(batch, 16, side, side) * 2, torch.full((batch,), 1.0, device=DEVICE)
    if model == "SD3 medium":
        transformer = filled(lambda: SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
            caption_projection_dim=1536, pos_embed_max_size=192,
        ))  # fmt: skip
        cond, uncond = ({"encoder_hidden_states": low(batch, 333, 4096), "pooled_projections": low(batch, 2048)} for _ in range(2))
        return as_denoiser(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0)), Inputs(x, sigma, cond, uncond)
    transformer = filled(lambda: FluxTransformer2DModel(guidance_embeds=True))
    cond = {"encoder_hidden_states": low(batch, 512, 4096), "pooled_projections": low(batch, 768)}
    cond["guidance"] = torch.full((batch,), 3.5, device=DEVICE)
    return as_denoiser(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0)), Inputs(x, sigma, cond, None)


def bare_passes(denoiser: nn.Module, inputs: Inputs) -> dict[str, list[Step]]:
    """The passes that each form cannot avoid, on their own."""
    x, sigma, cond, uncond = inputs

    def model_pass(n: int) -> Step:
        both = join(*([cond, cond if uncond is None else uncond] * n)[:n])
        return partial(denoiser, torch.cat([x] * n), torch.cat([sigma] * n), **both)

    own = 1 if uncond is None else 2
    passes = {n: model_pass(n) for n in range(1, own + 3)}
    return {
        "floor: 2B": [passes[own]], "floor: 2B + B": [passes[own], passes[1]], "floor: 3B": [passes[own + 1]],
        "floor: 4B": [passes[own + 2]],
    }  # fmt: skip


def in_turn(passes: list[Step]) -> Step:
    def step() -> None:
        for model_pass in passes:
            model_pass()

    return step


def graphed(passes: list[Step]) -> Step:
    graphs: list[torch.cuda.CUDAGraph] = []
    for model_pass in passes:
        model_pass()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            model_pass()
        graphs.append(graph)

    def step() -> None:
        for graph, _ in zip(graphs, passes, strict=True):  # the passes hold what the graphs read
            graph.replay()

    return step


class Guided:
    """ksag's forms of a step, in one mode."""

    def __init__(self, denoiser: nn.Module, inputs: Inputs, mode: str, repeats: int):
        self.sag, self.pag, self.inputs = ksag.SAG(), ksag.PAG(), inputs
        self.wrapper = ksag.GuidedDenoiser(denoiser, [self.sag, self.pag], cond_key=None)
        self.repeats = repeats if mode == GRAPHED else 1
        if mode == GRAPHED:
            self.wrapper.use_cuda_graphs(limit=16)

    def step(self, form: str) -> Step:
        x, sigma, cond, uncond = self.inputs
        settings = {"sag": 0.5, "pag": 3.0, "one_pass": False, "every": 1, **SETTINGS[form]}
        self.sag.scale, self.pag.scale = settings["sag"], settings["pag"]
        self.sag.one_pass, self.sag.every = settings["one_pass"], settings["every"]
        self.wrapper.reset()
        args = {} if uncond is None else {"uncond": uncond, "cond_scale": 7.5}
        return partial(self.wrapper, x, sigma, cond=cond, **args)

    def seconds(self, form: str) -> float:
        return seconds(self.step(form), DEVICE, max(3, self.repeats) if form == THIRD else self.repeats)

    def peak(self, form: str) -> int:
        step = self.step(form)
        step()
        step()
        return peak_bytes(step, DEVICE)


def sag_pipeline(unet: Any, inputs: Inputs) -> Callable[[], float]:
    """Seconds of one step of diffusers' pipeline: the second of two."""
    from diffusers import StableDiffusionSAGPipeline  # here, because it is deprecated and may go
    from transformers import CLIPTextConfig, CLIPTextModel

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

        assert inputs.uncond is not None
        pipe(
            prompt_embeds=inputs.cond["encoder_hidden_states"], negative_prompt_embeds=inputs.uncond["encoder_hidden_states"],
            latents=inputs.x, num_inference_steps=2, output_type="latent", callback=record,
        )  # fmt: skip
        torch.cuda.synchronize()
        first, second = events
        return first.elapsed_time(second) / 1e3

    return step_seconds


def key(form: str, mode: str) -> str:
    return f"{form} ({mode})"


def measure(model: str, side: int, batch: int, budget: float, checkout: Path | None) -> dict[str, Any]:
    """Times and memory of every form of a step, by name."""
    if model in TRANSFORMERS:
        denoiser, inputs = make_transformer(model, side, batch)
    else:
        denoiser, inputs = as_denoiser(make_unet(model), scheduler()), make_inputs(model, side, batch)
    timers: dict[str, Callable[[], float]] = {}
    peaks: dict[str, int] = {}
    repeats = IN_A_ROW.get(model, 3)
    for mode in MODES:
        for floor, passes in bare_passes(denoiser, inputs).items():
            step = (graphed if mode == GRAPHED else in_turn)(passes)
            step()
            if mode == EAGER:
                peaks[key(floor, mode)] = peak_bytes(step, DEVICE)
            timers[key(floor, mode)] = partial(seconds, step, DEVICE, repeats if mode == GRAPHED else 1)
    for mode in MODES:
        guided = Guided(denoiser, inputs, mode, repeats)
        for form in FORMS:
            if mode == EAGER:
                peaks[key(form, mode)] = guided.peak(form)
            timers[key(form, mode)] = partial(guided.seconds, form)
    if model == "SD 1.5" and batch == 1:
        timers[PIPELINE] = sag_pipeline(make_unet(model), inputs)
        if checkout is not None:
            steps_there = comfyui.steps(checkout, side, batch, DEVICE, DTYPE)
            timers |= {name: partial(seconds, step, DEVICE) for name, step in steps_there.items()}
    for timer in [*timers.values()] * 2:  # first calls are checked, captured, or load libraries
        timer()
    return {"model": model, "side": side, "batch": batch, "peaks": peaks, "times": rounds(timers, budget, model)}


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keeps this thread, which launches all kernels, on one core: moving costs more than what is measured here."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def rounds(timers: dict[str, Callable[[], float]], budget: float, name: str) -> dict[str, list[float]]:
    """Times in rounds, each in its own random order, until `budget` seconds are over: at least two, for quartiles."""
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


def quartiles(times: dict[str, list[float]], name: str, over: str) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile of the rounds' ratios."""
    low, middle, high = statistics.quantiles((a / b for a, b in zip(times[name], times[over], strict=True)), n=4)
    return low, middle, high


def case(result: dict[str, Any]) -> str:
    return f"{result['model']}, {result['side']} × {result['side']}, batch {result['batch']}"


def table(*rows: list[str]) -> str:
    head, *body = ("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def times_table(result: dict[str, Any], mode: str) -> str:
    """One case and one mode: ratios over plain guidance and over the floor."""
    times, peaks = result["times"], result["peaks"]
    rows = [[f"{case(result)}, {mode}", "one step", "over plain", "over its floor", "memory over its floor"]]
    for form in FORMS:
        name, floor = key(form, mode), key(FLOORS[form], mode) if form in FLOORS else ""
        over_floor = "{1:.3f} ({0:.3f} to {2:.3f})".format(*quartiles(times, name, floor)) if floor else ""
        memory = f"{peaks[name] / peaks[floor]:.3f}" if floor and name in peaks else ""
        over_plain = f"{quartiles(times, name, key(CFG, mode))[1]:.2f}"
        rows.append([form, f"{statistics.median(times[name]) * 1e3:.1f} ms", over_plain, over_floor, memory])
    for name in (PIPELINE, comfyui.CFG, comfyui.SAG):
        if name in times and mode == EAGER:
            over_plain = f"{quartiles(times, name, key(CFG, mode))[1]:.2f}"
            rows.append([name, f"{statistics.median(times[name]) * 1e3:.1f} ms", over_plain, "", ""])
    return table(*rows)


def report(run: dict[str, Any]) -> str:
    """gpu.md, from what gpu.json holds."""
    machine = f"{run['gpu']}, torch {run['torch']}; UNets in float16, channels last; transformers in bfloat16."
    tables = [times_table(result, mode) for result in run["cases"] for mode in MODES]
    return "\n\n".join([machine, *tables]) + "\n"


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("."), show_default=True, help="Where gpu.md and gpu.json go.")
@click.option("--model", "models", multiple=True, default=[*UNETS, *TRANSFORMERS], show_default=True)
@click.option("--seconds", "budget", default=40.0, show_default=True, help="How long to take rounds of each case.")
@click.option("--comfyui", "checkout", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None,
              help="A checkout of ComfyUI, whose node is then timed too.")  # fmt: skip
@torch.no_grad()
def main(out: Path, models: tuple[str, ...], budget: float, checkout: Path | None) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("This measures a CUDA GPU, and there is none here. benchmarks/overhead.py runs on a CPU.")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.backends.cudnn.allow_tf32 = False
    gc.disable()  # as timeit does; each case ends with a collection
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    run: dict[str, Any] = {**machine, "cases": []}
    out.mkdir(parents=True, exist_ok=True)
    if (out / "gpu.json").exists():
        run = json.loads((out / "gpu.json").read_text())
        if any(run[name] != value for name, value in machine.items()):
            raise click.ClickException(f"{out / 'gpu.json'} is of {run['gpu']} and torch {run['torch']}: choose another --out.")
    there = {case(result) for result in run["cases"]}
    for shape in CASES:
        if shape[0] not in models or case(dict(zip(("model", "side", "batch"), shape, strict=True))) in there:
            continue
        run["cases"].append(measure(*shape, budget, checkout))
        (out / "gpu.json").write_text(json.dumps(run, indent=1) + "\n")  # after each case: a run may be cut short
        (out / "gpu.md").write_text(report(run))
        gc.collect()
        torch.cuda.empty_cache()
    click.echo(f"\n{report(run)}")


if __name__ == "__main__":
    main()
