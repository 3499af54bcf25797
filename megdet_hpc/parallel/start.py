"""Joining the launcher's world and leaving it, and how a failing rank ends the job.

`started()` is entered once by each entry point. It is the only place that decides between one process and
many, so nothing else asks which launcher there was.
"""

from __future__ import annotations

import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from megdet_hpc.errors import UserError
from megdet_hpc.interrupts import EXIT_INTERRUPTED, say_interrupted
from megdet_hpc.parallel.launch import (
    FILL_NODES,
    find_launch,
    idle_nodes,
    is_first_process,
    known_launch,
    note_launched,
    note_status,
)
from megdet_hpc.parallel.mpi import abort_mpi
from megdet_hpc.parallel.runtime import Runtime, device_type
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.transports import horovod_cycle_ms
from megdet_hpc.programs import as_called_here

# Long enough for rank 0 to print a failure that all ranks share and to end the job before they repeat it: 0.3 s by
# MPI's abort, 1 to 2 s where MPI never started and the launcher waits for Python's exit.
_OTHERS_WAIT_SECONDS = 3.0


def _start(transport: str, device: str, deterministic: bool) -> Runtime:
    try:
        launch = known_launch()
    except UserError as error:
        if is_first_process():
            raise
        raise SystemExit(error.status) from None  # the first says it for all, who are no world of ours
    if launch is None:
        return Runtime(SerialCommunicator())
    from megdet_hpc.parallel.horovod import start_horovod

    return start_horovod(launch, horovod_cycle_ms(transport, device_type(device)), fuse=not deterministic)


def _report(error: BaseException, runtime: Runtime | None) -> None:
    """Print why this rank fails: one line where the user can mend it, else the traceback."""
    world = runtime.world if runtime else None
    if not (world.rank == 0 if world else is_first_process()):
        time.sleep(_OTHERS_WAIT_SECONDS)
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
def started(transport: str = "auto", device: str = "auto", *, deterministic: bool = False) -> Iterator[Runtime]:
    """Join the launcher's world, or be the only process; leave it in order, or end the whole job.

    A rank that raises prints its traceback and aborts the MPI job, since its peers would otherwise wait for it
    in their next collective for ever.

    Args:
        transport: of the normalization layers' messages, if it is known already; Horovod's cycle suits it.
        device: auto, cpu or cuda, likewise.
        deterministic: gradients travel one by one, since which ones Horovod joins into a message depends on time.

    Raises:
        SystemExit: after an error has been printed, with the status of a UserError, which is 2 where the user can mend
            it, else 1.
    """
    runtime: Runtime | None = None
    try:
        runtime = _start(transport, device, deterministic)
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
            # MPI may run already, and its orderly end would wait for ranks that did start
            abort_mpi(status)
        raise SystemExit(status) from None
    else:
        runtime.finish()
