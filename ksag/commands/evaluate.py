"""`ksag evaluate`: folders of pictures side by side, judged against a reference."""

import json
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from ksag import evaluate as judging
from ksag.attention.table import as_text
from ksag.commands.options import Device
from ksag.evaluate import features as extractors
from ksag.evaluate.features import EXTRACTORS, Extractor


def report(results: list[dict[str, Any]]) -> str:
    """A row for each folder; from the second on, its Fréchet distance over that of the first."""
    rows = [["", "pictures", "FD", "KID × 1000", "precision", "recall", "FD over the first"]]
    for i, r in enumerate(results):
        over = f"{r['fd'] / results[0]['fd']:.3f}" if i and results[0]["fd"] > 0 else ""
        rows.append([r["folder"], str(r["pictures"]), f"{r['fd']:.4f}", f"{r['kid'] * 1000:.3f}", f"{r['precision']:.3f}",
                     f"{r['recall']:.3f}", over])  # fmt: skip
    if len(results) == 1:
        rows = [row[:-1] for row in rows]
    return as_text(rows, str.rjust)


def features_of(folder: Path, extractor: Extractor, device: torch.device, batch_size: int, cache: Path | None) -> torch.Tensor:
    with tqdm(total=len(judging.pictures_in(folder)), desc=str(folder), unit=" pictures") as bar:
        return judging.folder_features(folder, extractor, device, batch_size, cache, bar.update)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDER...")
@click.option("--reference", type=click.Path(path_type=Path),
              help="What the pictures should be like: a folder, or statistics that were saved. [default: those of the bundled "
              "model's training pictures, for the bundled features]")  # fmt: skip
@click.option("--features", "name", type=click.Choice(list(EXTRACTORS)), default="emoji",
              help="What judges: the bundled classifier of emoji of 64 × 64, Inception-v3 (FID as it is usually computed), or "
              "DINOv2 ViT-B/14; the last two by torch-fidelity, the extra ksag[evaluate].")  # fmt: skip
@click.option("--weights", type=click.Path(path_type=Path), help="A file of these features' weights, instead of a download.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here too, - for the screen."
)
@click.option("--save-statistics", type=click.Path(path_type=Path, dir_okay=False),
              help="Write the reference's statistics here, to be a --reference later.")  # fmt: skip
@click.option("--device", type=Device(), default="auto", help="cpu, cuda, mps, or auto: a GPU where there is one.")
@click.option("--batch-size", type=click.IntRange(1), default=100, help="Pictures at a time.")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), default=judging.default_cache,
              help="Where features are kept by what the pictures hold.", show_default="~/.cache/ksag/features")  # fmt: skip
@click.option("--no-cache", is_flag=True, help="Compute all features, and keep none.")
def evaluate(
    folders: tuple[Path, ...], reference: Path | None, name: str, weights: Path | None, json_path: Path | None,
    save_statistics: Path | None, device: torch.device, batch_size: int, cache: Path, no_cache: bool,
) -> None:  # fmt: skip
    """How near are the pictures in each FOLDER to those of a reference?

    Fréchet distance (FD, lower is nearer), kernel distance (KID), precision (how many of the pictures look like the reference's)
    and recall (how many of the reference's look like the pictures). Several folders, such as plain and SAG of the same seeds,
    stand side by side. The measures depend on the number of pictures: compare equal numbers, thousands of them.
    """
    if reference is None:
        if name != "emoji" or weights is not None:
            raise click.UsageError("--reference is missing: only the bundled features have a bundled reference.")
        reference = judging.STATISTICS
    for folder in folders:
        judging.pictures_in(folder)  # an error now, not after the first folders
    for path in (json_path, save_statistics):
        if path is not None and not path.parent.is_dir():
            raise click.UsageError(f"{path} cannot be written: there is no folder {path.parent}.")
    extractor = extractors.load(name, device, weights)
    kept = None if no_cache else cache
    if reference.is_dir():
        known = judging.statistics(features_of(reference, extractor, device, batch_size, kept), extractor.name)
    else:
        known = judging.load_statistics(reference).to(device)
        if known.extractor != extractor.name:
            raise ValueError(f"{reference} holds features of {known.extractor}, and these are {extractor.name}: give --features.")
    if save_statistics is not None:
        known.save(save_statistics)
    results = []
    for folder in folders:
        found = judging.statistics(features_of(folder, extractor, device, batch_size, kept), extractor.name)
        results.append({"folder": str(folder), "pictures": found.n, **judging.measure(found, known)._asdict()})
    click.echo(f"Features: {extractor.name}. Reference: {reference}, {known.n} pictures.\n{report(results)}")
    if json_path is not None:
        text = json.dumps(
            {"features": extractor.name, "reference": str(reference), "reference_pictures": known.n, "folders": results}, indent=1
        )
        click.echo(text) if str(json_path) == "-" else json_path.write_text(text + "\n")
