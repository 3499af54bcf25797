"""Virtual ranks as threads of one process: the whole distributed code without a launcher.

Emulation uses them, tests with more ranks than a laptop can start, and gradcheck.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from megdet_hpc.parallel.communicator import Communicator

T = TypeVar("T")


class _Exchange:
    """A slot for each rank, and a barrier. In every collective all ranks write, then all ranks read."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.names: list[str] = [""] * size
        self.barrier = threading.Barrier(size)
        self.subgroups: dict[tuple[int, ...], _Exchange] = {}
        self.lock = threading.Lock()

    def swap(self, rank: int, value: Any, name: str) -> list[Any]:
        self.slots[rank], self.names[rank] = value, name
        self.barrier.wait()
        values, names = list(self.slots), set(self.names)
        self.barrier.wait()
        if len(names) != 1:
            raise RuntimeError(f"ranks entered different collectives: {sorted(names)}")
        return values

    def abort(self) -> None:
        """Wake all ranks from their collectives, also from those of groups."""
        self.barrier.abort()
        for group in list(self.subgroups.values()):
            group.abort()


class ThreadCommunicator(Communicator):
    """One virtual rank, made by `run_ranks`."""

    transport = "threads"

    def __init__(self, exchange: _Exchange, rank: int) -> None:
        self._exchange, self.rank, self.size = exchange, rank, len(exchange.slots)

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        # clones, since another rank may overwrite its tensor while this one still reads
        values = self._exchange.swap(self.rank, tensor.detach().clone(), name)
        tensor.copy_(torch.stack(values).sum(0))

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        return torch.stack(self._exchange.swap(self.rank, tensor.detach().clone(), name))

    def allgather_object(self, value: Any, *, name: str) -> list[Any]:
        return self._exchange.swap(self.rank, value, name)

    def gather_object(self, value: Any, *, name: str) -> list[Any] | None:
        values = self._exchange.swap(self.rank, value, name)
        return values if self.rank == 0 else None

    def broadcast_object(self, value: Any, *, name: str) -> Any:
        return self._exchange.swap(self.rank, value, name)[0]

    def barrier(self, *, name: str) -> None:
        self._exchange.swap(self.rank, None, name)

    def split(self, color: int, *, name: str) -> Communicator:
        colors = self._exchange.swap(self.rank, color, name)
        members = tuple(rank for rank, other in enumerate(colors) if other == color)
        with self._exchange.lock:
            group = self._exchange.subgroups.setdefault(members, _Exchange(len(members)))
            if self._exchange.barrier.broken:  # a rank failed after the colors came, and knows nothing of this group
                group.abort()
        return ThreadCommunicator(group, members.index(self.rank))


def run_ranks(size: int, body: Callable[[Communicator], T]) -> list[T]:
    """Run `body` once on each virtual rank, all at the same time.

    Returns:
        The results in rank order.

    Raises:
        Exception: the exception of the first rank that fails. The other ranks are woken from their collectives.
    """
    exchange = _Exchange(size)

    def guarded(rank: int) -> T:
        try:
            return body(ThreadCommunicator(exchange, rank))
        except BaseException:
            exchange.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [future.exception() for future in futures]
    for error in sorted((e for e in errors if e), key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
