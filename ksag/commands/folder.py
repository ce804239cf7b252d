"""A folder of pictures by seed: what made them stands beside them, and what is missing can be made later."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ksag import images as picture

SETTINGS = "ksag.json"


class Folder:
    """One PNG for each seed, all of the same settings.

    Any number of processes may write into it at once, each its own seeds, and be killed at any time: a file appears whole or not
    at all.

    Args:
        path: it is made if need be.
        settings: what makes the pictures, the seed aside. They are kept in the folder.

    Raises:
        ValueError: the folder's pictures are of other settings, or of unknown ones.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        file = path / SETTINGS
        has_pictures = any(name.removesuffix(".png").isdigit() for name in os.listdir(path))
        if has_pictures and not file.exists():
            raise ValueError(f"{path} holds pictures, but no {SETTINGS} that says what made them. Give another folder.")
        if has_pictures:
            _check_same(path, json.loads(file.read_text(encoding="utf-8")), settings)
        else:  # also over the settings of a run that came to nothing
            part = file.with_name(f".{SETTINGS}.{os.getpid()}.part")  # several processes may write the same
            part.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(part, file)

    def file(self, seed: int) -> Path:
        return self.path / f"{seed:06d}.png"

    def missing(self, seeds: Iterable[int]) -> list[int]:
        names = set(os.listdir(self.path))
        return [seed for seed in seeds if self.file(seed).name not in names]

    def save(self, seed: int, image: Image.Image, infotext: str) -> None:
        picture.save(image, self.file(seed), infotext)


def _check_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        differences = "; ".join(f"{name} is {_shown(there, name)} there, {_shown(here, name)} here" for name in names)
        raise ValueError(f"{path} holds pictures of other settings: {differences}. Give another folder, or the same settings.")


def _shown(settings: Mapping[str, Any], name: str) -> str:
    shown = str(settings.get(name, "not set"))
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
