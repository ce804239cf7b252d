"""The command `ksag demo`: the bundled model without and with guidance, in one picture."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from ksag import Direction, zoo
from ksag import images as picture
from ksag.commands.infotext import infotext, sampling_fields, text
from ksag.commands.model import for_seed
from ksag.commands.open import CATEGORY, COND_SCALE, STYLE, open_model
from ksag.commands.options import OPTIONS, directions, guidance_options, sampling_options, wrapped
from ksag.commands.sampling import Sampling, off, warn_if_idle
from ksag.commands.threads import by_shares

N, SEED, SAMPLER, STEPS = 4, 0, "euler", 12
"""As in the README's picture. Its samples are not selected: they have the first seeds."""
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
NAMES = {"SAG": "Self-Attention", "PAG": "Perturbed-Attention", "SEG": "Smoothed Energy"}
WAYS = ("", "", "two", "three")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({torch.get_num_threads()} threads)"


def rows_of(guidance: Sequence[Direction], sag_alone: float) -> dict[str, dict[str, float]]:
    """Label → keywords of a call, for plain sampling, SAG alone, and all directions.

    >>> rows_of(zoo.directions(), sag_alone=0.7)  # doctest: +NORMALIZE_WHITESPACE
    {'plain\\nordinary sampling': {'sag_scale': 0.0, 'pag_scale': 0.0},
     'SAG\\nSelf-Attention Guidance': {'sag_scale': 0.7, 'pag_scale': 0.0},
     'SAG + PAG\\nSelf-Attention and Perturbed-Attention Guidance': {}}
    """
    names = [direction.name for direction in guidance]
    none = off(guidance)
    rows = {"plain\nordinary sampling": none}
    if "SAG" in names and len(names) > 1:
        rows[f"SAG\n{NAMES['SAG']} Guidance"] = {**none, "sag_scale": sag_alone}
    return {**rows, f"{' + '.join(names)}\n{' and '.join(NAMES[name] for name in names)} Guidance": {}}


@click.command("demo")
@click.option("--out", type=click.Path(path_type=Path), show_default="ksag-demo.png, or ksag-demo-2.png and so on",
              help="The .png file to write.")  # fmt: skip
@click.option("-n", "--n", type=click.IntRange(1, 12), default=N, help="Samples: the picture's columns.")
@click.option("--seed", type=click.IntRange(0, 2**32), default=SEED, help="The first sample's seed; the next sample has the next.")
@CATEGORY
@STYLE
@COND_SCALE
@sampling_options(SAMPLER, STEPS)
@guidance_options
def command(
    out: Path | None, n: int, seed: int, sampler: str, steps: int, schedule: str, device: torch.device, **options: Any,
) -> None:  # fmt: skip
    """Sample the bundled model without guidance, with SAG, and with SAG and PAG, from the same noise, into one picture.

    Needs no file, no network and no GPU. The samples are not selected: they have the first seeds, from 0 on.

    The options show the library's defaults. Without them, the bundled model's recommended settings are used.
    """
    out = out or picture.free_name(Path("ksag-demo.png"))
    if not out.suffix or out.is_dir():
        raise click.UsageError(f"--out {out}: the demo is one picture. Give a file name that ends in .png, such as {out}/demo.png.")
    picture.check_writable(out)
    given = {name: value for name in OPTIONS if (value := options.pop(name)) is not None}
    guidance = directions(given, zoo.directions())
    if not guidance:
        raise click.UsageError("All guidance is off, so there would be nothing to compare.")
    rows = rows_of(guidance, given.get("sag_scale", zoo.SETTINGS["sag_scale"]))
    model = open_model(options, device, torch.float32)
    sigmas = model.sigmas(steps, schedule)
    warn_if_idle(sigmas, guidance)
    seeds = range(seed, seed + n)

    def run(label: str, scales: dict[str, float]) -> tuple[Tensor, float]:
        """The samples, and the seconds that they took."""
        with tqdm(desc=label, total=n * steps, bar_format=BAR) as bar:

            def share(seeds: Sequence[int], check: Callable[[], None]) -> Tensor:
                def on_step(i: int) -> None:
                    check()
                    bar.update(len(seeds))

                return Sampling(model, guided, sampler, sigmas, on_step=on_step).latents(seeds, **scales).cpu()

            start = time.perf_counter()
            return torch.cat(by_shares(share, seeds, device)), time.perf_counter() - start

    with wrapped(model, given, zoo.directions()) as guided:
        made = {label: run(label.partition("\n")[0], scales) for label, scales in rows.items()}

    names = [for_seed(model.prompts, seed) for seed in seeds]
    shown = f"seeds {seed} to {seed + n - 1}" if n > 1 else f"seed {seed}"
    scale = f", cond_scale {text(model.cond_scale)}" if model.cond_scale != 1 else ""
    alone = [f"SAG {text(scales['sag_scale'])}" for scales in rows.values() if scales.get("sag_scale")]
    together = " + ".join(f"{direction.name} {text(direction.scale)}" for direction in guidance)
    settings = f"{shown}, {sampler}, {steps} steps{scale}; strength: {', '.join([*alone, together])}"
    title = f"The same model and the same noise, sampled {WAYS[len(rows)]} ways"
    image = picture.demo([(label, samples) for label, (samples, _) in made.items()], names, title, settings)
    picture.save(image, out, infotext("; ".join(names), None, sampling_fields(model, guided, sampler, steps, schedule), seed))
    seconds = ", ".join(f"{label.partition(chr(10))[0]} {seconds:.1f} s" for label, (_, seconds) in made.items())
    click.echo(f"{settings}; {device_name(device)}: {seconds}.")
    click.echo(f"The picture is in {out.resolve()}")
