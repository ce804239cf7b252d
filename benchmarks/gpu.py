"""What does a guided step cost on a GPU, and how near is it to the passes it cannot avoid?  `python benchmarks/gpu.py`

On diffusers' UNet2DConditionModel at the shapes of Stable Diffusion 1.5 and XL, random weights, float16, channels last, side by
side in one run, eager, as CUDA graphs, compiled, and both: plain classifier-free guidance (one pass of 2B), ksag and its floor
(one pass of 2B and one of B), ksag in one pass, at each call and at every third, and its floor (one pass of 3B); diffusers' own
SAG pipeline; and with --comfyui ComfyUI's node. Times are medians of CUDA events over rounds in which each takes one step from an
idle GPU, in random order, launched on one core of the host (Linux). CUDA graphs take three in a row, since under a sampler the
host runs ahead of them, as do steps of which every third is another, and the pipeline two, of which the second counts. Ratios are
medians and quartiles of the rounds' ratios; at batch 1 those of CUDA graphs are taken of whole runs of `sample_euler` too, which
like most samplers reads sigma on the host itself. Memory is the peak above what was there before the step, as a rule the weights.
What the variants compute is compared with each other, and with the same weights in float32. Writes gpu.md and gpu.json; what
gpu.json holds already is not measured again.
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
import comfyui
import k_diffusion as K
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
COMPILED_TOO = [("SD 1.5", 64, 1), ("SDXL", 128, 1)]
"""A UNet takes minutes to compile."""
IN_A_ROW = 3
RUN_STEPS = 12
SIDES = (64, 128, 256)
EAGER, GRAPHED, COMPILED, BOTH = MODES = ("eager", "CUDA graphs", "compiled", "compiled, CUDA graphs")
CFG, FLOOR, SAG, FLOOR_ONE, ONE, THIRD = FORMS = (
    "plain CFG: 2B", "floor: 2B + B", "ksag", "floor: 3B", "ksag, one_pass", "ksag, one_pass, every=3",
)  # fmt: skip
FLOORS = {SAG: FLOOR, ONE: FLOOR_ONE}
SETTINGS: dict[str, dict[str, Any]] = {
    SAG: {"one_pass": False, "every": 1}, ONE: {"one_pass": True, "every": 1}, THIRD: {"one_pass": True, "every": 3},
}  # fmt: skip
PIPELINE = "diffusers SAG pipeline"


def key(form: str, mode: str) -> str:
    return f"{form} ({mode})"


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


def bare_pass(denoiser: torch.nn.Module, inputs: Inputs, parts: str) -> Step:
    """One pass of the model for the conditionings that `parts` spells, "u" and "c"."""
    x, sigma, cond, uncond = inputs
    n = len(parts)
    both = ksag.model.conditioning.join(*({"u": uncond, "c": cond}[part] for part in parts))
    x, sigma = torch.cat([x] * n), torch.cat([sigma] * n)
    return lambda: denoiser(x, sigma, **both)


def bare_passes(denoiser: torch.nn.Module, inputs: Inputs) -> dict[str, list[Step]]:
    """The passes that a step cannot avoid, on their own."""
    forms = {CFG: ("uc",), FLOOR: ("uc", "u"), FLOOR_ONE: ("ucu",)}
    return {form: [bare_pass(denoiser, inputs, parts) for parts in passes] for form, passes in forms.items()}


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


def guided_step(guided: ksag.SAGDenoiser, inputs: Inputs, cond_scale: float = 7.5, **options: float) -> Callable[[], Tensor]:
    x, sigma, cond, uncond = inputs
    return partial(guided, x, sigma, cond=cond, uncond=uncond, cond_scale=cond_scale, **options)


def float32(tree: Any) -> Any:
    return ksag.model.conditioning.transform(lambda leaf: leaf.float(), tree)


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
    denoiser: Any = as_denoiser(unet, scheduler())
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


class Guided:
    """The forms of a guided step, in one mode."""

    def __init__(self, wrapper: ksag.SAGDenoiser, inputs: Inputs, mode: str):
        self.wrapper, self.inputs, self.mode = wrapper, inputs, mode

    def set(self, form: str) -> None:
        for name, value in SETTINGS[form].items():
            setattr(self.wrapper, name, value)
        self.wrapper.reset()

    def seconds(self, form: str) -> float:
        self.set(form)
        in_a_row = IN_A_ROW if form == THIRD or self.mode in (GRAPHED, BOTH) else 1
        return seconds(guided_step(self.wrapper, self.inputs), DEVICE, in_a_row)

    def seconds_in_a_run(self, form: str) -> float:
        """A step of a whole run."""
        if form != CFG:
            self.set(form)
        x, _, cond, uncond = self.inputs
        extra_args = {"cond": cond, "uncond": uncond, "cond_scale": 7.5} | ({"sag_scale": 0.0} if form == CFG else {})
        sigmas = self.wrapper.get_sigmas(RUN_STEPS)
        run = partial(K.sampling.sample_euler, self.wrapper, x, sigmas, extra_args=extra_args, disable=True)
        return seconds(run, DEVICE) / RUN_STEPS

    def peak(self, form: str) -> int:
        self.set(form)
        step = guided_step(self.wrapper, self.inputs)
        step()
        return peak_bytes(step, DEVICE)


def measure(model: str, side: int, batch: int, budget: float, compile_: bool, checkout: Path | None) -> dict[str, Any]:
    """Times and memory of every way to take the step, by name, and how near what they compute is."""
    inputs, shape = make_inputs(model, side, batch), {"model": model, "side": side, "batch": batch}
    bare = make_unet(model)  # what it is asked has no hooks
    exact = computed_in_float32(bare, inputs)
    wrappers = {mode: ksag.SAGDenoiser(as_denoiser(make_unet(model), scheduler()), cond_key=None) for mode in (EAGER, GRAPHED)}
    if compile_:
        wrappers |= {mode: compiled_wrapper(copy.deepcopy(bare)) for mode in (COMPILED, BOTH)}
    first_calls = {EAGER: first_call(guided_step(wrappers[EAGER], inputs))}
    for mode in (GRAPHED, BOTH) if compile_ else (GRAPHED,):
        wrappers[mode].use_cuda_graphs()
        first_calls[mode] = first_call(guided_step(wrappers[mode], inputs))
    outputs = {mode: computed(wrapper, inputs) for mode, wrapper in wrappers.items()}

    timers: dict[str, Callable[[], float]] = {}
    in_a_run: dict[str, Callable[[], float]] = {}
    peaks: dict[str, int] = {}
    for mode, wrapper in wrappers.items():
        asked: Any = as_denoiser(bare, scheduler()) if mode in (EAGER, GRAPHED) else wrapper.inner_model
        in_graphs = mode in (GRAPHED, BOTH)
        for form, steps in bare_passes(asked, inputs).items():
            step = (graphed if in_graphs else in_turn)(steps)
            timers[key(form, mode)] = partial(seconds, step, DEVICE, IN_A_ROW if in_graphs else 1)
            step()
            if not in_graphs:  # whose memory was taken as they were captured
                peaks[key(form, mode)] = peak_bytes(step, DEVICE)
        guided = Guided(wrapper, inputs, mode)
        for form in SETTINGS:
            timers[key(form, mode)] = partial(guided.seconds, form)
            if in_graphs:
                wrapper.use_cuda_graphs()  # anew, now that all libraries are loaded
                gc.collect()
                guided.set(form)
                peaks[key(form, mode)] = peak_bytes(guided_step(wrapper, inputs), DEVICE)
            else:
                peaks[key(form, mode)] = guided.peak(form)
        if in_graphs and batch == 1 and side <= 128:
            in_a_run |= {key(form, mode): partial(guided.seconds_in_a_run, form) for form in (CFG, *SETTINGS)}
    if model == "SD 1.5":
        timers[PIPELINE] = sag_pipeline(bare, inputs)
        if checkout is not None:
            steps_there = comfyui.steps(checkout, side, batch, DEVICE, DTYPE)
            timers |= {name: partial(seconds, step, DEVICE) for name, step in steps_there.items()}
    for timer in [*timers.values(), *in_a_run.values()] * 2:  # a wrapper's first step is checked, and therefore eager
        timer()
    return {
        **shape, "peaks": peaks, "first_calls": first_calls, "tokens": exact.masked.numel(),
        "from_float32": {mode: differences(output, exact) for mode, output in outputs.items()},
        "from_eager": {mode: differences(output, outputs[EAGER]) for mode, output in outputs.items()},
        "times": rounds(timers, budget, case(shape)),
        "times_in_a_run": rounds(in_a_run, budget / 2, f"{case(shape)}, in a run") if in_a_run else {},
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
    steps = {CFG: guided_step(guided, inputs, sag_scale=0.0), SAG: guided_step(guided, inputs)}
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
    rows = [["", "one step", "over its floor (quartiles)", "over plain CFG in the same mode", "peak memory"]]
    for result in results:
        times, peaks = result["times"], result["peaks"]
        rows.append([f"**{case(result)}**, {len(times[key(CFG, EAGER)])} rounds", "", "", "", ""])
        for mode in MODES:
            for form in FORMS:
                name, plain = key(form, mode), key(CFG, mode)
                if name in times:
                    middle = f"{statistics.median(times[name]) * 1e3:.1f} ms"
                    over_floor = ratio(times, name, key(FLOORS[form], mode)) if form in FLOORS else ""
                    rows.append([name, middle, over_floor, ratio(times, name, plain), mib(peaks, name)])
        if PIPELINE in times:
            middle = f"{statistics.median(times[PIPELINE]) * 1e3:.1f} ms"
            rows.append([PIPELINE, middle, ratio(times, PIPELINE, key(FLOOR, EAGER)), ratio(times, PIPELINE, key(CFG, EAGER)), ""])
        for name in (comfyui.CFG, comfyui.SAG):
            if name in times:
                rows.append([name, f"{statistics.median(times[name]) * 1e3:.1f} ms", "", ratio(times, name, comfyui.CFG), ""])
    return table(*rows)


def runs_table(results: list[dict[str, Any]]) -> str:
    results = [r for r in results if r.get("times_in_a_run")]
    if not results:
        return ""
    rows = [[f"a step in `sample_euler`, {RUN_STEPS} steps: over plain CFG", *map(case, results)]]
    for mode in MODES:
        for form in SETTINGS:
            ratios = [ratio(r["times_in_a_run"], key(form, mode), key(CFG, mode)) for r in results]
            if any(ratios):
                rows.append([key(form, mode), *ratios])
    return table(*rows)


def pipeline_table(results: list[dict[str, Any]]) -> str:
    results = [r for r in results if PIPELINE in r["times"]]
    rows = [[f"{PIPELINE} over", *map(case, results)]]
    for mode in MODES:
        for form in SETTINGS:
            ratios = [ratio(r["times"], PIPELINE, key(form, mode)) for r in results]
            if any(ratios):
                rows.append([key(form, mode), *ratios])
    return table(*rows)


def first_calls_table(results: list[dict[str, Any]]) -> str:
    head = ["first call", EAGER, GRAPHED]
    return table(head, *([case(r), *(f"{r['first_calls'][mode]:.1f} s" for mode in (EAGER, GRAPHED))] for r in results))


def differences_table(results: list[dict[str, Any]]) -> str:
    """u is one prediction; the images are at cond_scale 7.5, or 1."""
    rows = [["relative difference", "u", "image, cond_scale 1", "image, cond_scale 7.5", "tokens that changed sides"]]
    for result in results:
        rows.append([f"**{case(result)}**", "", "", "", ""])
        for origin, modes in (("from_float32", (EAGER, COMPILED)), ("from_eager", (GRAPHED, COMPILED, BOTH))):
            for mode in modes:
                if mode in result[origin]:
                    d = result[origin][mode]
                    errors = (f"{d[name]:.1e}" if d[name] else "0" for name in ("u", "unscaled", "image"))
                    label = f"{mode} {origin.replace('_', ' ')}"
                    rows.append([label, *errors, f"{d['tokens']} of {result['tokens']}"])
    return table(*rows)


def memory_table(memories: list[dict[str, Any]]) -> str:
    head = ["peak memory, batch 1, eager", "plain CFG", "a step guided by ksag", "ratio"]
    return table(head, *(
        [f"{m['model']}, {m['side']} × {m['side']}", mib(m, CFG), mib(m, SAG), f"{m[SAG] / m[CFG]:.3f}"] for m in memories
    ))  # fmt: skip


def report(run: dict[str, Any]) -> str:
    """gpu.md, from what gpu.json holds."""
    steps, machine = run["steps"], f"{run['gpu']}, torch {run['torch']}, float16, channels last."
    tables = [steps_table(steps), runs_table(steps), pipeline_table(steps), first_calls_table(steps), differences_table(steps)]
    tables.append(memory_table(run["memory"]))
    return "\n\n".join(filter(None, [machine, *tables])) + "\n"


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("."), show_default=True, help="Where gpu.md and gpu.json go.")
@click.option("--model", "models", multiple=True, type=click.Choice(list(UNETS)), default=list(UNETS), show_default=True)
@click.option("--seconds", "budget", default=60.0, show_default=True, help="How long to take rounds of each shape.")
@click.option("--compile/--no-compile", "compile_", default=True, show_default=True)
@click.option("--comfyui", "checkout", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None,
              help="A checkout of ComfyUI, whose node is then timed too.")  # fmt: skip
@torch.no_grad()
def main(out: Path, models: tuple[str, ...], budget: float, compile_: bool, checkout: Path | None) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("This measures a CUDA GPU, and there is none here. benchmarks/overhead.py runs on a CPU.")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.config.cache_size_limit = 64  # one code object serves all shapes, forms and wrappers
    gc.disable()  # as timeit does; each case ends with a collection
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    run: dict[str, Any] = {**machine, "steps": [], "memory": []}
    out.mkdir(parents=True, exist_ok=True)
    if (out / "gpu.json").exists():
        run = json.loads((out / "gpu.json").read_text())
        if any(run[name] != value for name, value in machine.items()):
            raise click.ClickException(f"{out / 'gpu.json'} is of {run['gpu']} and torch {run['torch']}: choose another --out.")
    there = {case(result) for result in run["steps"]}

    def write() -> None:
        """After every case, so that a run that is cut short leaves what it measured."""
        run["steps"].sort(key=lambda result: TIMED.index((result["model"], result["side"], result["batch"])))
        (out / "gpu.md").write_text(report(run))
        (out / "gpu.json").write_text(json.dumps(run, indent=1) + "\n")
        torch._dynamo.reset()  # or the shapes together pass its limit of recompilations
        gc.collect()
        torch.cuda.empty_cache()

    for model in models:
        if model in {result["model"] for result in run["memory"]}:
            continue
        run["memory"] += [memory(model, side) for side in tqdm(SIDES, desc=f"memory, {model}")]
        write()
    for shape in TIMED:
        if shape[0] in models and case(dict(zip(("model", "side", "batch"), shape, strict=True))) not in there:
            run["steps"].append(measure(*shape, budget, compile_ and shape in COMPILED_TOO, checkout))
            write()
    click.echo(f"\n{(out / 'gpu.md').read_text()}")


if __name__ == "__main__":
    main()
