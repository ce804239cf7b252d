"""`ksag evaluate`: folders of pictures, compared with a reference."""

import json
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from ksag import evaluate
from ksag.attention.table import as_text
from ksag.commands import options
from ksag.evaluate import features
from ksag.evaluate.features import EXTRACTORS, Extractor

FEW = 1000
"""Below this many pictures, FD is mostly bias: 474 of the training pictures have an FD of 6.6 from the rest."""
FEWEST = 4
"""A picture and its third neighbour, see `ksag.evaluate.measure`."""


def report(results: list[dict[str, Any]]) -> str:
    """A row for each folder; from the second on with its Fréchet distance relative to the first."""
    rows = [["", "pictures", "FD", "KID × 1000", "precision", "recall", "FD over the first"]]
    for i, r in enumerate(results):
        over = f"{r['fd'] / results[0]['fd']:.3f}" if i and results[0]["fd"] > 0 else ""
        rows.append([r["folder"], str(r["pictures"]), f"{r['fd']:.4f}", f"{r['kid'] * 1000:.3f}", f"{r['precision']:.3f}",
                     f"{r['recall']:.3f}", over])  # fmt: skip
    if len(results) == 1:
        rows = [row[:-1] for row in rows]
    return as_text(rows, str.rjust)


def features_of(folder: Path, extractor: Extractor, device: torch.device, batch_size: int) -> torch.Tensor:
    with tqdm(total=len(evaluate.pictures_in(folder)), desc=str(folder), unit=" pictures") as bar:
        return evaluate.folder_features(folder, extractor, device, batch_size, bar.update)


@click.command("evaluate")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDER...")
@click.option("--reference", type=click.Path(path_type=Path),
              help="A folder of pictures to compare with, or a file of --save-statistics. [default: the bundled model's training "
              "pictures, for the bundled features]")  # fmt: skip
@click.option("--features", "name", type=click.Choice(list(EXTRACTORS)), default="emoji",
              help="The bundled classifier of emoji of 64 × 64, Inception-v3 (the usual FID), or DINOv2 ViT-B/14. The last two "
              "need torch-fidelity, the extra ksag[evaluate].")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False),
              help="Write the results to this file too; - prints them.")  # fmt: skip
@click.option("--save-statistics", type=click.Path(path_type=Path, dir_okay=False),
              help="Write the reference's statistics to this file, for --reference.")  # fmt: skip
@click.option("--device", type=options.device, default="auto", help="cpu, cuda, mps, or auto: a GPU if there is one.")
@click.option("--batch-size", type=click.IntRange(1), default=100, help="Pictures at a time.")
def command(
    folders: tuple[Path, ...], reference: Path | None, name: str, json_path: Path | None,
    save_statistics: Path | None, device: torch.device, batch_size: int,
) -> None:  # fmt: skip
    """How close are the pictures in each FOLDER to a reference?

    Prints the Fréchet distance (FD, lower is closer), kernel distance (KID), precision (the share of the pictures that look like
    the reference's) and recall (the share of the reference's that look like the pictures). With several folders, such as plain and
    guided samples of the same seeds, FD is also given relative to the first. The measures depend on the number of pictures:
    compare equal numbers, thousands of them.
    """
    if reference is None:
        if name != "emoji":
            raise click.UsageError("--reference is missing: only the bundled features have a bundled reference.")
        reference = evaluate.STATISTICS
    counts = {folder: len(evaluate.pictures_in(folder)) for folder in folders}  # an error now, not after the first folders
    references = {reference: len(evaluate.pictures_in(reference))} if reference.is_dir() else {}
    for folder, n in (counts | references).items():
        if n < FEWEST:
            raise click.UsageError(f"{folder} has {n} pictures: precision and recall need {FEWEST} or more.")
    for path in (json_path, save_statistics):
        if path is not None and not path.parent.is_dir():
            raise click.UsageError(f"{path} cannot be written: there is no folder {path.parent}.")
    if few := {folder: n for folder, n in counts.items() if n < FEW}:
        listed = ", ".join(f"{folder} has {n}" for folder, n in few.items())
        click.echo(f"Warning: {listed}. With fewer than {FEW:,} pictures, FD is too high and varies between sets.", err=True)
    extractor = features.load_extractor(name, device)
    if reference.is_dir():
        known = evaluate.statistics(features_of(reference, extractor, device, batch_size), extractor.name)
    else:
        known = evaluate.load_statistics(reference).to(device)
        if known.extractor != extractor.name:
            raise ValueError(f"{reference} holds features of {known.extractor}, and these are {extractor.name}: give --features.")
    if save_statistics is not None:
        known.save(save_statistics)
    results = []
    for folder in folders:
        found = evaluate.statistics(features_of(folder, extractor, device, batch_size), extractor.name)
        results.append({"folder": str(folder), "pictures": found.n, **evaluate.measure(found, known)._asdict()})
    click.echo(f"Features: {extractor.name}. Reference: {reference}, {known.n} pictures.\n{report(results)}")
    if json_path is not None:
        text = json.dumps(
            {"features": extractor.name, "reference": str(reference), "reference_pictures": known.n, "folders": results}, indent=1
        )
        click.echo(text) if str(json_path) == "-" else json_path.write_text(text + "\n")
