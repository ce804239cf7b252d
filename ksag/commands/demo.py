"""The command `ksag demo`: the bundled model without and with guidance, in one picture."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from ksag import GuidedDenoiser, zoo
from ksag import images as picture
from ksag.commands.infotext import infotext, sampling_fields, text
from ksag.commands.model import for_seed
from ksag.commands.open import CATEGORY, STYLE, open_model
from ksag.commands.options import sampling_options
from ksag.commands.sampling import Sampling, warn_if_idle


def latents(sampling: Sampling, seeds: Sequence[int], **scales: float) -> Tensor:
    """(len(seeds), c, h, w), on the CPU.

    On a CPU, each seed is sampled in its own thread. On a busy machine, one batch on all of PyTorch's threads takes several times
    as long, because they wait for each other after each operation.
    """
    if sampling.sigmas.device.type != "cpu":
        return sampling.latents(seeds, **scales).cpu()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return torch.cat(list(pool.map(lambda seed: sampling.latents([seed], **scales), seeds)))
    finally:
        torch.set_num_threads(threads)


@click.command("demo")
@click.option("--out", type=click.Path(path_type=Path), show_default="ksag-demo.png, or ksag-demo-2.png and so on",
              help="The .png file to write.")  # fmt: skip
@click.option("-n", "--n", type=click.IntRange(1, 12), default=4, help="Samples: the picture's columns.")
@click.option("--seed", type=click.IntRange(0, 2**32), default=0, help="The first sample's seed; the next sample has the next.")
@CATEGORY
@STYLE
@sampling_options(steps=12)
def command(out: Path | None, n: int, seed: int, sampler: str, steps: int, device: torch.device, **options: Any) -> None:
    """Sample the bundled model without guidance, with SAG, and with SAG and PAG, from the same noise, into one picture.

    Needs no file, no network and no GPU. The samples are not selected: they have the first seeds, from 0 on. The guidance has the
    bundled model's recommended settings; `ksag sample --compare` tries others.
    """
    out = out or picture.free_name(Path("ksag-demo.png"))
    if not out.suffix or out.is_dir():
        raise click.UsageError(f"--out {out}: the demo is one picture. Give a file name that ends in .png, such as {out}/demo.png.")
    picture.check_writable(out)
    directions, alone = zoo.directions(), zoo.SETTINGS["sag_scale"]
    together = " + ".join(f"{direction.name} {text(direction.scale)}" for direction in directions)
    rows = {
        "plain\nordinary sampling": {"sag_scale": 0.0, "pag_scale": 0.0},
        "SAG\nSelf-Attention Guidance": {"sag_scale": alone, "pag_scale": 0.0},
        "SAG + PAG\nSelf-Attention and Perturbed-Attention Guidance": {},
    }
    model = open_model(options, device, torch.float32)
    seeds, sigmas = range(seed, seed + n), model.sigmas(steps, "model")
    if sampler != "dpm_adaptive":
        warn_if_idle(sigmas, directions)
    total = len(rows) * steps * (n if device.type == "cpu" else 1)
    made, times = [], []
    with (
        GuidedDenoiser(model.denoiser, directions, cond_key=model.cond_key) as guided,
        tqdm(total=total, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}") as bar,
    ):
        sampling = Sampling(model, guided, sampler, sigmas, on_step=lambda i: bar.update())
        for label, scales in rows.items():
            name, start = label.partition("\n")[0], time.perf_counter()
            bar.set_description(name)
            made.append((label, latents(sampling, seeds, **scales)))
            times.append(f"{name} {time.perf_counter() - start:.1f} s")

    names = [for_seed(model.prompts, seed) for seed in seeds]
    shown = f"seeds {seed} to {seed + n - 1}" if n > 1 else f"seed {seed}"
    settings = f"{shown}, {sampler}, {steps} steps; strength: SAG {text(alone)}, {together}"
    image = picture.demo(made, names, "The same model and the same noise, sampled three ways", settings)
    picture.save(image, out, infotext("; ".join(names), None, sampling_fields(model, guided, sampler, steps, "model"), seed))
    click.echo(f"{settings}; {device.type}: {', '.join(times)}.\nThe picture is in {out.resolve()}")
