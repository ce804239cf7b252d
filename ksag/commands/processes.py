"""The processes of one run, under `accelerate launch`, torchrun, or any launcher that sets the same environment variables."""

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch

Part = TypeVar("Part")


class Process(NamedTuple):
    """One of `world` processes, with its own device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, parts: Iterable[Part]) -> Iterator[Part]:
        """This process's parts. Numbers differ by one at most between processes.

        >>> [list(Process(i, 2, torch.device("cpu")).share("abcde")) for i in range(2)]
        [['a', 'c', 'e'], ['b', 'd']]
        """
        return itertools.islice(parts, self.rank, None, self.world)


def this_process(device: torch.device) -> Process:
    """The only process, on `device`; or one of several that a launcher started, each on its own GPU if `device` is a GPU.

    Raises:
        ValueError: WORLD_SIZE without a RANK below it.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Process(0, 1, device)
    rank = int(os.environ.get("RANK", -1))
    if not 0 <= rank < world:
        raise ValueError(f"WORLD_SIZE is {world}, so RANK must be 0 to {world - 1}, got {os.environ.get('RANK', 'none')}.")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return Process(rank, world, device)
