"""Run under mpirun: rank 0 works alone for longer than the watchdog's limit, or stops in the middle of it.

Arguments: folder of the watchdog; what happens.
  long     the work takes four times the limit, then all ranks go on
  frozen   rank 0's host stops while it works
  lost     the work is done, and rank 1 never comes for the next step
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from megdet_hpc.engine.watchdog import Watchdog
from megdet_hpc.parallel.start import started

LIMIT = 0.05  # minutes

if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]

    def work() -> str:
        if what == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(4 * 60 * LIMIT if what == "long" else 0.1)
        return "scored"

    with started() as runtime:
        watchdog = Watchdog(LIMIT, folder, runtime.world, runtime.abort)
        watchdog.tick(4)
        answer = watchdog.alone(work, name="metrics")
        while what == "lost" and runtime.world.rank == 1:
            time.sleep(0.1)
        total = torch.ones(1)
        runtime.world.allreduce_sum_(total, name="layer3.bn")
        watchdog.close()
        print(f"rank {runtime.world.rank}: {answer}, {int(total)} ranks went on\n", end="", flush=True)
