"""Run under mpirun: rank 1 works longer than the others, which wait for it; each rank prints what its clock says."""

from __future__ import annotations

import time

import torch

from megdet_hpc.engine.step_clock import StepClock
from megdet_hpc.parallel.start import started

if __name__ == "__main__":
    with started() as runtime:
        world, clock = runtime.world, StepClock(hears=True)
        world.barrier(name="begin")
        clock.restart()
        for step in range(4):
            with clock.step():
                time.sleep(0.3 if world.rank == 1 else 0.02)
                world.allreduce_sum_(torch.ones(3), name="losses")
            with clock.pause():
                # what happens beside the steps counts for nothing
                time.sleep(0.5 if world.rank == 0 and step == 0 else 0)
                world.allreduce_sum_(torch.ones(3), name="running_statistics")
        speeds = clock.speeds(world, global_batch=4)
        times = f"{speeds['own_max_s']:.3f} {speeds['own_mean_s']:.3f} {speeds['step_max_s']:.3f}"
        # in one piece, also with PYTHONUNBUFFERED
        print(f"{speeds['slowest_rank']} {times}\n", end="", flush=True)
