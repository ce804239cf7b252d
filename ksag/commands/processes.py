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
    """The only process, on `device`; or one of several that a launcher started, each on its own GPU if `device` is a GPU."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return Process(rank, world, device)
