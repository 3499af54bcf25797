"""The start and the end of a process in the launcher's world, and the way in which a failing rank ends the job.

Each entry point enters `started()` once. It is the only place that decides between one process and many, so nothing
else asks which launcher there was.
"""

from __future__ import annotations

import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from megdet_hpc.errors import UserError
from megdet_hpc.interrupts import EXIT_INTERRUPTED, say_interrupted
from megdet_hpc.parallel.cores import yield_if_crowded
from megdet_hpc.parallel.launch import (
    FILL_NODES,
    find_launch,
    idle_nodes,
    is_first_process,
    known_launch,
    note_launched,
    note_status,
    speaks_for_all,
)
from megdet_hpc.parallel.libraries import installed
from megdet_hpc.parallel.mpi import abort_mpi
from megdet_hpc.parallel.runtime import Runtime, device_type
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.transports import horovod_cycle_ms
from megdet_hpc.programs import as_called_here

# Time in which rank 0 can print a failure that all ranks share, and end the job, before they repeat it. MPI's abort
# takes 0.3 s. Where MPI never started, the launcher waits 1 to 2 s for Python's exit.
_OTHERS_WAIT_SECONDS = 3.0


def _start(transport: str, device: str, deterministic: bool, gradients: str) -> Runtime:
    try:
        launch = known_launch()
    except UserError as error:
        if speaks_for_all():
            raise
        raise SystemExit(error.status) from None  # the first process has printed the error for all
    without_mpi = launch is not None and (launch.starts == "torch" or (launch.starts == "mpi" and _no_mpi(gradients)))
    if launch is None or (without_mpi and launch.size == 1):
        return Runtime(SerialCommunicator())
    if without_mpi:
        from megdet_hpc.parallel.torchrun import start_torch

        return start_torch(launch, gradients)
    if launch.starts == "mpi" and _without_horovod(gradients):
        from megdet_hpc.parallel.mpi_runtime import start_mpi

        yield_if_crowded(launch, polls=1)
        return start_mpi(launch, "mpi" if gradients == "mpi" else "torch")
    from megdet_hpc.parallel.horovod import start_horovod

    yield_if_crowded(launch, polls=2)  # the rank and Horovod's thread
    cycle = horovod_cycle_ms(transport, device_type(device))
    return start_horovod(launch, cycle, fuse=not deterministic, groups=transport == "horovod")


def _no_mpi(gradients: str) -> bool:
    """Whether ranks of a launcher of MPI meet without it: mpi4py is not installed, and nothing else asks for MPI."""
    return gradients != "mpi" and _without_horovod(gradients) and not installed("mpi4py")


def _without_horovod(gradients: str) -> bool:
    """Whether something other than Horovod carries the gradients of ranks that MPI started."""
    return gradients in ("mpi", "torch") or (gradients == "auto" and not installed("horovod"))


def _report(error: BaseException, runtime: Runtime | None) -> None:
    """Print why this rank fails: one line if the user can correct it, else the traceback."""
    world = runtime.world if runtime else None
    if not (world.rank == 0 if world else is_first_process()):
        time.sleep(_OTHERS_WAIT_SECONDS)
    launch = None
    with suppress(UserError):
        launch = find_launch()
    rank, size = (world.rank, world.size) if world else (launch.rank, launch.size) if launch else (0, 1)
    where = f"rank {rank} of {size} on {socket.gethostname()}: " if size > 1 else ""
    sys.stdout.flush()
    if isinstance(error, UserError):
        sys.stderr.write(f"megdet_hpc: {where}error: {as_called_here(str(error))}\n")
    else:
        heading = f"megdet_hpc: {where}failed\n" if where else ""
        sys.stderr.write(heading + "".join(traceback.format_exception(error)))
    sys.stderr.flush()


@contextmanager
def started(
    transport: str = "auto",
    device: str = "auto",
    *,
    deterministic: bool = False,
    gradients: str = "auto",
) -> Iterator[Runtime]:
    """Join the launcher's world, or be the only process. The block ends in order, or with the whole job.

    A rank that raises prints its traceback and aborts the MPI job, since its peers would otherwise wait for it in their
    next collective for ever.

    Args:
        transport: transport of the normalization layers' messages if it is known already, else auto. It decides
            Horovod's cycle, and horovod lets groups be made over it.
        device: auto, cpu, cuda or xpu. It decides Horovod's cycle too.
        deterministic: send gradients one by one, since time decides which ones Horovod joins into a message.
        gradients: library that averages them, a value of solver.gradients.

    Raises:
        SystemExit: an error has been printed; the status is that of a UserError (2 if the user can mend it), else 1.
    """
    runtime: Runtime | None = None
    try:
        runtime = _start(transport, device, deterministic, gradients)
        note_launched()
        if runtime.world.rank == 0 and (idle := idle_nodes(runtime.num_hosts)):
            sys.stderr.write(f"megdet_hpc: warning: {idle}; {FILL_NODES}\n")
        yield runtime
    except SystemExit as exit_:
        if exit_.code not in (None, 0) and runtime:
            runtime.abort(exit_.code if isinstance(exit_.code, int) else 1)
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            say_interrupted()
            status = EXIT_INTERRUPTED
        else:
            _report(error, runtime)
            status = error.status if isinstance(error, UserError) else 1
        note_status(status)
        if runtime:
            runtime.abort(status)
        else:
            # MPI may run already; its orderly end would wait for ranks that have started
            abort_mpi(status)
        raise SystemExit(status) from None
    else:
        runtime.finish()
