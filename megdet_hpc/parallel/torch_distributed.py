"""torch.distributed as a transport: NCCL on GPUs, where no message makes the host wait, gloo on CPUs.

MPI, which started the ranks, tells them where rank 0 listens; neither torchrun nor MASTER_ADDR is needed.

NCCL asks that two of its communicators start their work in the same order on every GPU ("Using multiple NCCL
communicators concurrently", NCCL user guide). This transport's messages and Horovod's gradients, where those go over
NCCL too, are started by two threads without such an order, so `solver.overlap auto` lets the gradients leave after the
backward pass there (transports.py). The transports horovod, which starts both from one thread, and mpi need no such
care.
"""

from __future__ import annotations

import functools
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megdet_hpc.errors import MachineError, UserError
from megdet_hpc.parallel.mpi import LibraryCommunicator, LibraryGroups

# Ranks that have not found each other by then cannot: a firewall, or the wrong network interface.
_CONNECT_TIMEOUT = timedelta(minutes=2)
# How long one rank may lag in a collective, as gloo has it; NCCL's own 10 min are short for a cold file system.
_MESSAGE_TIMEOUT = timedelta(minutes=30)
# Newer torch deprecates the second name for the first; a torch without either lacks distributed altogether.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


class TorchCommunicator(LibraryCommunicator):
    """Tensors over a torch.distributed group; messages match by order, so the names only document.

    On CPUs (gloo) the tensor methods block. On GPUs (NCCL) they return at once and what follows on the tensor's
    stream waits for them. Tensors must be on the kind of device that the communicator was made for.
    """

    transport = "torch"

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        if self.size > 1:
            dist.all_reduce(tensor.detach(), group=self._group)

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        own = tensor.detach()
        if self.size == 1:
            return own.unsqueeze(0).clone()
        gathered = own.new_empty((self.size, *own.shape))
        # flat, since gloo and NCCL concatenate along the first axis
        _all_gather(gathered.view(-1), own.view(-1), group=self._group)
        return gathered


def _meet(world: Any) -> dist.Store:
    """The key-value store through which the ranks exchange addresses, served by rank 0. Collective; blocks."""
    hosts = world.allgather(socket.gethostname())
    server: dist.Store | None = None
    port_or_error: int | str = ""
    if world.Get_rank() == 0:
        try:
            # port 0: one that the system knows to be free
            store = dist.TCPStore("localhost", 0, is_master=True, timeout=_CONNECT_TIMEOUT, wait_for_workers=False)
            server, port_or_error = store, store.port
        except (RuntimeError, OSError) as error:
            port_or_error = str(error)
    port_or_error = world.bcast(port_or_error)
    if isinstance(port_or_error, str):
        raise RuntimeError(f"rank 0 on {hosts[0]} cannot serve the ranks: {port_or_error}")
    if server is not None:
        return server
    # a host may be unable to look up its own name (containers), so that name is used from other hosts only
    address = "localhost" if socket.gethostname() == hosts[0] else hosts[0]
    return dist.TCPStore(address, port_or_error, is_master=False, timeout=_CONNECT_TIMEOUT, wait_for_workers=False)


def _connect(world: Any, backend: str, device: torch.device) -> Any:
    """A torch.distributed group of all ranks, tried out. Collective of the world; blocks."""
    rank, size = world.Get_rank(), world.Get_size()
    if not dist.is_initialized():
        dist.init_process_group(backend, store=_meet(world), rank=rank, world_size=size, timeout=_CONNECT_TIMEOUT)
    group: Any = dist.new_group(timeout=_MESSAGE_TIMEOUT, backend=backend)
    # NCCL connects at the first message, and only then finds two ranks on one GPU
    total = torch.ones(1, device=device)
    dist.all_reduce(total, group=group)
    if total.item() != size:
        raise RuntimeError(f"the sum of 1 over {size} ranks was {total.item()}")
    return group


def torch_communicator(world: Any, device: torch.device) -> TorchCommunicator:
    """The world over torch.distributed. Collective of the world; blocks.

    Args:
        world: mpi4py communicator of all ranks.
        device: where this rank's tensors are: cpu (gloo) or cuda (NCCL).

    Raises:
        UserError: on every rank, if torch lacks the backend; MachineError if the ranks cannot reach each other.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_available() or not dist.is_backend_available(backend):
        raise UserError(f"norm.transport torch needs {backend} on {device.type}, which torch {torch.__version__} lacks")
    group, problem = None, None
    try:
        group = _connect(world, backend, device)
    except (RuntimeError, ValueError, OSError) as error:
        problem = str(error).strip().split("\n")[0]
    problems = {rank: text for rank, text in enumerate(world.allgather(problem)) if text}
    if problems:
        rank, text = next(iter(problems.items()))
        raise MachineError(
            f"norm.transport torch: {backend} did not connect {len(problems)} of {world.Get_size()} ranks, first rank "
            f"{rank}: {text}; set {backend.upper()}_SOCKET_IFNAME to the network interface that the nodes share, or "
            f"take --norm.transport mpi"
        )
    everyone = tuple(range(world.Get_size()))
    new = functools.partial(dist.new_group, timeout=_MESSAGE_TIMEOUT, backend=backend)
    return TorchCommunicator(world, LibraryGroups(world, new, {everyone: group}), everyone)


def close_torch() -> None:
    """Leave every torch.distributed group, if there are any. Called by every rank, after a barrier."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
