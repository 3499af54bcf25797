"""Cores of a rank, and the names of its libraries' threads."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from megdet_hpc.parallel.cores import named_threads, own_cores, yield_if_crowded
from megdet_hpc.parallel.launchers import Launch

YIELD = "OMPI_MCA_mpi_yield_when_idle"


@pytest.mark.parametrize(
    ("local_size", "usable", "of_host", "expected"),
    [(2, 2, 2, 1), (8, 128, 128, 16), (8, 4, 128, 4), (128, 1, 128, 1), (4, 2, 2, 0.5)],
    ids=["shared", "many", "bound", "bound to one", "too many ranks"],
)
def test_cores_of_a_rank(local_size: int, usable: int, of_host: int, expected: float) -> None:
    assert own_cores(local_size, usable, of_host) == expected


@pytest.mark.parametrize(("local_size", "expected"), [(None, None), (1, None), (4096, "1")])
def test_ranks_yield_where_there_are_too_few_cores(
    local_size: int | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(YIELD, raising=False)
    yield_if_crowded(Launch("mpirun (Open MPI)", 4096, 0, 0, local_size), polls=1)
    assert os.environ.pop(YIELD, None) == expected


def test_the_users_own_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(YIELD, "0")
    yield_if_crowded(Launch("mpirun (Open MPI)", 4096, 0, 0, 4096), polls=2)
    assert os.environ[YIELD] == "0"


def test_threads_of_a_block_get_its_name() -> None:
    end = threading.Event()

    def comm(thread: threading.Thread) -> str:
        return Path(f"/proc/self/task/{thread.native_id}/comm").read_text().strip()

    before, inside = threading.Thread(target=end.wait), threading.Thread(target=end.wait)
    before.start()
    try:
        with named_threads("a-library-with-a-long-name"):
            inside.start()
        assert comm(inside) == "a-library-with-"
        assert comm(before) != "a-library-with-"
    finally:
        end.set()
        before.join()
        inside.join()
