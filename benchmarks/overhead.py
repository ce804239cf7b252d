"""What does a guided step cost beyond the model's own passes?  `python benchmarks/overhead.py [--device cuda]`

On the bundled model, side by side in one run: plain classifier-free guidance (one pass of batch 2B); exact SAG and its floor
(the passes that it cannot avoid: 2B and B); SAG in one pass, PAG, and their floor (3B); both together and their floor (4B); and SAG
at every third call (the mean of three). Ratios are medians over rounds in which each runs once.
"""

import json
import platform
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import click
import torch
from measure import Step, peak_bytes, seconds
from tqdm import trange

import ksag
from ksag import zoo

PLAIN, EXACT, THIRD, ONE, PAG, BOTH = "plain CFG", "SAG", "SAG, every=3", "SAG, one_pass", "PAG", "SAG, one_pass + PAG"
FLOORS = {EXACT: "floor: 2B + B", ONE: "floor: 3B", PAG: "floor: 3B", BOTH: "floor: 4B"}


def import_seconds(module: str) -> float:
    return seconds(lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True), torch.device("cpu"))


def ratio(times: list[float], over: list[float]) -> str:
    low, middle, high = statistics.quantiles((t / o for t, o in zip(times, over, strict=True)), n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--size", default=64, show_default=True, help="Side of the image, in pixels.")
@click.option("--rounds", default=40, show_default=True)
@click.option("--json", "raw", type=click.Path(dir_okay=False), help="Write the seconds of every round to this file.")
@click.option("--imports/--no-imports", default=True, show_default=True, help="Time `import ksag` against `import torch`, too.")
@torch.inference_mode()
def main(device: str, batch_size: int, size: int, rounds: int, raw: str | None, imports: bool) -> None:
    where = torch.device(device)
    torch.manual_seed(0)
    denoiser = zoo.load(device=where)
    x = torch.randn(batch_size, 3, size, size, device=where)
    sigma = torch.ones(batch_size, device=where)
    cond, uncond = zoo.conditioning([zoo.CATEGORIES[i % len(zoo.CATEGORIES)] for i in range(batch_size)], device=where)

    def bare(*conds: torch.Tensor) -> Step:
        n = len(conds)
        return partial(denoiser, torch.cat([x] * n), torch.cat([sigma] * n), mapping_cond=torch.cat(conds))

    def guided(*directions: ksag.Direction) -> Step:
        wrapper = ksag.GuidedDenoiser(denoiser, directions, cond_key="mapping_cond")
        return partial(wrapper, x, sigma, cond=cond, uncond=uncond, cond_scale=2.0)

    sag = partial(ksag.SAG, attention=zoo.SETTINGS["attention"])
    pag = partial(ksag.PAG, attention=["u_net.d_blocks.3.2", "u_net.d_blocks.3.4"])
    one, two = bare(uncond), bare(uncond, cond)
    steps: dict[str, Step] = {
        PLAIN: guided(sag(0.0)), "floor: 2B + B": lambda: (two(), one()), EXACT: guided(sag()), THIRD: guided(sag(every=3)),
        "floor: 3B": bare(uncond, cond, uncond), ONE: guided(sag(one_pass=True)), PAG: guided(pag()),
        "floor: 4B": bare(uncond, cond, uncond, cond), BOTH: guided(sag(one_pass=True), pag()),
    }  # fmt: skip
    for step in steps.values():
        for _ in range(3):
            step()
    peaks = {name: peak_bytes(step, where) for name, step in steps.items() if name != THIRD}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in trange(rounds, desc="rounds"):
        names = list(steps)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(steps[name], where, repeats=3 if name == THIRD else 1))

    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    processor = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu
    click.echo(f"\n{processor}, torch {torch.__version__}, batch {batch_size}, {size} × {size}, float32, {rounds} rounds\n")
    click.echo("| | time | over its floor (quartiles) | over plain CFG | peak memory |\n| --- | --- | --- | --- | --- |")
    for name in steps:
        over_floor = ratio(times[name], times[FLOORS[name]]) if name in FLOORS else ""
        memory = f"{peaks[name] / 2**20:.1f} MiB" if name in peaks else ""
        over_plain = ratio(times[name], times[PLAIN])
        click.echo(f"| {name} | {statistics.median(times[name]) * 1e3:.1f} ms | {over_floor} | {over_plain} | {memory} |")
    if raw is not None:
        made = {"processor": processor, "torch": torch.__version__, "batch_size": batch_size, "size": size}
        rounded = {name: [round(second, 5) for second in of_step] for name, of_step in times.items()}
        Path(raw).write_text(json.dumps({**made, "peak_bytes": peaks, "seconds": rounded}, indent=1) + "\n")
    if imports:
        pairs = [(import_seconds("torch"), import_seconds("ksag")) for _ in trange(7, desc="imports")]
        extra = statistics.median(ksag_ - torch_ for torch_, ksag_ in pairs)
        click.echo(f"\n`import ksag` over `import torch`: {extra:+.2f} s")


if __name__ == "__main__":
    main()
