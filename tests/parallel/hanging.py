"""Run under mpirun: rank 1 never enters the collective that the others wait in, and the watchdog says so."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from megdet_hpc.engine.watchdog import Watchdog
from megdet_hpc.parallel.start import started


def lose_the_way() -> None:
    while True:
        time.sleep(0.1)


if __name__ == "__main__":
    with started() as runtime:
        watchdog = Watchdog(0.05, Path(sys.argv[1]), runtime.world, runtime.abort)
        watchdog.tick(4)
        if runtime.world.rank == 1:
            lose_the_way()
        runtime.world.allreduce_sum_(torch.zeros(1), name="layer3.bn")
