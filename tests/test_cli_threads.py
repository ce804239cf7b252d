"""Do threads that share the samples of a command make the samples of one, and stop together?"""

import threading

import pytest
import torch

from ksag.commands.threads import by_shares

CPU = torch.device("cpu")


@pytest.fixture
def threads():
    """PyTorch with three threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_every_seed_once_in_order_and_each_operation_on_one_thread(threads):
    def work(seeds, check):
        check()
        return list(seeds), torch.get_num_threads()

    results = by_shares(work, range(5, 12), CPU)
    assert [seed for seeds, _ in results for seed in seeds] == list(range(5, 12))
    assert [len(seeds) for seeds, _ in results] == [2, 2, 3] and {count for _, count in results} == {1}
    assert torch.get_num_threads() == threads
    assert [seeds for seeds, _ in by_shares(work, range(2), CPU)] == [[0], [1]]
    assert [seeds for seeds, _ in by_shares(work, range(7), torch.device("cuda"))] == [list(range(7))]


def test_an_error_in_one_stops_the_others(threads):
    started = threading.Barrier(3, timeout=60)

    def work(seeds, check):
        started.wait()
        if 0 in seeds:
            raise ValueError("bad")
        while True:  # until it is stopped
            check()

    with pytest.raises(ValueError, match="bad"):
        by_shares(work, range(3), CPU)
    assert torch.get_num_threads() == threads
