from __future__ import annotations

import threading
import time

import pytest

from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks
from tests import bodies


def test_serial() -> None:
    bodies.check_collectives(SerialCommunicator())
    bodies.check_split(SerialCommunicator())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_threads(size: int) -> None:
    run_ranks(size, bodies.check_collectives)
    run_ranks(size, bodies.check_split)


def test_a_failing_virtual_rank_wakes_the_others() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 1:
            raise ValueError("rank 1 fails")
        comm.barrier(name="never complete")

    with pytest.raises(ValueError, match="rank 1 fails"):
        run_ranks(3, body)


def test_a_group_that_is_made_after_a_failure_is_woken_too() -> None:
    failed = threading.Event()

    def body(comm: Communicator) -> None:
        colors = comm.allgather_object(0, name="colors")
        if comm.rank == 1:
            failed.set()
            raise ValueError(f"rank 1 fails, not {colors}")
        failed.wait()
        time.sleep(0.1)  # the failure is known by now
        comm.split(0, name="groups").barrier(name="never complete")

    with pytest.raises(ValueError, match="rank 1 fails"):
        run_ranks(2, body)


def test_different_collectives_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"different collectives: \['a', 'b'\]"):
        run_ranks(2, lambda comm: comm.barrier(name="ab"[comm.rank]))
