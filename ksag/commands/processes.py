"""The processes of one run, under `accelerate launch`, torchrun, or any launcher that sets the same environment variables."""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

Part = TypeVar("Part")

BEAT, SILENCE = 2.0, 20.0
"""Seconds from one heartbeat to the next, and without one until a process counts as stopped."""
DONE = 2**40
"""Added to the heartbeats of a process that has finished."""


class Peers:
    """The other processes of a run. Each counts its heartbeats in the launcher's key-value store, and reads the others' counts.

    Args:
        store: a `torch.distributed.Store` that all processes share.
        rank: this process.
        world: their number.
    """

    def __init__(self, store: Any, rank: int, world: int):
        self._store, self._rank = store, rank
        now = time.monotonic()
        self._answered = now
        self._beats = {other: (0, now) for other in range(world) if other != rank}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stopped(self) -> list[str]:
        """The processes that stopped before they had finished."""
        now = time.monotonic()
        if now - self._answered > SILENCE:
            return ["the launcher or process 0"]  # one of them holds the store
        return [f"process {rank}" for rank, (beats, heard) in self._beats.items() if beats < DONE and now - heard > SILENCE]

    def running(self) -> bool:
        """Whether any of them is at work."""
        now = time.monotonic()
        return now - self._answered <= SILENCE and any(
            beats < DONE and now - heard <= SILENCE for beats, heard in self._beats.values()
        )

    def close(self, finished: bool) -> None:
        self._ended.set()
        self._thread.join(BEAT)
        if finished and not self._thread.is_alive():  # else the store does not answer
            with contextlib.suppress(RuntimeError):
                self._store.add(str(self._rank), DONE)

    def _watch(self) -> None:
        reported: list[str] = []
        while not self._ended.is_set():
            with contextlib.suppress(RuntimeError):  # the store is gone: see `stopped`
                self._store.add(str(self._rank), 1)
                for other, (before, _) in self._beats.items():
                    if (beats := self._store.add(str(other), 0)) != before:
                        self._beats[other] = beats, time.monotonic()
                self._answered = time.monotonic()
            for name in set(self.stopped()).difference(reported):
                reported.append(name)
                tqdm.write(f"Warning: {name} has stopped. Its share of the pictures will be missing.", file=sys.stderr)
            self._ended.wait(BEAT)


class Process(NamedTuple):
    """One of `world` processes, with its own device; `peers` is None for a single process."""

    rank: int
    world: int
    device: torch.device
    peers: Peers | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, parts: Iterable[Part]) -> Iterator[Part]:
        """This process's parts. Numbers differ by one at most between processes.

        >>> [list(Process(i, 2, torch.device("cpu")).share("abcde")) for i in range(2)]
        [['a', 'c', 'e'], ['b', 'd']]
        """
        return itertools.islice(parts, self.rank, None, self.world)


@contextlib.contextmanager
def this_process(device: torch.device) -> Iterator[Process]:
    """The only process, on `device`; or one of several that a launcher started, each on its own GPU if `device` is a GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Process(0, 1, device)
        return
    from torch.distributed import PrefixStore  # not every build of PyTorch has it
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(minutes=10)))
    except RuntimeError as error:
        raise RuntimeError(f"The {os.environ['WORLD_SIZE']} processes did not all start: {error}") from error
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    peers = Peers(PrefixStore("ksag", store), rank, world)
    try:
        yield Process(rank, world, device, peers)
    except BaseException:
        peers.close(finished=False)
        raise
    peers.close(finished=True)
