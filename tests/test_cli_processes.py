"""Does each process of a run notice when another one stops?"""

import time

import pytest
from torch.distributed import HashStore

from ksag.commands import processes
from ksag.commands.processes import Peers


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(processes, "BEAT", 0.02)
    monkeypatch.setattr(processes, "SILENCE", 1.0)


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_process_that_stops_is_not_one_that_has_finished(capsys):
    store = HashStore()
    main, finished, stopped = (Peers(store, rank, 3) for rank in range(3))
    time.sleep(1.5)  # longer than the silence
    assert main.running() and not main.stopped()
    finished.close(finished=True)
    stopped.close(finished=False)
    wait_until(lambda: not main.running())
    assert main.stopped() == ["process 2"]
    time.sleep(0.1)
    main.close(finished=True)
    assert capsys.readouterr().err.count("Warning: process 2 has stopped. Its share of the pictures will be missing.") == 1


def test_a_store_that_is_gone_is_said(capsys):
    class Gone(HashStore):
        def add(self, *_):
            raise RuntimeError("Connection reset by peer")

    peers = Peers(Gone(), 1, 2)
    wait_until(peers.stopped)
    assert peers.stopped() == ["the launcher or process 0"] and not peers.running()
    time.sleep(0.1)
    peers.close(finished=True)
    assert "the launcher or process 0 has stopped" in capsys.readouterr().err
