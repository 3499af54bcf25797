"""Ranks under MPI whose gradients go over mpi4py or torch.distributed. Horovod is neither imported nor needed."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.buckets import BucketOptimizer, Send
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.cores import named_threads
from megdet_hpc.parallel.launchers import Launch
from megdet_hpc.parallel.libraries import LibraryError, import_mpi, mpi_version
from megdet_hpc.parallel.mpi import MpiCommunicator, abort_mpi
from megdet_hpc.parallel.runtime import Runtime, SynchronizedOptimizer
from megdet_hpc.parallel.torch_distributed import close_torch, torch_communicator
from megdet_hpc.parallel.transports import BUCKET_BYTES


def _nothing() -> None:
    pass


def over_mpi(world: MpiCommunicator) -> Send:
    """The function that sums a buffer over MPI before it returns."""

    def send(buffer: Tensor, name: str) -> Callable[[], object]:
        if buffer.dtype == torch.float16:
            world.allreduce_half_(buffer, name=name)
        else:
            world.allreduce_sum_(buffer, name=name)
        return _nothing

    return send


@dataclass
class PlainRuntime(Runtime):
    """A process among many without Horovod. `comm` carries objects, and with it the libraries make their groups."""

    comm: Any = None
    """Communicator of all ranks, mpi4py's or one with its methods for objects."""
    gradients: str = "torch"
    """mpi or torch."""
    _made: dict[tuple[str, str], Communicator] = field(default_factory=dict)

    @property
    def transports(self) -> tuple[str, ...]:
        return ("mpi", "torch")

    def communicator(self, transport: str, device: torch.device) -> Communicator:
        if self.shares_gpu:
            return self._through_host(transport)
        resolved = self.resolve(transport, device.type)
        if self.world.size == 1 or resolved == self.world.transport == "mpi":
            return self.world
        if resolved == "horovod":
            raise UserError(
                "norm.transport is 'horovod', which this run does not start (solver.gradients, or no Horovod is "
                "installed); accepted here: auto, mpi, torch"
            )
        key = (resolved, device.type)
        if key not in self._made:
            self._made[key] = torch_communicator(self.comm, device)
        return self._made[key]

    @property
    def may_overlap(self) -> bool:
        return self.gradients == "torch"

    @property
    def gradients_over_nccl(self) -> bool:
        return self.gradients == "torch"

    def distribute(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        accumulate: int,
        *,
        compression: str = "none",
        overlap: bool = True,
    ) -> SynchronizedOptimizer:
        if self.world.size == 1:
            return SynchronizedOptimizer(optimizer)
        make = functools.partial(BucketOptimizer, optimizer, model, accumulate, compression, size=self.world.size)
        if self.gradients == "mpi":
            assert isinstance(self.world, MpiCommunicator)
            return make(overlap=False, send=over_mpi(self.world))
        # a group of its own: the layers' messages would come in between in another order on each rank
        device = next(model.parameters()).device
        group = torch_communicator(
            self.comm,
            device,
            "solver.gradients torch",
            "--solver.gradients mpi or horovod",
            backend="gloo" if self.shares_gpu else None,
        )
        return make(overlap=overlap, send=group.start_sum, most_bytes=BUCKET_BYTES)

    def broadcast_model(self, model: nn.Module) -> None:
        if self.world.size == 1:
            return
        for path, tensor in model.state_dict().items():
            value = self.world.broadcast_object(tensor.cpu() if self.world.rank == 0 else None, name=path)
            tensor.copy_(value)

    def abort(self, status: int = 1) -> None:
        abort_mpi(status)

    def finish(self) -> None:
        self.world.barrier(name="finish")
        close_torch()


def contradiction(launch: Launch, comm: Any) -> str:
    """What the launcher and MPI say differently about this rank; "" if they agree. Not a collective.

    Args:
        launch: the launcher and its ranks.
        comm: mpi4py's COMM_WORLD.
    """
    size, rank = comm.Get_size(), comm.Get_rank()
    if size != launch.size:
        return (
            f"{launch.launcher} started {launch.size} rank(s), but mpi4py sees {size}: mpi4py must be built against "
            f"the MPI whose launcher starts the job, {launch.place}"
        )
    if rank != launch.rank:
        return f"{launch.launcher} says {launch.place}, but mpi4py sees rank {rank} of {size}"
    return ""


def start_mpi(launch: Launch, gradients: str) -> Runtime:
    """Start MPI and check that it sees the launcher's world. Collective of the world; blocks.

    Args:
        launch: the launcher and its ranks.
        gradients: library that averages gradients, mpi or torch.

    Raises:
        UserError: mpi4py is missing or broken, or was built for another MPI.
    """
    started = f"{launch.launcher} started {launch.size} rank(s)"
    install = "run tools/setup_env.sh in a checkout (make setup), or start one process with plain python"
    try:
        with named_threads("mpi"):
            MPI = import_mpi()
    except LibraryError as error:
        raise UserError(f"{started}, but {error}; {install}") from error
    comm = MPI.COMM_WORLD
    if fault := contradiction(launch, comm):
        raise UserError(f"{fault} ({mpi_version(MPI.Get_library_version())} is loaded); {install}")
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    hosts = len(set(comm.allgather(socket.gethostname())))
    carrier = "mpi4py" if gradients == "mpi" else "torch.distributed"
    return PlainRuntime(
        MpiCommunicator(comm),
        node.Get_rank(),
        node.Get_size(),
        f"{launch.size} rank(s) on {hosts} host(s), MPI without Horovod, started by {launch.launcher}; {launch.place}",
        num_hosts=hosts,
        carrier=carrier,
        comm=comm,
        gradients=gradients,
    )
