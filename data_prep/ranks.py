"""The ranks of an MPI launch, for tools that share their work among them."""

from __future__ import annotations

from typing import Any

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launch import Launch, note_launched
from megdet_hpc.parallel.libraries import LibraryError, import_mpi


def join_world(launch: Launch) -> Any:
    """mpi4py's COMM_WORLD, once it is sure to hold the ranks that the launcher started. Starts MPI.

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
