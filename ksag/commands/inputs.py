"""The prompts, pictures and sizes that `ksag sample --pipeline` takes, checked."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from PIL import Image, ImageOps
from torch import nn

from ksag.adapters.diffusers.networks import multiple_of, trained_size


def prompts(prompt: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of --prompt, then the lines of the file."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()] if file else []
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--prompts {file}: the file is not UTF-8 text. Save it in that encoding.") from error
    if not (found := [*prompt, *filter(None, lines)]):
        raise click.UsageError(f"{file} holds no prompt." if file else "--pipeline needs a --prompt, or a file of --prompts.")
    return found


def picture(path: Path, mode: str) -> Image.Image:
    """The picture in the file, upright."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow's convert clips these to white or black
                raise click.UsageError(f"{path} has more than 8 bits a channel: save it with 8.")
            return ImageOps.exif_transpose(image).convert(mode)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's for a damaged PNG is a SyntaxError
        raise click.UsageError(f"{path} is damaged, too large, or not a picture: {error}") from error


def picture_and_mask(image: Path | None, mask: Path | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture to start from and its mask, of the same size."""
    if image is None:
        return None, None
    start, covers = picture(image, "RGB"), picture(mask, "L") if mask else None
    if covers and covers.size != start.size:
        sizes = ["{}x{}".format(*p.size) for p in (covers, start)]
        raise click.UsageError(f"--mask {mask} is {sizes[0]}, and --image is {sizes[1]}: give a mask of the picture's size.")
    return start, covers


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled to (height, width), and cropped at two sides if the aspect differs."""
    return ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)


def size(pipe: Any, given: tuple[int, int] | None, picture: Image.Image | None) -> tuple[int, int]:
    """(height, width) in pixels; by default the area that the model was trained at, in the aspect of the picture."""
    step = multiple_of(pipe)
    if given is None:
        aspect, side = picture.width / picture.height if picture else 1.0, trained_size(pipe)[0] / step
        height, width = (max(1, round(side * factor)) * step for factor in (aspect**-0.5, aspect**0.5))
        return height, width
    if given[0] % step or given[1] % step:
        nearest = "x".join(str(max(1, round(side / step)) * step) for side in given[::-1])
        raise click.UsageError(f"--size {given[1]}x{given[0]}: both must be multiples of {step}, such as {nearest}.")
    return given


def name(path_or_id: str) -> str:
    """The hub id, or the name of the folder or file."""
    if not os.path.exists(path_or_id):
        return path_or_id
    path = Path(os.path.abspath(path_or_id))  # a link keeps its name, because the hub's cache links to files named by their hash
    return path.stem if path.is_file() else path.name


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]


def fingerprint(model: nn.Module) -> str:
    """Tells models of the same name apart, by the beginning of every tensor: gigabytes need not be read."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:16].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:10]
