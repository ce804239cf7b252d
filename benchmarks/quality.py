"""What is each kind of guidance worth?  `python benchmarks/quality.py choose`, then `report`, and perhaps `grid`

Samples models of emoji, plain and guided, from the same noise: the bundled UNet ("emoji"), and one or two trainings of a
transformer by flow matching (`scripts/train_emoji_flow.py`, "emoji-flow" and "emoji-flow-2"). `ksag.evaluate` compares the samples
with the pictures that they were trained on. `choose` tries settings on one set of seeds; `report` measures the chosen ones on three
others, the most important rows first; `grid` adds every method with every sampler. `quality_plan.py` lists the rows. Every row is
appended to quality.jsonl as soon as it is measured and is not measured again, so that each command continues where it was stopped.
On four GPUs, replace `python` with `torchrun --standalone --nproc-per-node 4`.

A set of seeds fixes the noise of every batch: it is drawn on the device by one generator per batch (the Brownian tree of an SDE
sampler has one seed per batch too), so that all rows of a set start from, and add, the same noise. On a GPU, the network runs under
autocast in float16, the parts of it that hold no layer with hooks are compiled, and it gets 500 samples at a time, so that the
compiled code serves every row. All else is float32. Samples are rounded to 8 bits. Evaluations are counted: one for each sample
that goes through the network.
"""

import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import k_diffusion as K
import torch
from quality_rows import SPEED, Result, Row, append_result, describe, load_results, shared_out, sigmas, to_sample
from skip_block import SkipBlock
from torch import Tensor, nn

import ksag
from ksag import evaluate, zoo
from ksag.evaluate import features

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
COMPILED = ("DBlock", "UBlock", "ResConvBlock", "Downsample2d", "Upsample2d", "SelfAttention2d", "JointTransformerBlock",
            "AdaLayerNormContinuous", "AdaLayerNormZero", "FeedForward", "RMSNorm")  # fmt: skip
"""Classes of modules that may be compiled."""
KINDS = {"SAG": ksag.SAG, "PAG": ksag.PAG, "SEG": ksag.SEG, "SkipBlock": SkipBlock}

# Sampling


def sample(
    row: Row, model: Callable[..., Tensor], n: int, seed: int, extra_args: dict[str, Any], device: torch.device, tick: Callable
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
    """Categories drawn as often as the data set has them; guided from no category unless cond_scale is 1."""
    if row.cond_scale is None:
        return {"cond": torch.zeros(n, len(zoo.CATEGORIES) + len(zoo.STYLES), device=device)}
    generator = torch.Generator().manual_seed(1_000_000 * row.seeds + batch)
    drawn = torch.multinomial(torch.tensor(shares, dtype=torch.float64), n, replacement=True, generator=generator)
    cond, uncond = zoo.conditioning([zoo.CATEGORIES[i] for i in drawn], device=device)
    return {"cond": cond} if row.cond_scale == 1 else {"cond": cond, "uncond": uncond, "cond_scale": row.cond_scale}


# Models


class Model:
    """A denoiser whose network gets at most `piece` samples at a time, under autocast on a GPU, and counts them."""

    def __init__(self, name: str, flows: Path, device: torch.device, piece: int = 500):
        if name == "emoji":
            self.denoiser, self.cond_key = zoo.load(device=device), "mapping_cond"
        else:
            import emoji_flow

            trained = emoji_flow.load(flows / name.replace("-", "_"), device)
            self.denoiser, self.cond_key = ksag.FlowDenoiser(trained).eval(), "cond"
        self.network, self.device, self.piece, self.evaluations = self.denoiser.inner_model, device, piece, 0
        self.forward, self.network.forward = self.network.forward, self.in_pieces

    def in_pieces(self, x: Tensor, sigma: Tensor, **kwargs: Tensor) -> Tensor:
        self.evaluations += len(x)
        x = x.contiguous(memory_format=torch.channels_last)  # as the weights are
        parts = zip(*(t.split(self.piece) for t in (x, sigma, *kwargs.values())), strict=True)
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            return torch.cat([self.forward(x, sigma, **dict(zip(kwargs, part, strict=True))) for x, sigma, *part in parts])

    @contextlib.contextmanager
    def compiled_but_for(self, layers: Sequence[str]) -> Iterator[None]:
        """Compiles the largest modules that hold none of these layers, since the layers' hooks change from row to row."""
        modules = dict(self.network.named_modules())
        hooked = [f"{path}." for path in modules if any(f".{path}".endswith(f".{layer}") for layer in layers)]
        if len(hooked) != len(set(layers)):
            raise ValueError(f"Expected one module for each of {layers}, got {hooked}.")
        compiled: dict[str, nn.Module] = {}
        for path, module in modules.items():  # from the outside in
            own = f"{path}."
            is_compiled = any(own.startswith(block) for block in compiled)
            holds_hooks = any(layer.startswith(own) for layer in hooked)
            if type(module).__name__ in COMPILED and not is_compiled and not holds_hooks:
                module.forward = torch.compile(module.forward, dynamic=False)
                compiled[own] = module
        try:
            yield
        finally:
            for module in compiled.values():
                del module.forward


def layers_of(row: Row) -> list[str]:
    """The attention layers and blocks that a row's directions read or change."""
    found = [dict(settings).get("blocks") or dict(settings).get("attention", "middle") for _, settings in row.directions]
    return [layer for each in found for layer in ([each] if isinstance(each, str) else each)]


class OutOfTime(Exception):
    pass


@dataclasses.dataclass
class Bench:
    """A process's models and judges, and where the rows go."""

    out: Path
    device: torch.device
    judges: list[tuple[features.Extractor, evaluate.Statistics]]
    shares: list[int]
    flows: Path = Path("runs")
    batch: int = 1000
    ends: float = math.inf
    rank: int = 0
    ranks: int = 1
    compiled: bool = False

    def __post_init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.checked: set[tuple[str, ...]] = set()

    def log(self, text: str) -> None:
        click.echo(f"[{self.rank}] {self.ends - time.time():.0f} s left: {text}", err=True)

    def results(self) -> dict[str, Result]:
        return load_results(self.out / "quality.jsonl")

    def tick(self, _: Any = None) -> None:
        if time.time() > self.ends:
            raise OutOfTime

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def sample(self, row: Row) -> tuple[Tensor, list[float], float]:
        """The samples (n, 3, 64, 64), the seconds of each batch, and the evaluations of the network for each sample."""
        if row.model not in self.models:
            self.models[row.model] = Model(row.model, self.flows, self.device)
        model = self.models[row.model]
        directions = [KINDS[name](**dict(settings)) for name, settings in row.directions]
        samples, seconds, before = [], [], model.evaluations
        form = (row.model, *(name for name, _ in row.directions), *layers_of(row))
        options: dict[str, Any] = {
            "cond_key": model.cond_key,
            "check_attention": form not in self.checked,
        }  # once, because checks take time
        self.checked.add(form)
        with (
            ksag.GuidedDenoiser(model.denoiser, directions, **options) as guided,
            model.compiled_but_for(layers_of(row)) if self.compiled else contextlib.nullcontext(),
        ):
            for batch, start in enumerate(range(0, row.n, self.batch)):
                n = min(self.batch, row.n - start)
                extra_args = conditioning(row, batch, n, self.shares, self.device)
                guided.reset()
                self.synchronise()
                began = time.perf_counter()
                samples.append(sample(row, guided, n, 1_000_000 * row.seeds + batch, extra_args, self.device, self.tick).float())
                self.synchronise()
                seconds.append(round(time.perf_counter() - began, 4))
        return torch.cat(samples), seconds, (model.evaluations - before) / row.n

    def measure(self, row: Row, sizes: Sequence[int]) -> list[Result]:
        """The results of a row's first samples, for each of these numbers of them."""
        x, seconds, evaluations = self.sample(row)
        rows = [dataclasses.replace(row, n=n) for n in sizes]
        return [self.judge(row, x[: row.n], seconds[: math.ceil(row.n / self.batch)], evaluations) for row in rows]

    def judge(self, row: Row, x: Tensor, seconds: list[float], evaluations: float) -> Result:
        bad = int((~x.flatten(1).isfinite().all(dim=1)).sum())
        pictures = features.to_bytes(x.nan_to_num(0, 1, -1))
        measures = {}
        for extractor, reference in self.judges:
            found = evaluate.statistics(torch.cat([extractor(part) for part in pictures.split(500)]), extractor.name)
            measures[extractor.name] = {k: round(v, 6) for k, v in evaluate.measure(found, reference)._asdict().items()}
        return {
            "row": json.loads(row.key), "measures": measures, "seconds": seconds, "batch": min(self.batch, row.n),
            "evaluations": round(evaluations, 2), "not_finite": bad,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU", "gpus": self.ranks,
            "torch": torch.__version__,
        }  # fmt: skip

    def run(self, rows: Sequence[Row]) -> dict[Row, Result]:
        """The results of these rows, each measured by one of the processes, the first first; all wait for each other's."""
        unique = list(dict.fromkeys(rows))
        sizes = to_sample(unique)
        there = self.results()
        for row in shared_out(list(sizes), self.ranks)[self.rank]:  # the same in every process, whatever is there when it looks
            if all(dataclasses.replace(row, n=n).key in there for n in sizes[row]):
                continue
            self.tick()
            began = time.time()
            for result in self.measure(row, sizes[row]):
                append_result(self.out / "quality.jsonl", result)
                fds = ", ".join(f"{m['fd']:.3f}" for m in result["measures"].values())
                speed = Row.of(result).n * result["evaluations"] / sum(result["seconds"])
                self.log(f"{describe(Row.of(result))}: FD {fds}; {time.time() - began:.1f} s, {speed:.0f} evaluations a second")
        while not {row.key for row in unique} <= (there := self.results()).keys():
            self.tick()
            time.sleep(0.2)
        return {row: there[row.key] for row in unique}

    def fd(self, result: Result) -> float:
        """By the first judge, which chooses. The others only report."""
        return result["measures"][self.judges[0][0].name]["fd"]


def load_judges(
    folders: Sequence[Path], device: torch.device
) -> tuple[list[tuple[features.Extractor, evaluate.Statistics]], list[int]]:
    """What judges, and how many pictures of each category there are to train on."""
    judges = []
    for folder in folders:
        extractor = features.load_classifier(folder / "classifier.safetensors", device)
        judges.append((extractor, evaluate.load_statistics(folder / "statistics.safetensors").to(device)))
    _, metadata = zoo.files.read(folders[0] / "classifier.safetensors")
    return judges, metadata["training"]["categories"]


@click.command(help=__doc__)
@click.argument("stages", nargs=-1, required=True, type=click.Choice(["choose", "report", "grid", "estimate"]))
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/quality"), show_default=True,
              help="The folder of quality.jsonl and quality_choice.json.")  # fmt: skip
@click.option(
    "--model", "models", multiple=True, type=click.Choice(list(SPEED)), default=["emoji", "emoji-flow"], show_default=True
)
@click.option("--flows", type=click.Path(path_type=Path), default=Path("runs"), show_default=True,
              help="What holds emoji_flow and emoji_flow_2, folders of train_emoji_flow.py.")  # fmt: skip
@click.option("--judge", "folders", multiple=True, type=click.Path(exists=True, path_type=Path),
              default=[features.CLASSIFIER.parent],
              help="A folder of train_classifier.py; by default the bundled one. The first chooses, all report.")  # fmt: skip
@click.option("--n", type=int, help="Samples a row; by default 1000 to choose, and 2000 to 5000 to report.")
@click.option("--tries", type=int, help="Settings to try for each method; by default 4 for the UNet, 12 for a transformer.")
@click.option("--seconds", type=float, default=math.inf, help="Stop after so many seconds.")
@click.option("--choose-seconds", type=float, default=math.inf, help="Report the best found after so many seconds.")
@click.option("--limit", type=int, help="Only the first rows.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="On a GPU.")
def main(stages, out, models, flows, folders, n, tries, seconds, choose_seconds, limit, compiled):
    import quality_plan as plan

    ends = time.time() + seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.cache_size_limit = 256  # one code object serves all blocks
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
    out.mkdir(parents=True, exist_ok=True)
    judges, shares = load_judges(folders, device)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    bench = Bench(out, device, judges, shares, flows, 1000, ends, rank, ranks, compiled and device.type == "cuda")
    for stage in stages:
        bench.ends = min(ends, time.time() + choose_seconds) if stage == "choose" else ends
        choice = {name: of_model for name, of_model in plan.load_choice(out).items() if name in models}
        rows = {name: [dataclasses.replace(row, n=n or row.n) for row in of(choice)[:limit]] for name, of in plan.ROWS.items()}
        if stage == "estimate":
            for name, model in itertools.product(rows, choice):
                of_model = to_sample(row for row in rows[name] if row.model == model)
                click.echo(f"{name}, {model}: {len(of_model)} rows, {sum(row.cost for row in of_model):.0f} s on one H200")
            continue
        try:
            if stage == "choose":
                plan.choose(bench, models, n or 1000, tries)
            else:
                bench.run(rows[stage])
            bench.log(f"{stage}: done")
        except OutOfTime:
            bench.log(f"{stage}: out of time, the same command continues")
            time.sleep(2 if ranks > 1 else 0)  # until all have stopped


if __name__ == "__main__":
    main()
