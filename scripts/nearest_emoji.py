"""Does the bundled model draw new things?  `python scripts/nearest_emoji.py --data emoji`

Compares unconditional samples with the pictures that the model was trained on (of `make_emoji.py`): for each sample, the
training picture, or its mirror image, at the smallest RMS difference of pixels in [0, 1]. The same for the held-out pictures
says how near a new emoji is to the training set anyway. Writes `--out`, a picture: samples and below each its nearest
training picture, first for the first seeds, then for the closest ones of all; and beside it a JSON file of the distances.
"""

import json
from pathlib import Path

import click
import k_diffusion as K
import torch
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm
from train_emoji import load_pictures, to_reals

from ksag import zoo
from ksag.samplers import sample

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def nearest(pictures: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """For each picture, which of the known ones is nearest, and at what RMS difference; all in [-1, 1].

    >>> nearest(torch.zeros(1, 3, 2, 2), torch.stack([torch.ones(3, 2, 2), torch.full((3, 2, 2), 0.5)]))
    (tensor([1]), tensor([0.2500]))
    """
    flat = known.flatten(1)
    distances = [torch.cdist(part.flatten(1), flat) / (2 * flat.shape[1] ** 0.5) for part in pictures.split(64)]
    smallest = torch.cat(distances).min(dim=1)
    return smallest.indices, smallest.values


@click.command(help=__doc__)
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Of make_emoji.py.")
@click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=zoo.EMOJI)
@click.option("--n", type=click.IntRange(1), default=1024, show_default=True, help="How many samples.")
@click.option("--shown", type=click.IntRange(1), default=32, show_default=True, help="How many pairs of each kind are shown.")
@click.option("--steps", type=click.IntRange(2), default=50, show_default=True, help="Of dpmpp_2m.")
@click.option("--seed", default=0, show_default=True, help="The first sample's.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("nearest.png"), show_default=True)
@torch.no_grad()
def main(data, weights, n, shown, steps, seed, batch_size, device, out):
    denoiser, config = zoo.load(weights, device), zoo.load_config(weights)
    pictures, held_out = (p.to(device) for p in load_pictures(data, list(zoo.CATEGORIES), list(zoo.STYLES)))
    training = to_reals(pictures.images)
    known = torch.cat([training, training[pictures.mirror].flip(3)])
    sigmas = K.sampling.get_sigmas_karras(steps, config["model"]["sigma_min"], config["model"]["sigma_max"], device=device)
    batches = torch.arange(seed, seed + n).split(batch_size)
    shape = training.shape[1:]
    samples = torch.cat([sample("dpmpp_2m", denoiser, shape, sigmas, seeds.tolist()) for seeds in tqdm(batches, unit="batch")])
    samples = samples.clamp(-1, 1)

    partner, distance = nearest(samples, known)
    of_held_out = nearest(to_reals(held_out.images), known)[1]
    first, closest = torch.arange(min(shown, n), device=device), distance.argsort()[:shown]
    which = torch.cat([first, closest])
    pairs = torch.cat([samples[which], known[partner[which]]], dim=2)  # one above the other
    save_image(pairs, out, nrow=min(16, n), padding=4, pad_value=1.0, normalize=True, value_range=(-1, 1))

    levels = torch.tensor(QUANTILES, device=device)
    record = {"weights": weights.name, "sampler": "dpmpp_2m", "steps": steps, "seeds": [seed, seed + n - 1], "quantiles": QUANTILES}
    for name, values in (("samples", distance), ("held_out", of_held_out)):
        record[name] = [round(value, 4) for value in values.quantile(levels).tolist()]
        said = ", ".join(f"{q:g}: {value}" for q, value in zip(QUANTILES, record[name], strict=True))
        click.echo(f"{name:>8} to training, RMS at quantiles {said}")
    out.with_suffix(".json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
