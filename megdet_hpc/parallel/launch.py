"""Which launcher started this process, read from its environment before MPI starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

GLOO_LAUNCHER = "horovodrun (Gloo)"
# launcher, variable with the number of ranks, variable with this rank
_LAUNCHERS = (
    ("mpirun (Open MPI)", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    (GLOO_LAUNCHER, "HOROVOD_SIZE", "HOROVOD_RANK"),
    ("an MPI launcher (PMI)", "PMI_SIZE", "PMI_RANK"),
)


@dataclass(frozen=True)
class Launch:
    """A launcher, its number of ranks and this one's."""

    launcher: str
    size: int
    rank: int


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The launcher of this process, or None when it was started by hand.

    A batch script outside srun carries SLURM_NTASKS too, so SLURM counts only inside a step of srun; one of a single
    task, such as a shell, need not be MPI's.
    """
    for launcher, size, rank in _LAUNCHERS:
        if size in environ:
            return Launch(launcher, int(environ[size]), int(environ.get(rank, 0)))
    step = environ.get("SLURM_STEP_ID", "")
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 0))
    if "SLURM_PROCID" in environ and step.isdigit() and tasks > 1:
        return Launch("srun", tasks, int(environ["SLURM_PROCID"]))
    return None


def note_status(status: int) -> None:
    """Leave this process's exit status in the file that MEGDET_STATUS_FILE names, if no other rank has.

    A launcher may return another: that of a signal with which it ended the other ranks. jobs/restart.sh asks.
    """
    path = os.environ.get("MEGDET_STATUS_FILE")
    if path:
        with suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(f"{status}\n")


def is_first_process(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0 or alone."""
    launch = find_launch(environ)
    return launch is None or launch.rank == 0
