"""Horovod and mpi4py: the only module that imports them.

Gradients go through Horovod, which fuses them and overlaps them with the backward pass; the small blocking sums
of the normalization layers go through mpi4py on the tensor's own memory, which has no cycle to wait for.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

import torch
from torch import Tensor, nn

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.launch import Launch
from megdet_hpc.parallel.runtime import Runtime, SynchronizedOptimizer

_INSTALL = "run tools/setup_env.sh (make setup), or start one process with plain python"


class MpiCommunicator(Communicator):
    """An mpi4py communicator. Messages match by order, so the names only document."""

    transport = "mpi"

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        from mpi4py import MPI

        if self.size == 1:
            return
        # MPI reads host memory: a GPU tensor travels through a copy, which also waits for the kernels that made it
        host = tensor.detach().cpu()
        self._comm.Allreduce(MPI.IN_PLACE, host.numpy())
        if host.data_ptr() != tensor.data_ptr():
            tensor.copy_(host)

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        host = tensor.detach().cpu()
        gathered = torch.empty((self.size, *host.shape), dtype=host.dtype)
        self._comm.Allgather(host.numpy(), gathered.numpy())
        return gathered.to(tensor.device)

    def allgather_object(self, value: Any, *, name: str) -> list[Any]:
        values: list[Any] = self._comm.allgather(value)
        return values

    def gather_object(self, value: Any, *, name: str) -> list[Any] | None:
        values: list[Any] | None = self._comm.gather(value)
        return values

    def broadcast_object(self, value: Any, *, name: str) -> Any:
        return self._comm.bcast(value)

    def barrier(self, *, name: str) -> None:
        self._comm.Barrier()

    def split(self, color: int, *, name: str) -> Communicator:
        return MpiCommunicator(self._comm.Split(color, self.rank))


class HorovodOptimizer(SynchronizedOptimizer):
    """Gradients averaged by hvd.DistributedOptimizer, one named allreduce per parameter."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, accumulate: int) -> None:
        import horovod.torch as hvd

        super().__init__(
            hvd.DistributedOptimizer(
                optimizer,
                named_parameters=[(name, p) for name, p in model.named_parameters() if p.requires_grad],
                backward_passes_per_step=accumulate,
            )
        )

    def synchronize(self) -> None:
        self.optimizer.synchronize()  # type: ignore[attr-defined]

    def step(self) -> None:
        with self.optimizer.skip_synchronize():  # type: ignore[attr-defined]
            self.optimizer.step()


class HorovodRuntime(Runtime):
    """Many processes under mpirun, horovodrun or srun."""

    def distribute(self, optimizer: torch.optim.Optimizer, model: nn.Module, accumulate: int) -> SynchronizedOptimizer:
        return HorovodOptimizer(optimizer, model, accumulate)

    def broadcast_model(self, model: nn.Module) -> None:
        import horovod.torch as hvd

        # state_dict() also holds non-float counters, which Horovod broadcasts like any tensor
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    def abort(self) -> None:
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)

    def finish(self) -> None:
        import horovod.torch as hvd

        self.world.barrier(name="finish")
        hvd.shutdown()


def start_horovod(launch: Launch) -> Runtime:
    """Start MPI and Horovod and check that both see the launcher's world. Collective of the world; blocks.

    Raises:
        UserError: Horovod or mpi4py is missing, was built for another MPI, or lacks MPI or its threads.
    """
    try:
        # mpi4py first: whoever initializes MPI finalizes it, and Horovod would do so while slower ranks still use it
        from mpi4py import MPI  # isort: skip
        import horovod.torch as hvd
    except ImportError as error:
        raise UserError(
            f"{launch.launcher} started {launch.size} rank(s), but {error.name or 'a library'} is missing or broken "
            f"({error}); {_INSTALL}"
        ) from error
    hvd.init()
    world = MPI.COMM_WORLD
    problem = None
    if not hvd.mpi_built() or world.Get_size() != launch.size:
        problem = (
            f"{launch.launcher} started {launch.size} rank(s), but mpi4py sees {world.Get_size()}: Horovod and mpi4py "
            f"must be built against the MPI whose mpirun starts the job ({MPI.Get_library_version().split(',')[0]} "
            f"is loaded)"
        )
    elif hvd.size() != world.Get_size() or hvd.rank() != world.Get_rank():
        problem = f"Horovod sees rank {hvd.rank()} of {hvd.size()}, mpi4py {world.Get_rank()} of {world.Get_size()}"
    elif not hvd.mpi_threads_supported():
        problem = "this MPI does not support MPI_THREAD_MULTIPLE, which mpi4py beside Horovod needs"
    if problem:
        sys.stderr.write(f"megdet_hpc: error: {problem}; {_INSTALL}\n")
        sys.stderr.flush()
        world.Abort(1)
    runtime = HorovodRuntime(MpiCommunicator(world), hvd.local_rank(), hvd.local_size())
    hosts = len(set(world.allgather(socket.gethostname())))
    runtime.description = f"{hvd.size()} rank(s) on {hosts} host(s), Horovod over MPI, started by {launch.launcher}"
    return runtime
