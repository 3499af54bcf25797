"""A communicator that counts its messages."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megdet_hpc.parallel.communicator import Communicator


@dataclass
class Tally:
    """The messages of one name."""

    messages: int = 0
    num_bytes: int = 0
    """Payload of this rank; objects are not counted [bytes]."""
    seconds: float = 0.0


class CountingCommunicator(Communicator):
    """A communicator around another one, which counts the tensor messages that this rank sends.

    Attributes:
        names: names of the messages, in order.
        num_bytes: payload of this rank. The bytes on the network depend on the transport's algorithm.
        seconds: time of the host in messages, mostly in waiting for slower ranks.
        tallies: the same by name, objects among them.
    """

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self.rank, self.size, self.transport = inner.rank, inner.size, inner.transport
        self.names: list[str] = []
        self.num_bytes = 0
        self.seconds = 0.0
        self.tallies: dict[str, Tally] = {}

    def _count(self, tensor: Tensor, name: str, begin: float) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        self.seconds += self._note(name, begin, num_bytes)
        self.names.append(name)
        self.num_bytes += num_bytes

    def _note(self, name: str, begin: float, num_bytes: int = 0) -> float:
        """Add a message to the tally of its name. Returns the time that it took [seconds]."""
        took, own = time.perf_counter() - begin, self.tallies.setdefault(name, Tally())
        own.messages, own.num_bytes, own.seconds = own.messages + 1, own.num_bytes + num_bytes, own.seconds + took
        return took

    def reset(self) -> None:
        """Count from nothing again. Not a collective."""
        self.names.clear()
        self.tallies.clear()
        self.num_bytes, self.seconds = 0, 0.0

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        begin = time.perf_counter()
        self._inner.allreduce_sum_(tensor, name=name)
        self._count(tensor, name, begin)

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        begin = time.perf_counter()
        gathered = self._inner.allgather_tensor(tensor, name=name)
        self._count(tensor, name, begin)
        return gathered

    def allgather_object(self, value: Any, *, name: str) -> list[Any]:
        begin = time.perf_counter()
        gathered = self._inner.allgather_object(value, name=name)
        self._note(name, begin)
        return gathered

    def gather_object(self, value: Any, *, name: str) -> list[Any] | None:
        return self._inner.gather_object(value, name=name)

    def broadcast_object(self, value: Any, *, name: str) -> Any:
        return self._inner.broadcast_object(value, name=name)

    def barrier(self, *, name: str) -> None:
        self._inner.barrier(name=name)

    def split(self, color: int, *, name: str) -> Communicator:
        return CountingCommunicator(self._inner.split(color, name=name))
