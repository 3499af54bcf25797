"""Run under mpirun: the last rank fails in the way it is told while the others wait in a collective."""

from __future__ import annotations

import sys

import torch

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.start import started

if __name__ == "__main__":
    with started() as runtime:
        if runtime.world.rank == runtime.world.size - 1:
            if sys.argv[1] == "raise":
                raise RuntimeError("this rank breaks")
            if sys.argv[1] == "user":
                raise UserError("this value is wrong")
            if sys.argv[1] == "exit":
                sys.exit(7)
        runtime.world.allreduce_sum_(torch.zeros(1), name="never complete")
        runtime.world.allreduce_sum_(torch.zeros(1), name="never complete")
