"""mpi4py: it carries objects in every transport, and tensors in the default transport of CPUs.

Importing mpi4py starts MPI, so it is imported inside functions, which run under a launcher only.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megdet_hpc.devices import is_gpu, stream_of
from megdet_hpc.parallel.communicator import MESSAGES, Communicator
from megdet_hpc.parallel.host_stage import HostStage

# Open MPI's run-time switch. Its answer to MPIX_Query_cuda_support may be about the build alone.
_CUDA_SWITCH = "OMPI_MCA_opal_cuda_support"
# Time that MPI_Abort has to end the job [seconds].
_ABORT_SECONDS = 30.0


def mpi_reads_gpu_memory() -> bool | None:
    """Whether the loaded MPI takes addresses in GPU memory. Not a collective; ranks may differ.

    The answer is that of MPIX_Query_cuda_support, an extension of Open MPI that other MPIs copied. It is False where
    MPI lacks this function or CUDA support is switched off, since a wrong yes ends in a segmentation fault. It is None
    where MPI cannot be asked yet.
    """
    from mpi4py import MPI

    runs = MPI.Is_initialized() and not MPI.Is_finalized()
    return _query_gpu_support() if may_ask_of_gpu(MPI.Get_library_version(), runs) else None


def may_ask_of_gpu(library: str, runs: bool) -> bool:
    """Whether MPIX_Query_cuda_support can be called now.

    MPIs other than Open MPI end a process that calls it too early.

    Args:
        library: version text of the MPI.
        runs: whether the process is between MPI_Init and MPI_Finalize.
    """
    return runs or library.startswith("Open MPI")


@functools.cache
def _query_gpu_support() -> bool:
    from mpi4py import MPI

    if os.environ.get(_CUDA_SWITCH, "1").lower() not in ("1", "true", "yes", "t", "y"):
        return False
    # the search for a symbol in a library includes the libraries that it is linked to, here libmpi
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and query() == 1


def abort_mpi(status: int = 1) -> None:
    """End every process of the job with this status, if MPI was started; then it does not return. Not a collective.

    Open MPI's MPI_Abort waits for the launcher and holds the interpreter meanwhile. MPICH's returns before its launcher
    has ended the process. If the launcher does not answer, a thread that needs no interpreter ends it with status 1.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        faulthandler.dump_traceback_later(_ABORT_SECONDS, exit=True, file=sys.__stderr__ or 2)
        mpi.COMM_WORLD.Abort(status)
        while True:
            time.sleep(1)


class ObjectCommunicator(Communicator):
    """A group whose objects go over mpi4py, or over what has its methods for objects. Every method blocks."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

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


class MpiCommunicator(ObjectCommunicator):
    """A group over mpi4py. Every method blocks. MPI matches messages by order, so names are for readers only.

    A CPU tensor is sent from its own memory. So is a GPU tensor if MPI reads GPU memory; otherwise it goes through a
    page-locked buffer. In both cases the host waits for the stream that computes the tensor.
    """

    transport = "mpi"

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        super().__init__(comm)
        self._in_place = MPI.IN_PLACE
        self._types = {
            torch.float32: MPI.FLOAT,
            torch.float64: MPI.DOUBLE,
            torch.int32: MPI.INT32_T,
            torch.int64: MPI.INT64_T,
        }
        self._view = MPI.buffer.fromaddress
        self._stage = HostStage()

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        if self.size == 1:
            return
        if not is_gpu(tensor.device):
            # the buffer is given by address and type: a third of the time that a numpy array takes, for messages of
            # microseconds
            assert tensor.is_contiguous(), f"message {name} is not contiguous"
            memory = self._view(tensor.data_ptr(), tensor.nbytes)
            begin = time.perf_counter()
            self._comm.Allreduce(self._in_place, (memory, self._types[tensor.dtype]))
            MESSAGES.seconds += time.perf_counter() - begin
            return
        own = tensor.detach()
        if own.is_cuda and mpi_reads_gpu_memory():
            stream_of(own.device).synchronize()
            self._comm.Allreduce(self._in_place, own)
        else:
            host = self._stage.room(own.shape, own)
            self._stage.fetch(own, host)
            self._comm.Allreduce(self._in_place, host.numpy())
            self._stage.send(host, own)

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        own = tensor.detach()
        gathered = own.new_empty((self.size, *own.shape))
        if not is_gpu(own.device):
            self._comm.Allgather(own.numpy(), gathered.numpy())
        elif own.is_cuda and mpi_reads_gpu_memory():
            stream_of(own.device).synchronize()
            self._comm.Allgather(own, gathered)
        else:
            host = self._stage.room(gathered.shape, own)
            self._stage.fetch(own, host[self.rank])
            self._comm.Allgather(self._in_place, host.numpy())
            self._stage.send(host, gathered)
        return gathered

    def allreduce_half_(self, tensor: Tensor, *, name: str) -> None:
        """Replace a contiguous float16 tensor by its sum over the ranks, in place, through host memory.

        MPI has no type of 16 bits, so torch adds the numbers.
        """
        from mpi4py import MPI

        host = tensor.detach().cpu()
        memory = self._view(host.data_ptr(), host.nbytes)
        begin = time.perf_counter()
        self._comm.Allreduce(self._in_place, (memory, MPI.UINT16_T), op=_half_sum())
        MESSAGES.seconds += time.perf_counter() - begin
        if is_gpu(tensor.device):
            tensor.copy_(host)

    def split(self, color: int, *, name: str) -> Communicator:
        return MpiCommunicator(self._comm.Split(color, self.rank))


@functools.cache
def _half_sum() -> Any:
    """MPI's operation that adds float16 numbers. Each process makes it once."""
    from mpi4py import MPI

    def add(mine: Any, sum_: Any, _: Any) -> None:
        torch.frombuffer(sum_, dtype=torch.float16).add_(torch.frombuffer(mine, dtype=torch.float16))

    return MPI.Op.Create(add, commute=True)


@dataclass(frozen=True)
class LibraryGroups:
    """The groups that a tensor library has made in this job, by the world ranks of their members in rising order."""

    world: Any
    """Communicator of all ranks, mpi4py's or one with its methods for objects."""
    new: Callable[[list[int]], Any]
    """Function that makes a group. Every rank of the world calls it for every group, member or not, in the same
    order."""
    made: dict[tuple[int, ...], Any]


class LibraryCommunicator(ObjectCommunicator):
    """A group whose tensors go over a library, for which a subclass has methods.

    Its objects go over MPI, or over what takes MPI's place.
    """

    def __init__(self, comm: Any, groups: LibraryGroups, members: tuple[int, ...]) -> None:
        super().__init__(comm)
        self._groups = groups
        # a group of one sends nothing, so the library needs no group for it
        self._group: Any = groups.made.get(members)

    def split(self, color: int, *, name: str) -> Communicator:
        comm = self._comm.Split(color, self.rank)
        members = tuple(comm.allgather(self._groups.world.Get_rank()))
        for ranks in sorted(set(self._groups.world.allgather(members))):
            if len(ranks) > 1 and ranks not in self._groups.made:
                self._groups.made[ranks] = self._groups.new(list(ranks))
        return type(self)(comm, self._groups, members)
