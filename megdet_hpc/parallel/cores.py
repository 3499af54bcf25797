"""Cores of a rank, and what its libraries are told where there are too few for the threads that poll."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megdet_hpc.parallel.launchers import Launch

_YIELD = "OMPI_MCA_mpi_yield_when_idle"
_THREADS = Path("/proc/self/task")
_NAME_LENGTH = 15  # of Linux


def own_cores(local_size: int, usable: int, of_host: int) -> float:
    """The number of cores that a rank has for itself.

    A rank cannot see which cores others have. So unbound ranks in a part of a large host count as bound, and as having
    more cores than they have.

    Args:
        local_size: ranks on this host.
        usable: cores on which this rank may run.
        of_host: cores of the host.
    """
    bound = usable * local_size <= of_host  # so many fit side by side: each rank was given its own
    return usable if bound else usable / local_size


def usable_cores() -> int:
    """The cores on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def cores_here(local_size: int) -> float:
    """`own_cores` of this process."""
    return own_cores(local_size, usable_cores(), os.cpu_count() or 1)


def yield_if_crowded(launch: Launch, polls: int) -> None:
    """Let waiting ranks give their core away where threads that poll outnumber cores. Before MPI starts.

    Open MPI polls while it waits, and so keeps the core from the thread that it waits for. The user's own setting of
    mpi_yield_when_idle stays. Other MPIs have no such setting and ignore this one.

    Args:
        launch: launcher of this rank and its place.
        polls: threads of a rank that poll.
    """
    if launch.local_size is None or launch.local_size == 1:
        return
    if cores_here(launch.local_size) < polls:
        os.environ.setdefault(_YIELD, "1")


@contextmanager
def named_threads(name: str) -> Iterator[None]:
    """Name the threads that a library starts in this block, as `top -H` and debuggers show them. Linux only."""
    before = _thread_ids()
    try:
        yield
    finally:
        for thread in _thread_ids() - before:
            try:
                (_THREADS / thread / "comm").write_text(name[:_NAME_LENGTH])
            except OSError:  # it has ended
                continue


def _thread_ids() -> set[str]:
    return set(os.listdir(_THREADS)) if _THREADS.is_dir() else set()
