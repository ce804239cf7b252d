"""The features of a folder of pictures."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ksag.evaluate.features import Extractor

SUFFIXES = {".png", ".webp", ".jpg", ".jpeg", ".bmp"}


def pictures_in(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures in a folder and its subfolders, without hidden ones (.thumbs). An error if there are none, or one is no file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file, not a folder." if folder.exists() else f"There is no folder {folder}.")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    for path in found:
        if not path.is_file():
            raise OSError(f"{path} is {'a broken link' if path.is_symlink() else 'not a regular file'}, so it cannot be read.")
    return found


def load_picture(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """(3, h, w), uint8, of an 8-bit picture without transparency.

    Args:
        path: the file.
        size: the (h, w) that it must have, checked before it is decoded; by default any.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            w, h = image.size
            if size is not None and (h, w) != size:
                needed = f"{size[1]} × {size[0]}. Inception and DINOv2 take any size"
                raise ValueError(f"{path} has {w} × {h} pixels; these features need {needed}.")
            if ";16" in str(image.tile) or image.mode.startswith(("I", "F")):  # Pillow opens a 16-bit PNG as 8-bit RGB
                raise ValueError(f"{path} has more than 8 bits a channel: save it as 8-bit RGB.")
            if "A" in image.getbands() or "transparency" in image.info:
                raise ValueError(f"{path} is transparent: save it as RGB, on the background that it is to be judged on.")
            picture: Tensor = pil_to_tensor(image.convert("RGB"))
            return picture
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from error
    except (OSError, SyntaxError) as error:  # Pillow's for a damaged PNG is a SyntaxError
        raise OSError(f"{path} is damaged, or not a picture: {error}") from error


def batches(paths: Sequence[Path], batch_size: int, size: tuple[int, int] | None = None) -> Iterator[Tensor]:
    """Batches of pictures of one size, (at most batch_size, 3, h, w), uint8; `size` as for `load_picture`."""
    batch: list[Tensor] = []
    for path in paths:
        picture = load_picture(path, size)
        if batch and (len(batch) == batch_size or picture.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(picture)
    yield torch.stack(batch)


def folder_features(
    folder: str | os.PathLike[str],
    extractor: Extractor,
    device: str | torch.device = "cpu",
    batch_size: int = 100,
    progress: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """The features (n, d) of the pictures in a folder, on `device`, in an order that does not depend on the files' names.

    Args:
        folder: the pictures, see `pictures_in`.
        extractor: which features, on `device`.
        device: where to compute.
        batch_size: pictures at a time.
        progress: called with the number of pictures after each batch.
    """
    by_content = sorted((hashlib.sha256(path.read_bytes()).digest(), path) for path in pictures_in(folder))
    found = []
    for batch in batches([path for _, path in by_content], batch_size, extractor.size):
        found.append(extractor(batch.to(device)))
        progress(len(batch))
    return torch.cat(found)
