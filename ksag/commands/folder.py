"""A folder of pictures by seed, with the settings that made them. Missing pictures can be made later."""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from PIL import Image

from ksag import images as picture

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SETTINGS = "ksag.json"


class Folder(contextlib.AbstractContextManager["Folder"]):
    """One PNG for each seed, all made with the same settings.

    Any number of processes with the same settings may fill it at once, and be killed at any time. Processes with other settings
    are refused as long as it holds a picture, or one of the processes runs: each holds a lock on the settings file, which the
    system releases when a process is killed. On a file system without locks, the settings of a run that made no picture stay until
    the file is deleted.

    Args:
        path: an existing folder.
        settings: everything that determines the pictures, except the seed.

    Raises:
        ValueError: the folder's settings are others, or unknown.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self._claim = _claimed(path, settings)

    def __exit__(self, *error: object) -> None:
        self._claim.close()

    def file(self, seed: int) -> Path:
        return self.path / f"{seed:06d}.png"

    def missing(self, seeds: Iterable[int]) -> list[int]:
        """The seeds without a picture."""
        names = set(os.listdir(self.path))
        return [seed for seed in seeds if self.file(seed).name not in names]

    def save(self, seed: int, image: Image.Image, infotext: str) -> None:
        picture.save(image, self.file(seed), infotext)


def _has_pictures(path: Path) -> bool:
    return any(name.removesuffix(".png").isdigit() for name in os.listdir(path))


def _lock(file: IO[str], exclusive: bool) -> bool | None:
    """Waits for a lock that is shared with other processes; or takes an exclusive one, if no other process has a lock now.

    Returns:
        Whether it was taken; None if there are no locks here.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
    except BlockingIOError:
        return False
    except OSError:  # of the file system
        return None
    return True


def _claimed(path: Path, settings: Mapping[str, Any]) -> IO[str]:
    """The settings file with these settings, which no process with others can replace until it is closed."""
    file = path / SETTINGS
    if _has_pictures(path) and not file.exists():
        raise ValueError(f"{path} holds pictures, but no {SETTINGS} with their settings. Give another folder.")
    with contextlib.ExitStack() as on_error:
        claim = on_error.enter_context(os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8"))
        while True:
            alone = _lock(claim, exclusive=True)
            if not _has_pictures(path) and (alone or (alone is None and not _contents(claim))):
                claim.seek(0)
                claim.truncate()
                claim.write(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
                claim.flush()
                os.fsync(claim.fileno())
            _lock(claim, exclusive=False)  # another process can get in between, so only what is read now counts
            if _contents(claim) or _has_pictures(path):
                break
        _check_same(path, _contents(claim), settings)
        on_error.pop_all()
        return claim


def _contents(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _check_same(path: Path, text: str, here: Mapping[str, Any]) -> None:
    try:
        there = dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path / SETTINGS} is damaged, so the settings of the pictures are unknown. Give another folder."
        ) from error
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        differences = "; ".join(f"{name} is {_shown(there, name)} there, {_shown(here, name)} here" for name in names)
        what = "holds pictures of" if _has_pictures(path) else "is in use with"
        raise ValueError(f"{path} {what} other settings: {differences}. Give another folder, or the same settings.")


def _shown(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name)
    shown = "not set" if value is None else str(value) or "empty"
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
