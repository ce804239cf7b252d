"""Which part of the work is this process's, under `accelerate launch` or torchrun."""

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

Part = TypeVar("Part")


class Process(NamedTuple):
    """One of `world`, with a device of its own."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Every process gets as many, to one; they need not talk to each other.

        >>> [list(Process(i, 2, torch.device("cpu")).share("abcde")) for i in range(2)]
        [['a', 'c', 'e'], ['b', 'd']]
        """
        return itertools.islice(parts, self.rank, None, self.world)


@contextmanager
def this_process(device: torch.device) -> Iterator[Process]:
    """The only one, on `device`; or one of those that a launcher started, each on its own GPU if `device` is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Process(0, 1, device)
        return
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    try:
        yield Process(state.process_index, state.num_processes, state.device)
    finally:
        state.destroy_process_group()
