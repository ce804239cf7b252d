"""Does SAG make better pictures, and at which settings?  `python benchmarks/quality.py report`

Plain sampling against SAG from the same noise, with the bundled model, judged by `ksag.evaluate` against the pictures that the
model was trained on: Fréchet distance, kernel distance, precision, recall, and time. `choose` looks for the best schedule of plain
sampling, and then for SAG's layer, strength, blur, threshold and range of noise levels, on one set of seeds; `report` measures
what was found on others; `quality_table.py` makes tables of both. Every row is appended to quality.jsonl as soon as it is
measured, and a row that is there is not measured again, so that either command goes on where it was stopped. On several GPUs,
each process its share of the rows: `torchrun --standalone --nproc-per-node 4 benchmarks/quality.py report`.

A set of seeds is batches of noise that is drawn on the device, from one generator a batch (the Brownian tree of an SDE sampler has
one seed a batch too), so that plain and SAG start from, and add, the same noise. On a GPU the network runs compiled and under
autocast in float16; all else is float32. Samples are rounded to 8 bits, as a file would hold them. Seconds are of a whole batch on
one GPU, where only the number of evaluations counts, and no kernel's launch.
"""

import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import math
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import k_diffusion as K
import torch
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

import ksag
from ksag import evaluate, zoo
from ksag.evaluate import features
from ksag.samplers import SAMPLERS

CHOICE_SEEDS, REPORT_SEEDS = 1, (2, 3, 4)
STEPS = {
    "euler": 24, "dpmpp_2m": 24, "lms": 24, "dpm_fast": 24, "heun": 16, "dpm_2": 16, "euler_ancestral": 32, "dpmpp_2m_sde": 32,
    "dpmpp_3m_sde": 32, "dpm_2_ancestral": 20, "dpmpp_2s_ancestral": 20, "dpmpp_sde": 20, "dpm_adaptive": 24,
}  # fmt: skip
"""A usual number for each sampler; `dpm_fast` makes so many calls of the model, and `dpm_adaptive` does as it likes."""
TWO_CALLS = {"heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"}
USUAL_SCHEDULE = {"sigma_min": 0.04, "sigma_max": 80.0, "rho": 7.0}
SCHEDULE = {"sigma_min": 0.32, "sigma_max": 160.0, "rho": 7.0}
"""What `choose` starts from, and what it found for the bundled model."""
ALONG_STEPS = (8, 16, 32, 64)
JUDGED = (("euler", 24), ("dpmpp_2m", 24), ("dpmpp_2m", 12), ("dpmpp_2m_sde", 32))
"""What the last choice has to serve: the two usual ones, few steps, and noise added at every step."""
ASSIGNED = ("sag_scale", "blur_sigma", "blur_kernel_size", "mask_threshold", "sigma_range", "one_pass", "every")
"""What a row sets on the wrapper of its layer."""


def frozen(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A dict as a key; lists, as JSON has them, become tuples."""
    return tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in settings.items()))


@dataclasses.dataclass(frozen=True)
class Row:
    """What is sampled. `sag` holds keywords of SAGDenoiser, None is plain; `cond_scale` None is without a category."""

    sampler: str = "euler"
    steps: int = 24
    sag: tuple[tuple[str, Any], ...] | None = None
    cond_scale: float | None = None
    seeds: int = REPORT_SEEDS[0]
    n: int = 5000
    schedule: tuple[tuple[str, float], ...] = frozen(SCHEDULE)
    dtype: str = "float16"

    @classmethod
    def of(cls, result: dict[str, Any]) -> "Row":
        """What a line of quality.jsonl says was sampled."""
        described = result["row"]
        sag = None if described["sag"] is None else frozen(dict(described["sag"]))
        return cls(**{**described, "sag": sag, "schedule": frozen(dict(described["schedule"]))})

    @cached_property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.sag or ())

    @property
    def cost(self) -> float:
        """Evaluations of the network, about."""
        calls = 80 if self.sampler == "dpm_adaptive" else self.steps * (2 if self.sampler in TWO_CALLS else 1)
        own = 1 if self.cond_scale in (None, 1.0) else 2
        every = self.settings.get("every", 1)
        return self.n * calls * (own + (0 if self.sag is None else 1 / every))

    @property
    def plain(self) -> "Row":
        return dataclasses.replace(self, sag=None)


def load_results(path: Path) -> dict[str, dict[str, Any]]:
    """The rows that are there, by their keys; a line that a kill cut off counts as none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            result = json.loads(line)
            found[json.dumps(result["row"], sort_keys=True)] = result
    return found


def append_result(path: Path, result: dict[str, Any]) -> None:
    before = path.read_bytes() if path.exists() else b""
    start = "\n" if before and not before.endswith(b"\n") else ""  # the line before was cut off
    with open(path, "ab", buffering=0) as file:
        file.write(f"{start}{json.dumps(result)}\n".encode())  # in one write: other processes append too


# --- Sampling ---


def compile_blocks(unet: nn.Module) -> None:
    """Compiles the residual blocks, for any number of samples, and leaves the attention alone: so one graph serves all layers."""
    torch._dynamo.config.cache_size_limit = 256  # one code object serves all blocks
    torch._dynamo.config.automatic_dynamic_shapes = False  # or blocks of other sizes than the first get slow kernels for any size
    for module in unet.modules():
        if isinstance(module, K.models.image_v1.ResConvBlock):
            module.forward = for_any_batch(torch.compile(module.forward))


def compile_whole(unet: nn.Module) -> None:
    """Twice as fast as its blocks alone, and slow to compile: once for each layer that is looked at, and each number of samples."""
    unet.forward = torch.compile(unet.forward, dynamic=False)


def for_any_batch(function: Callable) -> Callable:
    def forward(x: Tensor, cond: dict[str, Tensor]) -> Tensor:
        for tensor in (x, *cond.values()):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return function(x, cond)

    return forward


def sigmas(row: Row, device: torch.device) -> Tensor:
    schedule = dict(row.schedule)
    return K.sampling.get_sigmas_karras(row.steps, schedule["sigma_min"], schedule["sigma_max"], schedule["rho"], device=device)


def sample(
    row: Row, model: nn.Module, n: int, seed: int, extra_args: dict[str, Any], device: torch.device, tick: Callable
) -> Tensor:
    """n samples (n, 3, 64, 64) of one seed, their noise drawn on the device."""
    levels, generator = sigmas(row, device), torch.Generator(device).manual_seed(seed)
    function = getattr(K.sampling, f"sample_{row.sampler}")
    parameters = inspect.signature(function).parameters

    def noise(*_: Any) -> Tensor:
        return torch.randn(n, 3, 64, 64, generator=generator, device=device)

    x = noise() * levels[0]
    options: dict[str, Any] = {"extra_args": extra_args, "callback": tick, "disable": True}
    if row.sampler.endswith("sde"):
        low, high = float(levels[-2]) * 0.99, float(levels[0]) * 1.01  # a little wider: sigmas come back from logarithms rounded
        options["noise_sampler"] = K.sampling.BrownianTreeNoiseSampler(x, low, high, seed=seed)
    elif "noise_sampler" in parameters:
        options["noise_sampler"] = noise
    if "sigmas" in parameters:
        return function(model, x, levels, **options)
    if "n" in parameters:
        options["n"] = row.steps - 1
    x = function(model, x, float(levels[-2]), float(levels[0]), **options)
    return model(x, levels[-2].expand(n), **extra_args)  # the other samplers' last step, to 0


def conditioning(row: Row, batch: int, n: int, shares: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Categories drawn as often as the data set has them; the guidance starts from no category where cond_scale is not 1."""
    none = torch.zeros(n, len(zoo.CATEGORIES) + len(zoo.STYLES), device=device)
    if row.cond_scale is None:
        return {"cond": none}
    generator = torch.Generator().manual_seed(1_000_000 * row.seeds + batch)
    drawn = torch.multinomial(torch.tensor(shares, dtype=torch.float64), n, replacement=True, generator=generator)
    cond, uncond = zoo.conditioning([zoo.CATEGORIES[i] for i in drawn], device=device)
    return {"cond": cond} if row.cond_scale == 1 else {"cond": cond, "uncond": uncond, "cond_scale": row.cond_scale}


class OutOfTime(Exception):
    pass


@dataclasses.dataclass
class Bench:
    """A process's model, what judges, and where the rows go."""

    out: Path
    device: torch.device
    weights: Path
    judges: list[tuple[features.Extractor, evaluate.Statistics]]
    shares: list[int]
    batch: int
    ends: float
    rank: int
    ranks: int
    compiled: Callable[[nn.Module], None] | None
    halves: bool = False

    def __post_init__(self) -> None:
        self.wrappers: dict[str, tuple[ksag.SAGDenoiser, nn.Module]] = {}

    def guided(self, row: Row) -> tuple[ksag.SAGDenoiser, nn.Module]:
        """A model wrapped at the row's layer, and compiled after that, with the row's settings; and its UNet."""
        settings = row.settings or {"sag_scale": 0.0}
        layer = settings.get("attention", zoo.SETTINGS["attention"])
        if layer not in self.wrappers:
            denoiser = zoo.load(self.weights, self.device)
            guided = ksag.SAGDenoiser(denoiser, attention=layer, cond_key="mapping_cond")
            if self.compiled is not None:
                self.compiled(denoiser.inner_model)
            self.in_half(denoiser.inner_model)
            self.wrappers[layer] = guided, denoiser.inner_model
        guided, unet = self.wrappers[layer]
        for name in ASSIGNED:
            setattr(guided, name, settings.get(name, inspect.signature(ksag.SAGDenoiser).parameters[name].default))
        return guided, unet

    def in_half(self, unet: nn.Module) -> None:
        forward = unet.forward

        def autocast(*args: Any, **kwargs: Any) -> Tensor:
            with torch.autocast(self.device.type, torch.float16, enabled=self.halves):
                return forward(*args, **kwargs)

        unet.forward = autocast

    def log(self, text: str) -> None:
        tqdm.write(f"[{self.rank}] {self.ends - time.time():.0f} s left: {text}")

    def results(self) -> dict[str, dict[str, Any]]:
        return load_results(self.out / "quality.jsonl")

    def tick(self, _: Any = None) -> None:
        if time.time() > self.ends:
            raise OutOfTime

    def measure(self, row: Row) -> dict[str, Any]:
        evaluations = 0

        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal evaluations
            evaluations += len(args[0])

        guided, unet = self.guided(row)
        self.halves = self.device.type == "cuda" and row.dtype == "float16"
        samples, seconds = [], []
        counter = unet.register_forward_pre_hook(count)
        with contextlib.ExitStack() as stack:
            stack.callback(counter.remove)
            stack.enter_context(torch.no_grad())
            for batch, start in enumerate(range(0, row.n, self.batch)):
                n = min(self.batch, row.n - start)
                extra_args = conditioning(row, batch, n, self.shares, self.device)
                guided.reset()
                self.synchronise()
                began = time.perf_counter()
                x = sample(row, guided, n, 1_000_000 * row.seeds + batch, extra_args, self.device, self.tick)
                self.synchronise()
                seconds.append(round(time.perf_counter() - began, 4))
                samples.append(x.float())
        x = torch.cat(samples)
        bad = int((~x.flatten(1).isfinite().all(dim=1)).sum())
        pictures = features.to_bytes(x.nan_to_num(0, 1, -1))
        measures = {}
        for extractor, reference in self.judges:
            found = evaluate.statistics(torch.cat([extractor(part) for part in pictures.split(500)]), extractor.name)
            measures[extractor.name] = {k: round(v, 6) for k, v in evaluate.measure(found, reference)._asdict().items()}
        self.preview(row, pictures)
        return {
            "row": json.loads(row.key), "measures": measures, "seconds": seconds, "batch": min(self.batch, row.n),
            "evaluations": round(evaluations / row.n, 2), "not_finite": bad,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU", "torch": torch.__version__,
        }  # fmt: skip

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def preview(self, row: Row, pictures: Tensor) -> None:
        folder = self.out / "previews"
        folder.mkdir(exist_ok=True)
        settings = "-".join(f"{name}={value}" for name, value in row.settings.items()) or "plain"
        name = f"{row.sampler}-{row.steps}-{row.cond_scale}-{row.seeds}-{settings}".replace("/", "_")[:180]
        save_image(pictures[:32].float() / 255, folder / f"{name}.webp", nrow=8)

    def run(self, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
        """The results of these rows, each measured by one of the processes, the first first; all wait for each other's."""
        unique = list({row.key: row for row in rows}.values())
        there = self.results()
        for row in shared_out(unique, self.ranks)[self.rank]:
            if row.key in there:
                continue
            self.tick()
            began = time.time()
            result = self.measure(row)
            append_result(self.out / "quality.jsonl", result)
            took = time.time() - began
            fds = ", ".join(f"{m['fd']:.4f}" for m in result["measures"].values())
            self.log(f"{describe(row)}: FD {fds}, {took:.1f} s, {row.cost / took:.0f} evaluations a second")
        while missing := {row.key for row in unique} - (there := self.results()).keys():
            self.tick()
            time.sleep(0.5)
            del missing
        return {row.key: there[row.key] for row in unique}

    def fd(self, result: dict[str, Any]) -> float:
        """By the first judge, which is the bundled one: it chooses. The others only report."""
        return result["measures"][self.judges[0][0].name]["fd"]


def shared_out(rows: Sequence[Row], ranks: int) -> list[list[Row]]:
    """Each process's rows, in their order: a row goes to the process that has least to do so far.

    >>> [len(part) for part in shared_out([Row(n=n) for n in (8, 1, 2, 3, 1)], 2)]
    [1, 4]
    """
    parts: list[list[Row]] = [[] for _ in range(ranks)]
    for row in rows:
        min(parts, key=lambda part: sum(other.cost for other in part)).append(row)
    return parts


def describe(row: Row) -> str:
    condition = "unconditional" if row.cond_scale is None else f"by category, cond_scale {row.cond_scale:g}"
    settings = ", ".join(f"{name}={value}" for name, value in row.settings.items()) or "plain"
    return f"{row.sampler}, {row.steps} steps, {condition}, seeds {row.seeds}, {row.n} samples, {settings}"


# --- The choice ---


def best(bench: Bench, results: dict[str, dict[str, Any]], groups: dict[Any, list[Row]]) -> list[tuple[float, Any]]:
    """The groups, sorted by the mean over their rows of the Fréchet distance over plain's."""
    plain = bench.results()
    scores = []
    for name, rows in groups.items():
        ratios = [bench.fd(results[row.key]) / bench.fd(plain[row.plain.key]) for row in rows]
        scores.append((statistics.geometric_mean(ratios), name))
    return sorted(scores, key=lambda score: score[0])


def gain_kept(plain: float, exact: float, form: float) -> float:
    """The share of exact SAG's gain over plain sampling that a cheaper form of it has, by their distances."""
    return (plain - form) / (plain - exact)


def choose(bench: Bench, n: int) -> None:
    base: dict[str, Any] = {"n": n, "seeds": CHOICE_SEEDS}

    # Plain sampling at its best: one parameter of the schedule after the other
    schedule = dict(USUAL_SCHEDULE)
    for name, values in (
        ("sigma_max", (40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)),
        ("sigma_min", (0.002, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)),
        ("rho", (4.0, 5.5, 7.0, 9.0)),
    ):
        options = {
            value: [Row(sampler, steps, schedule=frozen({**schedule, name: value}), **base) for sampler, steps in JUDGED[:2]]
            for value in values
        }
        results = bench.run([row for rows in options.values() for row in rows])
        scores = {v: statistics.geometric_mean([bench.fd(results[row.key]) for row in rows]) for v, rows in options.items()}
        usual = schedule[name]
        schedule[name] = min(scores, key=lambda value: scores[value])
        if scores[schedule[name]] > 0.98 * scores[usual]:
            schedule[name] = usual  # no gain beyond the noise
        bench.log(f"{name}: {scores}, taken {schedule[name]}")
    base["schedule"] = frozen(schedule)
    save_choice(bench, schedule=schedule)

    def scored(groups: dict[Any, list[Row]], said: str) -> list[tuple[float, Any]]:
        results = bench.run([row for rows in groups.values() for row in rows])
        scores = best(bench, results, groups)
        bench.log(f"{said}, best first: " + "; ".join(f"{score:.3f} {name}" for score, name in scores[:12]))
        return scores

    def rank(groups: dict[Any, list[Row]], said: str) -> list[Any]:
        return [name for _, name in scored(groups, said)]

    def weakest(groups: dict[float, list[Row]], said: str) -> float:
        """The least scale that is as good as the best, within the noise: stronger SAG harms elsewhere first, such as beside CFG."""
        scores = scored(groups, said)
        return min(scale for score, scale in scores if score <= 1.02 * scores[0][0])

    def rows_of(settings: dict[str, Any], judged: Sequence[tuple[str, int]] = JUDGED[:2]) -> list[Row]:
        return [Row(sampler, steps, frozen(settings), **base) for sampler, steps in judged]

    # Which layer
    bench.run([Row(sampler, steps, **base) for sampler, steps in JUDGED])
    layers = [layer.path for layer in ksag.list_attention(zoo.load(bench.weights))]
    grid = {(layer, scale): rows_of({"attention": layer, "sag_scale": scale, "blur_sigma": 2.0})
            for scale in (1.0, 2.0) for layer in layers}  # fmt: skip
    nearest = list(dict.fromkeys(layer for layer, _ in rank(grid, "layers")))[:3]

    # How strong, and how blurred
    strengths, blurs = (1.0, 2.0, 3.0), (1.0, 1.5, 2.0, 3.0)
    fine = {(layer, scale, blur): rows_of({"attention": layer, "sag_scale": scale, "blur_sigma": blur})
            for scale, blur, layer in itertools.product(strengths, blurs, nearest)}  # fmt: skip
    leading = [dict(zip(("attention", "sag_scale", "blur_sigma"), found, strict=True)) for found in rank(fine, "strength and blur")]
    settings = leading[0]
    save_choice(bench, settings=settings)

    # Where it looks, how far the blur spans, and at which noise levels
    wider = {str(s): s for s in (
        settings,
        *({**settings, "mask_threshold": threshold} for threshold in (0.0, 0.7, 0.85, 1.15, 1.3, 1.6)),
        *({**settings, "blur_kernel_size": 17, "blur_sigma": blur} for blur in (3.0, 4.5)),
        *({**settings, "sigma_range": span} for span in itertools.product((0.0, 0.1, 0.3, 0.8), (1.5, 4.0, 12.0, math.inf))
          if span != (0.0, math.inf)),
        *leading[1:4],
    )}  # fmt: skip
    found = [wider[name] for name in rank({name: rows_of(s) for name, s in wider.items()}, "threshold, kernel and sigma_range")]
    settings = found[0]
    save_choice(bench, settings=settings)

    # Strength again, for all that it has to serve, and without the last step: its direction would stay in the picture as it is, and
    # frays edges, which no distance here tells
    high = next((s["sigma_range"][1] for s in found if "sigma_range" in s), math.inf)
    low = round(1.25 * schedule["sigma_min"], 3)
    scales = [round(settings["sag_scale"] * factor, 3) for factor in (0.5, 0.7, 1.0, 1.4)]
    last = {scale: {**settings, "sag_scale": scale, "sigma_range": (low, high)} for scale in scales}
    settings = last[weakest({scale: rows_of(s, JUDGED) for scale, s in last.items()}, "without the last step")]
    save_choice(bench, settings=settings)

    # In one pass, whose direction is one call late: the least strength that keeps exact SAG's gain in each of these
    judged = (*JUDGED, ("euler_ancestral", STEPS["euler_ancestral"]))
    exact = rows_of(settings, judged)
    late = {
        scale: rows_of({**settings, "one_pass": True, "sag_scale": scale}, judged)
        for scale in (round(settings["sag_scale"] * factor, 3) for factor in (1.0, 1.4, 2.0))
    }
    results = bench.run([*exact, *(row.plain for row in exact), *itertools.chain(*late.values())])

    def kept(row: Row, exact_row: Row) -> float:
        return gain_kept(*(bench.fd(results[r.key]) for r in (exact_row.plain, exact_row, row)))

    least = {scale: min(map(kept, rows, exact)) for scale, rows in late.items()}
    bench.log(f"in one pass, what is kept at least: {least}")
    save_choice(bench, **{"sag_scale in one pass": min((s for s, share in least.items() if share >= 0.9), default=max(late))})

    # Beside classifier-free guidance: how strong then
    for cond_scale in (1.5, 3.0):
        beside = {
            scale: [dataclasses.replace(row, cond_scale=cond_scale) for row in rows_of({**settings, "sag_scale": scale})]
            for scale in (round(settings["sag_scale"] * factor, 3) for factor in (0.25, 0.5, 1.0))
        }
        bench.run([row.plain for row in next(iter(beside.values()))])
        taken = weakest(beside, f"by category, cond_scale {cond_scale}")
        save_choice(bench, **{f"sag_scale beside cond_scale {cond_scale}": taken})


def save_choice(bench: Bench, **found: Any) -> None:
    if bench.rank == 0:
        path = bench.out / "quality_choice.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | found, indent=1) + "\n")


# --- The report ---


def report_rows(choice: dict[str, Any]) -> list[Row]:
    """All rows of the tables, the important ones first."""
    settings, schedule = choice["settings"], frozen(choice["schedule"])
    first, *others = REPORT_SEEDS
    main = ("euler", "dpmpp_2m")

    def pair(sampler: str, steps: int, seeds: int = first, **row: Any) -> list[Row]:
        plain = Row(sampler, steps, seeds=seeds, schedule=schedule, **row)
        return [plain, dataclasses.replace(plain, sag=frozen(settings))]

    def cheaper(sampler: str, steps: int, **row: Any) -> list[Row]:
        late: list[dict[str, Any]] = [{"one_pass": True}, *({"one_pass": True, "every": n} for n in (2, 3))]
        stronger = choice.get("sag_scale in one pass", settings["sag_scale"])
        forms = [*late, *({**form, "sag_scale": stronger} for form in late), *({"every": n} for n in (2, 3, 4))]
        exact = pair(sampler, steps, **row)[1]
        return [dataclasses.replace(exact, sag=frozen({**settings, **form})) for form in forms]

    usual = [row for sampler in main for row in pair(sampler, STEPS[sampler])]
    scales = (1.0, 1.5, 3.0)
    by_category = [row for scale in scales for sampler in main for row in pair(sampler, STEPS[sampler], cond_scale=scale)]
    for scale in scales:
        weaker = choice.get(f"sag_scale beside cond_scale {scale}", settings["sag_scale"])
        if weaker != settings["sag_scale"]:
            sag = frozen({**settings, "sag_scale": weaker})
            by_category += [Row(s, STEPS[s], sag, scale, first, schedule=schedule) for s in main]
    samplers = [row for sampler in SAMPLERS for row in pair(sampler, STEPS[sampler])]
    along = [row for steps in ALONG_STEPS for sampler in main for row in pair(sampler, steps)]
    forms = [row for sampler in ("dpmpp_2m", "euler") for row in cheaper(sampler, STEPS[sampler])]
    few, many = ([*pair("dpmpp_2m", steps), *cheaper("dpmpp_2m", steps)] for steps in (12, 48))
    others_forms = [row for sampler in ("euler_ancestral", "dpmpp_2m_sde", "heun")
                    for row in (*pair(sampler, STEPS[sampler]), *cheaper(sampler, STEPS[sampler]))]  # fmt: skip
    further = [*many, *cheaper("dpmpp_2m", STEPS["dpmpp_2m"], cond_scale=1.0)]
    spread_usual = [dataclasses.replace(row, seeds=seeds) for seeds in others for row in usual]
    spread = [dataclasses.replace(row, seeds=seeds) for seeds in others for row in (*usual, *by_category)]
    spread_along = [dataclasses.replace(row, seeds=seeds) for seeds in others for row in along]
    exact = [dataclasses.replace(row, dtype="float32") for row in usual[:2]]
    rows = [*usual, *spread_usual, *forms, *by_category, *few, *others_forms, *samplers, *along, *further,
            *spread, *spread_along, *exact]  # fmt: skip
    return list({row.key: row for row in rows}.values())


# --- The command ---


def join_processes() -> tuple[int, int]:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return rank, ranks


def load_judges(
    folders: Sequence[Path], device: torch.device
) -> tuple[list[tuple[features.Extractor, evaluate.Statistics]], list[int]]:
    judges = []
    for folder in folders:
        extractor = features.load_classifier(folder / "classifier.safetensors", device)
        judges.append((extractor, evaluate.load_statistics(folder / "statistics.safetensors").to(device)))
    _, metadata = features.read(folders[0] / "classifier.safetensors")
    return judges, metadata["training"]["categories"]


def pack_previews(out: Path) -> None:
    with tarfile.open(out / "previews.tar", "w") as tar:
        for path in sorted((out / "previews").glob("*.webp")):
            data = path.read_bytes()
            entry = tarfile.TarInfo(path.name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@contextlib.contextmanager
def in_time(bench: Bench) -> Iterator[None]:
    try:
        yield
        bench.log("done")
    except OutOfTime:
        bench.log("out of time: the same command goes on")


@click.command(help=__doc__)
@click.argument("stage", type=click.Choice(["choose", "report", "estimate"]))
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/quality"), show_default=True,
              help="The folder of quality.jsonl, quality_choice.json and previews of the samples.")  # fmt: skip
@click.option(
    "--weights", type=click.Path(exists=True, path_type=Path), default=zoo.EMOJI, help="The denoiser; by default the bundled one."
)
@click.option("--judge", "folders", multiple=True, type=click.Path(exists=True, path_type=Path),
              default=[features.CLASSIFIER.parent],
              help="A folder of train_classifier.py; by default the bundled one. The first chooses, all report.")  # fmt: skip
@click.option("--n", type=int, default=None, help="Samples a row; by default 2000 to choose, 5000 to report.")
@click.option("--batch", default=1000, show_default=True)
@click.option("--seconds", type=float, default=math.inf, help="Stop after so many seconds.")
@click.option("--limit", type=int, default=None, help="Only so many rows of the report, the first ones.")
@click.option("--compile", "compiled", type=click.Choice(["no", "blocks", "whole"]),
              show_default="blocks to choose, whole to report", help="On a GPU, what of the model to compile.")  # fmt: skip
def main(stage, out, weights, folders, n, batch, seconds, limit, compiled):
    ends = time.time() + seconds
    rank, ranks = join_processes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    out.mkdir(parents=True, exist_ok=True)
    choice = {"settings": zoo.SETTINGS, "schedule": SCHEDULE}
    if (out / "quality_choice.json").exists():
        choice |= json.loads((out / "quality_choice.json").read_text())
    rows = report_rows(choice)[:limit]
    if n is not None:
        rows = [dataclasses.replace(row, n=n) for row in rows]
    if stage == "estimate":
        total = sum(row.cost for row in rows)
        click.echo(f"{len(rows)} rows, {total / 1e6:.1f} million evaluations: {total / 25e3:.0f} s at 25,000 a second")
        return
    judges, shares = load_judges(folders, device)
    compiled = compiled or ("blocks" if stage == "choose" else "whole")
    how = None if device.type == "cpu" else {"no": None, "blocks": compile_blocks, "whole": compile_whole}[compiled]
    bench = Bench(out, device, weights, judges, shares, batch, ends, rank, ranks, how)
    with in_time(bench):
        if stage == "choose":
            choose(bench, n or 2000)
        else:
            bench.run(rows)
    if rank == 0:
        pack_previews(out)


if __name__ == "__main__":
    main()
