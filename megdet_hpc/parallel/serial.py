"""The group of one rank: a laptop, a test, one GPU. No collective sends anything."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megdet_hpc.parallel.communicator import Communicator


class SerialCommunicator(Communicator):
    """A group of one rank. A sum over it is the rank's own value."""

    rank = 0
    size = 1
    transport = "serial"

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        pass

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        return tensor.unsqueeze(0)

    def allgather_object(self, value: Any, *, name: str) -> list[Any]:
        return [value]

    def gather_object(self, value: Any, *, name: str) -> list[Any] | None:
        return [value]

    def broadcast_object(self, value: Any, *, name: str) -> Any:
        return value

    def barrier(self, *, name: str) -> None:
        pass

    def split(self, color: int, *, name: str) -> Communicator:
        return self
