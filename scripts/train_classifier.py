"""How is the classifier trained whose features judge emoji?  `python scripts/train_classifier.py --data emoji`

Trains `ksag.evaluate.features.Classifier` on the pictures that `make_emoji.py` wrote, to tell category, style, and (by a head that
is thrown away, so that the features know more of a picture than its 56 sorts) which emoji it is. It writes into `--out`
`classifier.safetensors`, with its accuracy on held-out emoji and what its features notice in its metadata, and
`statistics.safetensors`, the features of the pictures that were trained on. The denoiser has no part in it.
"""

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from train_emoji import Pictures, load_pictures, rotation, scaling, to_reals, translation

from ksag import zoo
from ksag.evaluate import features, frechet_distance, statistics


def emoji_numbers(folder: Path, styles: tuple[str, ...]) -> Tensor:
    """Which emoji each picture of `load_pictures` to train on shows, (n,), numbered."""
    described = json.loads((folder / "index.json").read_text())["pictures"]
    names = [picture["emoji"] for style in styles for picture in described[style] if not picture["held_out"]]
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    return torch.tensor([number[name] for name in names])


def augment(reals: Tensor) -> Tensor:
    """Small shifts, turns, changes of size and of colour; each picture its own."""
    b, device = len(reals), reals.device

    def normal(spread: float) -> Tensor:
        return torch.randn(b, device=device) * spread

    size = torch.exp2(normal(0.15))
    forward = scaling(size, size) @ rotation(normal(0.08)) @ translation(normal(0.06), normal(0.06))
    grid = F.affine_grid(torch.linalg.inv_ex(forward).inverse[:, :2], list(reals.shape), align_corners=False)
    moved = F.grid_sample(reals, grid, mode="bicubic", padding_mode="border", align_corners=False)
    gain, lift = 1 + 0.08 * torch.randn(b, 3, 1, 1, device=device), 0.05 * torch.randn(b, 3, 1, 1, device=device)
    return ((moved - 1) * gain + 1 - lift.abs()).clamp(-1, 1)  # white stays nearly white


def accuracies(network: features.Classifier, pictures: Pictures) -> dict[str, float]:
    with torch.no_grad():
        found = torch.cat([network(part) for part in pictures.images.split(512)])
        category, style = network.category(found).argmax(1), network.style(found).argmax(1)
    return {
        "category": round((category == pictures.categories).float().mean().item(), 4),
        "style": round((style == pictures.styles).float().mean().item(), 4),
    }


def blurred(reals: Tensor, sigma: float) -> Tensor:
    x = torch.arange(-9, 10, device=reals.device)
    kernel = (-(x**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    rows = F.conv2d(F.pad(reals, (9, 9, 0, 0), "reflect"), kernel, groups=3)
    return F.conv2d(F.pad(rows, (0, 0, 9, 9), "reflect"), kernel.transpose(2, 3), groups=3)


def without_part(reals: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Each with a white square of this side somewhere in the middle 48 × 48."""
    corners = torch.randint(8, 57 - side, (len(reals), 2), generator=generator).to(reals.device)
    along = torch.arange(64, device=reals.device)
    row, column = ((along >= c[:, None]) & (along < c[:, None] + side) for c in corners.unbind(1))
    return torch.where((row[:, :, None] & column[:, None, :])[:, None], torch.ones_like(reals), reals)


def noticed(extractor: features.Extractor, pictures: Pictures, held_out: Pictures) -> dict[str, float]:
    """Fréchet distances from one half of the training pictures: of the other half, as it is and damaged, and of those held out."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(pictures), generator=generator).to(pictures.images.device)
    one, other = order.chunk(2)
    reals = to_reals(pictures.images[other])
    noise = torch.randn(reals.shape, generator=generator).to(reals)
    few = torch.randperm(len(pictures), generator=generator)[: len(held_out)].to(pictures.images.device)
    rest = torch.ones(len(pictures), dtype=torch.bool, device=pictures.images.device).index_fill(0, few, False)

    def found(images: Tensor):
        return statistics(torch.cat([extractor(part) for part in images.split(512)]), extractor.name)

    def fd(reals: Tensor) -> float:
        return frechet_distance(found(features.to_bytes(reals)), reference)

    reference = found(pictures.images[one])
    distances = {
        "nothing": fd(reals),
        **{f"noise of {level}": fd(reals + level * noise) for level in (0.05, 0.1, 0.2)},
        **{f"blur of {sigma} pixels": fd(blurred(reals, sigma)) for sigma in (0.5, 1.0, 2.0)},
        **{f"a square of {side} pixels missing": fd(without_part(reals, side, generator)) for side in (8, 12, 20)},
        "colours of another": fd((reals - reals.mean((2, 3), keepdim=True)) + reals.mean((2, 3), keepdim=True).roll(1, 0)),
        "an eighth of the pictures 8 times": fd(reals[: len(reals) // 8].repeat(8, 1, 1, 1)),
    }
    everything = found(pictures.images[rest])
    distances[f"{len(held_out)} held out, to all"] = frechet_distance(found(held_out.images), everything)
    distances[f"{len(held_out)} of training, to the rest"] = frechet_distance(found(pictures.images[few]), everything)
    return {name: round(distance, 4) for name, distance in distances.items()}


@click.command(help=__doc__)
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="The folder that make_emoji.py wrote.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/classifier"), show_default=True)
@click.option("--epochs", default=60, show_default=True)
@click.option("--batch-size", default=256, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--widths", default="32,64,128,256", show_default=True)
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--smoothing", default=0.1, show_default=True, help="Of the labels.")
@click.option("--emoji-weight", default=0.5, show_default=True, help="Of the loss of which emoji it is, beside the two others.")
@click.option("--keep", default=4000, show_default=True, help="Features kept in the statistics.")
def main(data, out, epochs, batch_size, seed, widths, learning_rate, smoothing, emoji_weight, keep):
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(seed)
    training, held_out = (p.to(device) for p in load_pictures(data, list(zoo.CATEGORIES), list(zoo.STYLES)))
    emoji = emoji_numbers(data, zoo.STYLES).to(device)
    sizes = tuple(int(width) for width in widths.split(","))
    network = features.Classifier(sizes, len(zoo.CATEGORIES), len(zoo.STYLES)).to(device).to(memory_format=torch.channels_last)
    which = nn.Linear(sizes[-1], int(emoji.max()) + 1).to(device)
    parameters = [*network.parameters(), *which.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    steps = epochs * (len(training) // batch_size)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext()

    with tqdm(total=steps, desc="training", mininterval=5) as bar:
        while bar.n < steps:
            for rows in torch.randperm(len(training), device=device).split(batch_size)[: len(training) // batch_size]:
                for group in optimizer.param_groups:
                    warm = min((bar.n + 1) / 100, 1)
                    group["lr"] = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * bar.n / steps))
                batch = training[rows]
                mirrored = batch.mirror & (torch.rand(len(rows), device=device) < 0.5)
                reals = to_reals(batch.images)
                reals = augment(torch.where(mirrored[:, None, None, None], reals.flip(3), reals))
                with autocast():
                    found = network.features(reals.contiguous(memory_format=torch.channels_last))
                    loss = F.cross_entropy(network.category(found), batch.categories, label_smoothing=smoothing)
                    loss = loss + F.cross_entropy(network.style(found), batch.styles, label_smoothing=smoothing)
                    loss = loss + emoji_weight * F.cross_entropy(which(found), emoji[rows], label_smoothing=smoothing)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    out.mkdir(parents=True, exist_ok=True)
    path = out / "classifier.safetensors"
    halves = {name: t.half().float() if t.is_floating_point() else t for name, t in network.state_dict().items()}
    network.load_state_dict(halves)
    network.eval().requires_grad_(False)  # judged as it is stored
    judged = features.Extractor("judged", network)
    record = {
        "accuracy_held_out": accuracies(network, held_out),
        "accuracy_training": accuracies(network, training),
        "pictures": len(training),
        "held_out": len(held_out),
        "categories": torch.bincount(training.categories, minlength=len(zoo.CATEGORIES)).tolist(),
        "frechet_distances": noticed(judged, training, held_out),
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "smoothing": smoothing,
        "emoji_weight": emoji_weight,
        "seconds": round(time.monotonic() - started),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }
    features.save_classifier(network, path, sizes, record)
    extractor = features.load_classifier(path, device)
    found = torch.cat([extractor(part) for part in training.images.split(512)])
    statistics(found, extractor.name, keep).save(out / "statistics.safetensors")
    size = sum((out / name).stat().st_size for name in ("classifier.safetensors", "statistics.safetensors"))
    tqdm.write(f"{path} and the statistics ({size / 2**20:.2f} MiB): {json.dumps(record, indent=1)}")


if __name__ == "__main__":
    main()
