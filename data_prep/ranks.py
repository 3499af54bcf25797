"""The ranks of an MPI launch, for tools that divide their work among ranks."""

from __future__ import annotations

from typing import Any

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launch import known_launch, note_launched
from megdet_hpc.parallel.launchers import Launch
from megdet_hpc.parallel.libraries import LibraryError, import_mpi


def ranks_launch(program: str) -> Launch | None:
    """The launcher of several ranks; None if this process works alone.

    Args:
        program: file name of the program.

    Raises:
        UserError: a launcher started this process that the program cannot use, torchrun among them: it has no MPI.
    """
    launch = known_launch()
    if launch is None or launch.size == 1:
        return None
    if launch.starts == "torch":
        raise UserError(
            f"{launch.launcher} started {launch.size} ranks without MPI, over which {program} shares its work out; run "
            f"one process with --workers, or on several nodes mpirun -np N python data_prep/{program}.py"
        )
    return launch


def join_world(launch: Launch) -> Any:
    """mpi4py's COMM_WORLD, after a check that it has all ranks of the launcher. Starts MPI.

    Raises:
        UserError: no mpi4py, or one built for another MPI, which would see one rank in each process.
    """
    try:
        MPI = import_mpi()
    except LibraryError as error:
        num_ranks, reason = 0, str(error)
    else:
        num_ranks = MPI.COMM_WORLD.Get_size()
        reason = f"mpi4py, built for another MPI, sees {num_ranks}"
    if num_ranks != launch.size:
        raise UserError(
            f"{launch.launcher} started {launch.size} ranks, but {reason}; "
            "install mpi4py for this MPI, or run one process with --workers"
        )
    note_launched()
    return MPI.COMM_WORLD
