"""Run under mpirun: something stands still while rank 0 sends gradients, and rank 0 must end all the same.

Arguments: a folder, and what stands still: `rank` 1; rank 1 of a job that makes `groups` over Horovod; the `launcher`
as rank 0 aborts, which needs no Horovod. Under Hydra it is the proxy, whose children the ranks are.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import torch

from megdet_hpc.engine import watchdog
from megdet_hpc.parallel import mpi
from megdet_hpc.parallel.start import started


def wait_until_stopped(pid: Path) -> None:
    """Wait until the process whose number the file holds stands still: on a busy host that takes its time."""
    while not pid.exists() or psutil.Process(int(pid.read_text() or os.getpid())).status() != psutil.STATUS_STOPPED:
        time.sleep(0.02)


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    watchdog._BACKSTOP_SECONDS, mpi._ABORT_SECONDS = 15.0, 2.0
    with started("horovod" if what == "groups" else "auto") as runtime:
        if what == "launcher":
            runtime.world.barrier(name="begin")
            if runtime.world.rank == 1:
                time.sleep(60)
            (folder / "parent").write_text(str(os.getppid()))
            (folder / "pid").write_text(str(os.getpid()))
            os.kill(os.getppid(), signal.SIGSTOP)
            runtime.abort()
        import horovod.torch as hvd

        dog = watchdog.Watchdog(0.05, folder, runtime.world, runtime.abort, held=runtime.holds_interpreter)
        hvd.allreduce(torch.ones(1), name="first")
        runtime.world.barrier(name="begin")
        if runtime.world.rank == 1:
            (folder / f"{what}.other").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)
        wait_until_stopped(folder / f"{what}.other")
        time.sleep(1.5)  # Horovod's thread waits for rank 1 now
        dog.tick(4)
        hvd.synchronize(hvd.allreduce_async_(torch.ones(1), name="gradient"))
