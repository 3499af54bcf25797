"""Ranks with neither MPI nor Horovod: objects go over gloo, tensors over torch.distributed.

torchrun starts such ranks. So does any launcher of `launchers.py` where there is no mpi4py.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megdet_hpc.devices import is_gpu
from megdet_hpc.errors import MachineError, UserError
from megdet_hpc.parallel.launchers import TORCHRUN, Launch
from megdet_hpc.parallel.meeting import meeting_place
from megdet_hpc.parallel.mpi import LibraryGroups
from megdet_hpc.parallel.mpi_runtime import PlainRuntime
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.torch_distributed import CONNECT_TIMEOUT, MESSAGE_TIMEOUT, TorchCommunicator
from megdet_hpc.parallel.transports import resolve_transport


class StoreComm:
    """A group of ranks over gloo, with the names of mpi4py's methods for objects. Every method blocks.

    Args:
        group: gloo's group; None for a group of one rank.
        members: ranks of the world in the group, in rising order.
        world: group of all ranks; None where this is it.
    """

    def __init__(self, group: Any, members: tuple[int, ...], world: StoreComm | None = None) -> None:
        self._group, self._members, self._world = group, members, world or self
        self._rank = members.index(dist.get_rank())
        self._made: dict[tuple[int, ...], Any] = {members: group} if world is None else world._made

    def Get_rank(self) -> int:
        return self._rank

    def Get_size(self) -> int:
        return len(self._members)

    def allgather(self, value: Any) -> list[Any]:
        values = [value] * len(self._members)
        if len(values) > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def gather(self, value: Any) -> list[Any] | None:
        if len(self._members) == 1:
            return [value]
        values = [None] * len(self._members) if self._rank == 0 else None
        dist.gather_object(value, values, dst=self._members[0], group=self._group)
        return values

    def bcast(self, value: Any) -> Any:
        row = [value]
        if len(self._members) > 1:
            dist.broadcast_object_list(row, src=self._members[0], group=self._group)
        return row[0]

    def Barrier(self) -> None:
        if len(self._members) > 1:
            dist.barrier(group=self._group)

    def Split(self, color: int, _: int) -> StoreComm:
        """The group of the ranks of one color. Every rank of the world calls it."""
        colors = self.allgather(color)
        members = tuple(rank for rank, other in zip(self._members, colors, strict=True) if other == color)
        for ranks in sorted(set(self._world.allgather(members))):
            if len(ranks) > 1 and ranks not in self._made:
                self._made[ranks] = dist.new_group(list(ranks), timeout=MESSAGE_TIMEOUT, backend="gloo")
        return StoreComm(self._made.get(members), members, self._world)


class HostCommunicator(TorchCommunicator):
    """The world over gloo. Tensors of a GPU go through host memory, and every method blocks."""

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        host = tensor.detach().cpu()
        super().allreduce_sum_(host, name=name)
        if is_gpu(tensor.device):
            tensor.detach().copy_(host)

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        return super().allgather_tensor(tensor.cpu(), name=name).to(tensor.device)


@dataclass
class TorchRuntime(PlainRuntime):
    """A process among many, without MPI."""

    @property
    def transports(self) -> tuple[str, ...]:
        return ("torch",)

    def resolve(self, transport: str, device_type: str) -> str:
        resolved = "torch" if transport == "auto" else resolve_transport(transport, device_type)
        if resolved == "mpi":
            raise UserError(
                "norm.transport is 'mpi', but this run has no MPI (torchrun, or mpi4py is not installed); accepted "
                "here: auto, torch"
            )
        return resolved

    def abort(self, status: int = 1) -> None:
        """End this process at once. The launcher ends the others."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start_torch(launch: Launch, gradients: str) -> Runtime:
    """Join the ranks of a launcher without MPI. Collective of the world; blocks.

    Args:
        launch: the launcher and its ranks, more than one.
        gradients: value of solver.gradients.

    Raises:
        UserError: the value needs MPI, torch lacks gloo, or nothing tells where rank 0 is.
        MachineError: the ranks do not reach each other.
    """
    if gradients not in ("auto", "torch"):
        raise UserError(
            f"solver.gradients is {gradients!r}, which {launch.launcher} cannot start; accepted here: auto, torch"
        )
    if not dist.is_available() or not dist.is_backend_available("gloo"):
        raise UserError(f"{launch.launcher} started {launch.size} rank(s), but this torch lacks gloo")
    try:
        if launch.launcher == TORCHRUN:
            dist.init_process_group("gloo", timeout=CONNECT_TIMEOUT)
        else:
            address, port = meeting_place(launch)
            place = f"tcp://{address}:{port}"
            dist.init_process_group("gloo", place, CONNECT_TIMEOUT, launch.size, launch.rank)
        objects = dist.new_group(timeout=MESSAGE_TIMEOUT, backend="gloo")
        tensors = dist.new_group(timeout=MESSAGE_TIMEOUT, backend="gloo")
    except (RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise MachineError(
            f"{launch.launcher} started {launch.size} rank(s), which do not reach each other: {first}; set "
            "GLOO_SOCKET_IFNAME to the network interface that the nodes share"
        ) from error
    everyone = tuple(range(launch.size))
    comm = StoreComm(objects, everyone)
    new = functools.partial(dist.new_group, timeout=MESSAGE_TIMEOUT, backend="gloo")
    hosts = comm.allgather(socket.gethostname())
    here = [rank for rank, host in enumerate(hosts) if host == hosts[launch.rank]]
    return TorchRuntime(
        HostCommunicator(comm, LibraryGroups(comm, new, {everyone: tensors}), everyone),
        here.index(launch.rank) if launch.local_rank is None else launch.local_rank,
        launch.local_size or len(here),
        f"{launch.size} rank(s) on {len(set(hosts))} host(s), torch.distributed without MPI, started by "
        f"{launch.launcher}; {launch.place}",
        num_hosts=len(set(hosts)),
        carrier="torch.distributed",
        comm=comm,
    )
