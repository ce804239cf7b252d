"""The command `ksag demo`: the bundled model without and with SAG, in one picture."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

import ksag
from ksag import images as picture
from ksag.commands.infotext import infotext, sampling_fields, text
from ksag.commands.model import for_seed
from ksag.commands.open import CATEGORY, COND_SCALE, STYLE, open_model
from ksag.commands.options import SAG_DEFAULTS, sag_options, sampling_options
from ksag.commands.sampling import Sampling
from ksag.commands.threads import by_shares

N, SEED, SAMPLER, STEPS = 4, 0, "euler", 12
"""Those of the README's picture. Nobody chose its samples: they are the first seeds', whatever they show."""
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({torch.get_num_threads()} threads)"


@click.command("demo")
@click.option("--out", type=click.Path(path_type=Path), show_default="ksag-demo.png, or ksag-demo-2.png and so on",
              help="The .png file to write.")  # fmt: skip
@click.option("-n", "--n", type=click.IntRange(1, 12), default=N, help="Samples: the picture's columns.")
@click.option("--seed", type=click.IntRange(0, 2**32), default=SEED, help="The first sample's seed; the next sample has the next.")
@CATEGORY
@STYLE
@COND_SCALE
@sampling_options(SAMPLER, STEPS)
@sag_options
def command(
    out: Path | None, n: int, seed: int, sampler: str, steps: int, schedule: str, device: torch.device, **options: Any,
) -> None:  # fmt: skip
    """Sample the bundled model without and with SAG from the same noise, into one picture.

    Needs no file, no network and no GPU. The samples are not chosen: they are those of the first seeds, 0 and on.

    The options of SAG show the library's defaults; without them, the bundled model's recommended ones are used.
    """
    out = out or picture.free_name(Path("ksag-demo.png"))
    if not out.suffix or out.is_dir():
        raise click.UsageError(f"--out {out}: the demo is one picture. Give a file name that ends in .png, such as {out}/demo.png.")
    picture.check_writable(out)
    sag = {name: value for name in SAG_DEFAULTS if (value := options.pop(name)) is not None}
    if sag.get("sag_scale") == 0:
        raise click.UsageError("--sag-scale 0 turns SAG off, so there would be nothing to compare.")
    model = open_model(options, device, torch.float32)
    sag = {**SAG_DEFAULTS, **model.recommended, **sag}
    seeds = range(seed, seed + n)

    def run(label: str, **args: Any) -> tuple[Tensor, list[Tensor], float]:
        """The samples, for each share of them the masks of its steps, and the seconds that it took."""
        with tqdm(desc=label, total=n * steps, bar_format=BAR) as bar:

            def share(seeds: Sequence[int], check: Callable[[], None]) -> tuple[Tensor, list[Tensor]]:
                def on_step(i: int) -> None:
                    check()
                    bar.update(len(seeds))

                sampling = Sampling(model, guided, sampler, model.sigmas(steps, schedule), on_step=on_step)
                with guided.trace() as trace:
                    latents = sampling.latents(seeds, **args)
                return latents.cpu(), [step.mask for step in trace]

            start = time.perf_counter()
            samples, masks = zip(*by_shares(share, seeds, device), strict=True)
            return torch.cat(samples), [torch.stack(steps).mean(0) for steps in masks if steps], time.perf_counter() - start

    with ksag.SAGDenoiser(model.denoiser, cond_key=model.cond_key, **sag) as guided:
        plain, _, seconds = run("without SAG", sag_scale=0.0)
        with_sag, looked, sag_seconds = run("with SAG")
    if not looked:
        raise click.UsageError("SAG acted at no step, so there is nothing to compare: see --sigma-range.")

    names = [for_seed(model.prompts, seed) for seed in seeds]
    shown = f"seeds {seed} to {seed + n - 1}" if n > 1 else f"seed {seed}"
    scale = f", cond_scale {text(model.cond_scale)}" if model.cond_scale != 1 else ""
    changed = [name for name in SAG_DEFAULTS if name in ("sag_scale", "blur_sigma") or sag[name] != SAG_DEFAULTS[name]]
    of_sag = ", ".join(f"{name} {text(sag[name])}" for name in changed if name != "attention")
    settings = f"{shown}, {sampler}, {steps} steps{scale}, {of_sag}"
    image = picture.demo(plain, with_sag, torch.cat(looked), names, settings)
    picture.save(image, out, infotext("; ".join(names), None, sampling_fields(model, sag, sampler, steps, schedule), seed))
    click.echo(f"{settings}; {device_name(device)}: {seconds:.1f} s without SAG, {sag_seconds:.1f} s with it.")
    click.echo(f"The picture is in {out.resolve()}")
