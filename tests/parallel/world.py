"""Run under mpirun: the bodies of tests/bodies.py on the MPI world, then on split groups of it."""

from __future__ import annotations

import torch

from megdet_hpc.parallel.runtime import started
from tests import bodies

if __name__ == "__main__":
    with started() as runtime:
        world = runtime.world
        assert world.transport == "mpi"
        bodies.check_all(world)
        half = world.split(int(world.rank >= world.size // 2), name="halves")
        bodies.check_cgbn(half, torch.float64, 1e-12)
        world.barrier(name="done")
        print(f"rank {world.rank} of {world.size} passed", flush=True)
