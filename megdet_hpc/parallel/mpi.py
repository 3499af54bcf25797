"""mpi4py: the objects of every transport, and the tensors of the default one on CPUs.

Importing mpi4py starts MPI, so it is imported inside functions, which run under a launcher only.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.host_stage import HostStage

# Open MPI's run-time switch: its answer to MPIX_Query_cuda_support may tell of the build alone.
_CUDA_SWITCH = "OMPI_MCA_opal_cuda_support"


def mpi_reads_gpu_memory() -> bool | None:
    """Whether the loaded MPI takes addresses in GPU memory. Not a collective; ranks may differ.

    Open MPI's own answer (its extension MPIX_Query_cuda_support, which other MPIs copied); False where MPI lacks
    the question or CUDA support is switched off, since a wrong yes ends in a segmentation fault. None where it cannot
    be asked yet.
    """
    from mpi4py import MPI

    runs = MPI.Is_initialized() and not MPI.Is_finalized()
    return _query_gpu_support() if may_ask_of_gpu(MPI.Get_library_version(), runs) else None


def may_ask_of_gpu(library: str, runs: bool) -> bool:
    """Whether an MPI can be asked MPIX_Query_cuda_support: others than Open MPI end the process that asks too early.

    Args:
        library: the MPI's own version text.
        runs: between MPI_Init and MPI_Finalize.
    """
    return runs or library.startswith("Open MPI")


@functools.cache
def _query_gpu_support() -> bool:
    from mpi4py import MPI

    if os.environ.get(_CUDA_SWITCH, "1").lower() not in ("1", "true", "yes", "t", "y"):
        return False
    # a symbol looked up in a library is searched in those it is linked to as well, here libmpi
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and query() == 1


def abort_mpi(status: int = 1) -> None:
    """End every process of the job with this status, if MPI was started. Not a collective; does not return then."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.COMM_WORLD.Abort(status)


class MpiCommunicator(Communicator):
    """An mpi4py communicator: every method blocks; messages match by order, so the names only document.

    A CPU tensor is sent from its own memory. So is a GPU tensor where MPI reads GPU memory; elsewhere it goes
    through a page-locked buffer. In both cases the host waits for the stream that computes it.
    """

    transport = "mpi"

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        self._comm = comm
        self._in_place = MPI.IN_PLACE
        self._types = {
            torch.float32: MPI.FLOAT,
            torch.float64: MPI.DOUBLE,
            torch.int32: MPI.INT32_T,
            torch.int64: MPI.INT64_T,
        }
        self._view = MPI.buffer.fromaddress
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._stage = HostStage()

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        if self.size == 1:
            return
        if not tensor.is_cuda:
            # address and type spelled out: a third of the time of going through numpy, on messages of microseconds
            assert tensor.is_contiguous(), f"message {name} is not contiguous"
            memory = self._view(tensor.data_ptr(), tensor.nbytes)
            self._comm.Allreduce(self._in_place, (memory, self._types[tensor.dtype]))
            return
        own = tensor.detach()
        if mpi_reads_gpu_memory():
            torch.cuda.current_stream(own.device).synchronize()
            self._comm.Allreduce(self._in_place, own)
        else:
            host = self._stage.room(own.shape, own)
            self._stage.fetch(own, host)
            self._comm.Allreduce(self._in_place, host.numpy())
            self._stage.send(host, own)

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        own = tensor.detach()
        gathered = own.new_empty((self.size, *own.shape))
        if not own.is_cuda:
            self._comm.Allgather(own.numpy(), gathered.numpy())
        elif mpi_reads_gpu_memory():
            torch.cuda.current_stream(own.device).synchronize()
            self._comm.Allgather(own, gathered)
        else:
            host = self._stage.room(gathered.shape, own)
            self._stage.fetch(own, host[self.rank])
            self._comm.Allgather(self._in_place, host.numpy())
            self._stage.send(host, gathered)
        return gathered

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


@dataclass(frozen=True)
class LibraryGroups:
    """The groups that a tensor library has made in this job, by their members' ranks in the world, ascending."""

    world: Any
    """mpi4py communicator of all ranks."""
    new: Callable[[list[int]], Any]
    """Makes a group; every rank of the world calls it for every group, members or not, in the same order."""
    made: dict[tuple[int, ...], Any]


class LibraryCommunicator(MpiCommunicator):
    """Objects over MPI, tensors over a library with groups of its own: a subclass adds the two tensor methods."""

    def __init__(self, comm: Any, groups: LibraryGroups, members: tuple[int, ...]) -> None:
        super().__init__(comm)
        self._groups = groups
        # a group of one sends nothing and has none
        self._group: Any = groups.made.get(members)

    def split(self, color: int, *, name: str) -> Communicator:
        comm = self._comm.Split(color, self.rank)
        members = tuple(comm.allgather(self._groups.world.Get_rank()))
        for ranks in sorted(set(self._groups.world.allgather(members))):
            if len(ranks) > 1 and ranks not in self._groups.made:
                self._groups.made[ranks] = self._groups.new(list(ranks))
        return type(self)(comm, self._groups, members)
