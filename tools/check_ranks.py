"""Check that Horovod and mpi4py see the same world: python check_ranks.py RANKS, under mpirun or alone.

The set-up runs it. It is the first program to run where a job hangs, since it needs nothing else of the project.
"""

from __future__ import annotations

import sys

# Importing mpi4py.MPI starts MPI, and the library that starts MPI ends it. This import must come before hvd.init():
# otherwise Horovod ends MPI on every rank when the first rank leaves, and a later MPI call of a slower rank crashes.
try:
    from mpi4py import MPI  # isort: skip
    import horovod.torch as hvd
    import torch
except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: mpi4py without an MPI
    sys.exit(f"mpi4py or Horovod cannot be used ({str(error).splitlines()[0]}); run tools/setup_env.sh")
if not hasattr(hvd, "init"):
    sys.exit("Horovod was built without its part for PyTorch; run tools/setup_env.sh")


def main() -> None:
    """Compare the world sizes and sum the ranks through both libraries.

    Raises:
        SystemExit: a size differs from the one given, or a sum is wrong.
    """
    expected = int(sys.argv[1])
    hvd.init()
    world = MPI.COMM_WORLD
    found = {"Horovod": hvd.size(), "mpi4py": world.Get_size()}
    if set(found.values()) != {expected}:
        sys.exit(
            f"expected {expected} ranks, found {found}: Horovod and mpi4py must be built against the MPI "
            "whose mpirun starts them; run tools/setup_env.sh again with that MPI on PATH"
        )
    rank_sum = expected * (expected - 1) // 2
    through_horovod = hvd.allreduce(torch.tensor([float(hvd.rank())]), op=hvd.Sum, name="check_ranks").item()
    through_mpi = world.allreduce(world.Get_rank())
    if (through_horovod, through_mpi) != (rank_sum, rank_sum):
        sys.exit(f"sum of the ranks: Horovod {through_horovod}, mpi4py {through_mpi}, expected {rank_sum}")
    if hvd.rank() == 0:
        print(
            f"{expected} ranks, sums right, MPI threads: {hvd.mpi_threads_supported()}, "
            f"NCCL: {bool(hvd.nccl_built())}, {MPI.Get_library_version().splitlines()[0]}"
        )
    hvd.shutdown()


if __name__ == "__main__":
    main()
