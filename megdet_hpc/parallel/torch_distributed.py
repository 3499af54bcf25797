"""torch.distributed as a transport: gloo on CPUs; on GPUs NCCL, RCCL or xccl, where the host waits for no message.

MPI, which started the ranks, tells them where rank 0 listens. Neither torchrun nor MASTER_ADDR is needed.

NCCL asks that two of its communicators start their work in the same order on every GPU ("Using multiple NCCL
communicators concurrently", NCCL user guide). Two threads without such an order start the messages of this transport
and Horovod's gradients. Where the gradients go over NCCL too, `solver.overlap auto` therefore sends them after the
backward pass (transports.py). The transport mpi needs no such care. Neither does horovod, which starts both from one
thread.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megdet_hpc.devices import kind_of
from megdet_hpc.errors import MachineError, UserError
from megdet_hpc.parallel.cores import named_threads
from megdet_hpc.parallel.mpi import LibraryCommunicator, LibraryGroups

# Time limit for ranks to find each other. Later there is a firewall or a wrong network interface.
CONNECT_TIMEOUT = timedelta(minutes=2)
# Time that one rank may be late in a collective, gloo's default. NCCL's 10 min are short for a cold file system.
MESSAGE_TIMEOUT = timedelta(minutes=30)
# Newer torch replaces the second name by the first. A torch without both has no torch.distributed.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


class TorchCommunicator(LibraryCommunicator):
    """A group whose tensors go over torch.distributed. It matches messages by order, so names are for readers only.

    On CPUs (gloo) the tensor methods block. On GPUs (NCCL) they return at once, and later work on the stream of the
    tensor waits for them. Tensors must be on the kind of device for which the communicator was made.
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
        # flat: gloo and NCCL concatenate along the first axis
        _all_gather(gathered.view(-1), own.view(-1), group=self._group)
        return gathered

    def start_sum(self, tensor: Tensor, name: str) -> Callable[[], object]:
        """Begin to replace a contiguous tensor by its sum over the ranks, in place.

        Returns:
            The function that waits for the sum. Until then the tensor must be left alone.
        """
        work: Any = dist.all_reduce(tensor, group=self._group, async_op=True)
        wait: Callable[[], object] = work.wait
        return wait


def _meet(world: Any) -> dist.Store:
    """The key-value store through which the ranks exchange addresses, served by rank 0. Collective; blocks."""
    hosts = world.allgather(socket.gethostname())
    server: dist.Store | None = None
    port_or_error: int | str = ""
    if world.Get_rank() == 0:
        try:
            # port 0: the system chooses a free one
            store = dist.TCPStore("localhost", 0, is_master=True, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
            server, port_or_error = store, store.port
        except (RuntimeError, OSError) as error:
            port_or_error = str(error)
    port_or_error = world.bcast(port_or_error)
    if isinstance(port_or_error, str):
        raise RuntimeError(f"rank 0 on {hosts[0]} cannot serve the ranks: {port_or_error}")
    if server is not None:
        return server
    # a host may not know its own name (containers), so only other hosts use the name
    address = "localhost" if socket.gethostname() == hosts[0] else hosts[0]
    return dist.TCPStore(address, port_or_error, is_master=False, timeout=CONNECT_TIMEOUT, wait_for_workers=False)


def _connect(world: Any, backend: str, device: torch.device) -> Any:
    """A torch.distributed group of all ranks, tested with one message. Collective of the world; blocks."""
    rank, size = world.Get_rank(), world.Get_size()
    with named_threads(backend):
        if not dist.is_initialized():
            dist.init_process_group(backend, store=_meet(world), rank=rank, world_size=size, timeout=CONNECT_TIMEOUT)
        group: Any = dist.new_group(timeout=MESSAGE_TIMEOUT, backend=backend)
        # NCCL connects at the first message, and only then finds two ranks on one GPU
        total = torch.ones(1, device=device)
        dist.all_reduce(total, group=group)
    if total.item() != size:
        raise RuntimeError(f"the sum of 1 over {size} ranks was {total.item()}")
    return group


def torch_communicator(
    world: Any,
    device: torch.device,
    wanted_by: str = "norm.transport torch",
    instead: str = "--norm.transport mpi",
    *,
    backend: str | None = None,
) -> TorchCommunicator:
    """The world over torch.distributed. Collective of the world; blocks.

    Args:
        world: communicator of all ranks, mpi4py's or `StoreComm`.
        device: device of this rank's tensors.
        wanted_by: key and value that ask for it.
        instead: option that does without it.
        backend: gloo or nccl; None: the one that suits the device.

    Raises:
        UserError: torch lacks the backend; raised on every rank.
        MachineError: the ranks cannot reach each other.
    """
    backend = backend or kind_of(device.type).backend
    if not dist.is_available() or not dist.is_backend_available(backend):
        raise UserError(f"{wanted_by} needs {backend} on {device.type}, which torch {torch.__version__} lacks")
    group, problem = None, None
    try:
        group = _connect(world, backend, device)
    except (RuntimeError, ValueError, OSError) as error:
        problem = str(error).strip().split("\n")[0]
    problems = {rank: text for rank, text in enumerate(world.allgather(problem)) if text}
    if problems:
        rank, text = next(iter(problems.items()))
        raise MachineError(
            f"{wanted_by}: {backend} did not connect {len(problems)} of {world.Get_size()} ranks, first rank "
            f"{rank}: {text}; set {backend.upper()}_SOCKET_IFNAME to the network interface that the nodes share, or "
            f"take {instead}"
        )
    everyone = tuple(range(world.Get_size()))
    new = functools.partial(dist.new_group, timeout=MESSAGE_TIMEOUT, backend=backend)
    return TorchCommunicator(world, LibraryGroups(world, new, {everyone: group}), everyone)


def close_torch() -> None:
    """Leave every torch.distributed group, if there are any. Called by every rank, after a barrier."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
