"""The command `ksag sample`: any kind of model → PNGs by seed."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from tqdm import tqdm

from ksag import GuidedDenoiser, zoo
from ksag import images as picture
from ksag.commands.folder import Folder
from ksag.commands.infotext import infotext, sampling_fields
from ksag.commands.model import for_seed
from ksag.commands.open import DTYPES, model_options, open_model
from ksag.commands.options import SCHEDULES, directions, guidance_options, sampling_options
from ksag.commands.processes import Process, this_process
from ksag.commands.sampling import Sampling, batches, warn_if_idle

MAX_SEED = 2**53
"""With any --n, far from the highest seed of PyTorch."""
MAX_N = 10**7
MAX_GRID = 1000
"""Pictures in one PNG: 100 rows of small ones; more than that is hard to look at."""
INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""
PATIENCE = 3600.0
"""Seconds that the main process waits for another process's next picture."""

Make = Callable[[Sequence[int]], list[Image.Image]]
Describe = Callable[[int], str]


def into_folder(folder: Folder, seeds: range, size: int, process: Process, make: Make, describe: Describe, bar: tqdm) -> None:
    """Makes this process's share of the batches with a missing picture; the main process then waits for the other processes.

    Batches are always made whole, and are the same for any number of processes, because a GPU rounds by a sample's place in its
    batch.

    Raises:
        click.ClickException: pictures are missing, and the other processes have made none for a while.
    """

    def show() -> None:
        bar.n = len(seeds) - len(folder.missing(seeds))
        bar.refresh()

    show()
    size = min(size, math.ceil(len(seeds) / process.world))  # so that no process is idle
    try:
        for batch, filled in process.share(batches(seeds, size)):
            if missing := folder.missing(batch):
                images = dict(zip(batch, make(filled), strict=False))
                for seed in missing:
                    folder.save(seed, images[seed], describe(seed))
                show()
        waited = time.monotonic()
        while process.is_main and process.world > 1 and bar.n < len(seeds) and time.monotonic() - waited < PATIENCE:
            time.sleep(0.5)
            before = bar.n
            show()
            waited = waited if bar.n == before else time.monotonic()
    except KeyboardInterrupt:
        bar.close()
        if process.is_main:
            made = len(seeds) - len(folder.missing(seeds))
            click.echo(f"Stopped: {made} of {len(seeds)} pictures are in {folder.path}. The same command makes the others.")
        raise SystemExit(INTERRUPTED) from None
    if process.is_main and process.world > 1 and bar.n < len(seeds):
        bar.close()
        raise click.ClickException(
            f"The other processes have made no picture for {PATIENCE / 60:.0f} minutes, and {len(seeds) - bar.n} of {len(seeds)} "
            f"are missing in {folder.path}. The same command makes them."
        )


def into_grid(out: Path, seeds: range, size: int, make: Make, describe: Describe, bar: tqdm) -> None:
    images: list[Image.Image] = []
    for batch, filled in batches(seeds, size):
        images += make(filled)[: len(batch)]
        bar.update(len(batch))
    columns = max(2, min(10, 2048 // images[0].width))
    image = picture.grid(images, columns, gap=max(2, images[0].width // 32)) if len(images) > 1 else images[0]
    picture.save(image, out, describe(seeds[0]))


@click.command("sample")
@model_options
@click.option("-n", "--n", type=click.IntRange(1, MAX_N), show_default="10, or one for each prompt", help="How many pictures.")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, help="The first picture's seed; the next one has the next.")
@click.option("--batch-size", type=click.IntRange(1), show_default="32, or 1 with --pipeline",
              help="How many at a time; it changes a picture by rounding only.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), show_default="ksag-samples.png, or ksag-samples-2.png and so on",
              help="A .png file for one grid, or a folder for one PNG per seed. A file that exists is replaced.")  # fmt: skip
@click.option("--compare", is_flag=True, help="Plain and guided side by side in each picture, from the same noise.")
@click.option("--zoom", type=click.IntRange(1, 16), default=1, help="Enlarge the pictures this many times.")
@sampling_options()
@click.option("--schedule", type=click.Choice(SCHEDULES), default="model",
              help="Noise levels: the model's own (Karras's for a k-diffusion model), or another's.")  # fmt: skip
@guidance_options
@click.option("--dtype", type=click.Choice(list(DTYPES)), show_default="float32, or float16 with --pipeline on a GPU",
              help="Precision of the model's computations.")  # fmt: skip
@click.option("--compile", "compiled", is_flag=True, help="Compile the model: minutes at first, faster steps.")
@click.option("--cuda-graphs", is_flag=True, help="Replay the model's calls as CUDA graphs: faster small batches.")
def command(
    n: int | None, seed: int, batch_size: int | None, out: Path | None, compare: bool, zoom: int,
    sampler: str, steps: int, schedule: str, device: torch.device, dtype: str | None, compiled: bool, cuda_graphs: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Sample a model with guidance into PNGs, by default the bundled model.

    A seed gives the same picture in any batch and on any device, to rounding. With several categories, classes or prompts, each
    seed takes the next one. Each PNG carries its parameters, where image tools look for them.

    With a folder, each PNG is written as soon as it is made. The same command makes missing pictures, also with a larger --n.
    `accelerate launch -m ksag sample --out FOLDER` shares the seeds among GPUs.

    The options show the library's defaults, with SAG on, PAG and SEG off. For the bundled model the defaults are its recommended
    combination of SAG and PAG, as in `ksag demo`. If any scale is given, the other scales are as shown: `--sag-scale 0` is plain
    sampling with every model.
    """
    out = out or picture.free_name(Path("ksag-samples.png"))
    picture.check_writable(out)
    if cuda_graphs and options["offload"]:
        raise click.UsageError("--offload moves the weights, and --cuda-graphs needs them to stay in place: give one of them.")
    if sampler == "dpm_adaptive" and batch_size not in (None, 1):
        raise click.UsageError("dpm_adaptive chooses its steps for a whole batch, so it makes them one by one: --batch-size 1.")
    cfg_rule, batch_cond = options.pop("cfg_rule"), options.pop("batch_cond")
    guidance = directions(options, () if options["weights"] or options["pipeline"] else zoo.directions())
    if compare and not guidance:
        raise click.UsageError("--compare needs guidance, and all of it is off: give --sag-scale, --pag-scale or --seg-scale.")

    with contextlib.ExitStack() as stack:
        process = this_process(device)
        if process.world > 1 and out.suffix:
            raise click.UsageError(f"--out {out}: several processes write into a folder, not into one file.")
        dtype = dtype or ("float16" if options["pipeline"] and process.device.type == "cuda" else "float32")
        model = open_model(options, process.device, DTYPES[dtype])
        guided = GuidedDenoiser(model.denoiser, guidance, cfg_rule=cfg_rule, cond_key=model.cond_key, batch_cond=batch_cond)
        stack.enter_context(guided)
        seeds = range(seed, seed + (n or (len(model.prompts) if options["pipeline"] else 10)))
        if out.suffix and len(seeds) > MAX_GRID:
            raise click.UsageError(
                f"--n {len(seeds)}: one file holds at most {MAX_GRID} pictures. Give a folder for one PNG per picture, such as "
                f"--out {out.with_suffix('')}."
            )
        size = 1 if sampler == "dpm_adaptive" else batch_size or (1 if options["pipeline"] else 32)
        fields = {
            **sampling_fields(model, guided, sampler, steps, schedule),
            "Precision": dtype,
            **({"Compare": "plain and guided"} if compare else {}),
            **({"Zoom": str(zoom)} if zoom > 1 else {}),
        }

        def describe(seed: int) -> str:
            return infotext(for_seed(model.prompts, seed), model.negative_prompt, fields, seed)

        sigmas = model.sigmas(steps, schedule)
        if process.is_main and sampler != "dpm_adaptive":
            warn_if_idle(sigmas, guided.directions)
        settings = {"Prompt": model.prompts, "Negative prompt": model.negative_prompt, **fields}
        folder = None if out.suffix else stack.enter_context(Folder(out, settings))
        if compiled:
            denoiser: Any = model.denoiser
            denoiser.inner_model = torch.compile(denoiser.inner_model, dynamic=False)
        if cuda_graphs:
            guided.use_cuda_graphs()
        with tqdm(total=len(seeds), unit="picture", disable=not process.is_main) as bar:
            sampling = Sampling(model, guided, sampler, sigmas, zoom, lambda i: bar.set_postfix_str(f"step {i + 1}"))
            make = sampling.compared if compare else sampling.pictures
            if folder is None:
                into_grid(out, seeds, size, make, describe, bar)
            else:
                into_folder(folder, seeds, size, process, make, describe, bar)
        if process.is_main:
            click.echo(f"{len(seeds)} pictures in {out.resolve()}" if len(seeds) > 1 else f"The picture is in {out.resolve()}")
