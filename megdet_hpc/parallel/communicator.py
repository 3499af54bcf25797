"""What the package asks of a group of ranks. One interface, several transports, one set of test bodies.

Every method is a collective of the group: each of its ranks must call it, in the same order, with the same name;
a missed call is a hang without a traceback. All of them block, except that a transport may queue the two tensor
methods on the tensor's GPU stream, whose later work then waits (torch with NCCL). At size 1 they return at once and
send nothing. `name` is what the caller passes: Horovod matches messages by it, MPI and torch by order alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


class Communicator(ABC):
    """A group of ranks; `rank` is this process's place in it, `size` the number of its members."""

    rank: int
    size: int
    transport: str

    @abstractmethod
    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        """Replace a contiguous tensor by its sum over the ranks, in place. Called by every rank of the group.

        Args:
            tensor: float32, float64, int32 or int64; the same shape and type on every rank.
            name: the same on every rank; used by transports that match messages by name.
        """

    @abstractmethod
    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        """Every rank's tensor, stacked in rank order: (k,) on each gives (size, k) on each. As allreduce_sum_.

        Args:
            tensor: as in allreduce_sum_.
            name: as in allreduce_sum_.
        """

    @abstractmethod
    def allgather_object(self, value: Any, *, name: str) -> list[Any]:
        """Every rank's picklable value, in rank order, on every rank. Called by every rank of the group; blocks."""

    @abstractmethod
    def gather_object(self, value: Any, *, name: str) -> list[Any] | None:
        """Every rank's picklable value, in rank order, on rank 0; None elsewhere. Called by every rank; blocks."""

    @abstractmethod
    def broadcast_object(self, value: Any, *, name: str) -> Any:
        """Rank 0's picklable value on every rank; the others' argument is ignored. Called by every rank; blocks."""

    @abstractmethod
    def barrier(self, *, name: str) -> None:
        """Return once every rank of the group has called it."""

    @abstractmethod
    def split(self, color: int, *, name: str) -> Communicator:
        """The sub-group of the ranks that passed the same color, in rank order, on the same transport; blocks.

        Called by every rank of the world, each on its group at that time: a library makes all groups everywhere.

        Args:
            color: any integer from 0 on.
            name: as in allreduce_sum_.
        """
