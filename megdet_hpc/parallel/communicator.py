"""The interface of a group of ranks. It has several transports, and one set of test bodies for all of them.

Every method is a collective of the group: each of its ranks must call it, in the same order, with the same name. A
missed call is a hang without a traceback. Every method blocks, with one exception: a transport may queue the two tensor
methods on the GPU stream of the tensor, whose later work then waits (torch with NCCL). At size 1 a method returns at
once and sends nothing. Horovod matches messages by `name`; MPI and torch match them by order alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


class MessageTime:
    """Time that this process has spent in messages to and from other ranks, most of it in waiting for the slowest.

    Messages that are queued on a GPU stream are not in it, so it means something on CPUs only.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.gradients = 0.0
        """The part of them that waits for gradients after the backward pass."""

    def add_gradients(self, seconds: float) -> None:
        """Add time that was spent in waiting for gradients [s]."""
        self.seconds += seconds
        self.gradients += seconds


MESSAGES = MessageTime()


class Communicator(ABC):
    """A group of ranks. `rank` is the place of this process in it, `size` the number of its members."""

    rank: int
    size: int
    transport: str

    @abstractmethod
    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        """Replace a contiguous tensor by its sum over the ranks, in place. Called by every rank of the group.

        Args:
            tensor: float32, float64, int32 or int64; the same shape and type on every rank.
            name: name of the message, the same on every rank. Some transports match messages by it.
        """

    @abstractmethod
    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        """The tensors of all ranks, stacked in rank order: (k,) on each rank gives (size, k) on each rank.

        Called by every rank of the group.

        Args:
            tensor: float32, float64, int32 or int64; the same shape and type on every rank.
            name: name of the message, the same on every rank.
        """

    @abstractmethod
    def allgather_object(self, value: Any, *, name: str) -> list[Any]:
        """The picklable values of all ranks, in rank order, on every rank. Called by every rank; blocks."""

    @abstractmethod
    def gather_object(self, value: Any, *, name: str) -> list[Any] | None:
        """The picklable values of all ranks, in rank order, on rank 0; None elsewhere. Called by every rank; blocks."""

    @abstractmethod
    def broadcast_object(self, value: Any, *, name: str) -> Any:
        """The picklable value of rank 0, on every rank; others' are ignored. Called by every rank; blocks."""

    @abstractmethod
    def barrier(self, *, name: str) -> None:
        """Return once every rank of the group has called it."""

    @abstractmethod
    def split(self, color: int, *, name: str) -> Communicator:
        """The group of the ranks that passed the same color, in rank order, on the same transport; blocks.

        Called by every rank of the world, each on the group that it is in: libraries make every group on every rank.

        Args:
            color: integer, 0 or more.
            name: name of the message, the same on every rank.
        """
