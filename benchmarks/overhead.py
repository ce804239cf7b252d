"""What does a guided step cost beyond the model's own passes?  `python benchmarks/overhead.py [--device cuda]`

On the bundled model, side by side in one run: the floor (the passes that SAG cannot avoid, one of batch 2B and one of B),
plain classifier-free guidance (one of 2B), and the guided step. Ratios are medians over rounds in which each runs once.
"""

import platform
import statistics
import subprocess
import sys
from functools import partial

import click
import torch
from measure import Step, peak_bytes, seconds
from tqdm import trange

import ksag
from ksag import zoo


def import_seconds(module: str) -> float:
    return seconds(lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True), torch.device("cpu"))


def row(name: str, times: list[float], floor: list[float], peak: int, cfg_peak: int) -> str:
    ratios = sorted(t / f for t, f in zip(times, floor, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    return (
        f"| {name} | {statistics.median(times) * 1e3:.1f} ms | {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) "
        f"| {peak / 2**20:.1f} MiB | {peak / cfg_peak:.3f} |"
    )


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--size", default=32, show_default=True, help="Side of the image, in pixels.")
@click.option("--rounds", default=40, show_default=True)
@click.option("--imports/--no-imports", default=True, show_default=True, help="Time `import ksag` against `import torch`, too.")
@torch.inference_mode()
def main(device: str, batch_size: int, size: int, rounds: int, imports: bool) -> None:
    where = torch.device(device)
    torch.manual_seed(0)
    denoiser = zoo.load(device=where)
    x = torch.randn(batch_size, 3, size, size, device=where)
    sigma = torch.ones(batch_size, device=where)
    cond = zoo.one_hot([i % 10 for i in range(batch_size)], device=where)
    uncond = torch.zeros_like(cond)
    both = torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([uncond, cond])

    def floor() -> None:
        denoiser(both[0], both[1], mapping_cond=both[2])
        denoiser(x, sigma, mapping_cond=uncond)

    guided = partial(ksag.SAGDenoiser(denoiser, cond_key="mapping_cond"), x, sigma, cond=cond, uncond=uncond, cond_scale=2.0)
    steps: dict[str, Step] = {"floor (2B + B)": floor, "plain CFG": partial(guided, sag_scale=0.0), "guided step": guided}
    for step in steps.values():
        for _ in range(3):
            step()
    peaks = {name: peak_bytes(step, where) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in trange(rounds, desc="rounds"):
        names = list(steps)
        for name in names[i % 3 :] + names[: i % 3]:
            times[name].append(seconds(steps[name], where))

    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    processor = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu
    click.echo(f"\n{processor}, torch {torch.__version__}, batch {batch_size}, {size} × {size}, float32, {rounds} rounds\n")
    click.echo("| | time | over the floor (quartiles) | peak memory | over plain CFG |\n| --- | --- | --- | --- | --- |")
    for name in steps:
        click.echo(row(name, times[name], times["floor (2B + B)"], peaks[name], peaks["plain CFG"]))
    if imports:
        pairs = [(import_seconds("torch"), import_seconds("ksag")) for _ in trange(7, desc="imports")]
        extra = statistics.median(ksag_ - torch_ for torch_, ksag_ in pairs)
        click.echo(f"\n`import ksag` over `import torch`: {extra:+.2f} s")


if __name__ == "__main__":
    main()
