"""Gradients in flat buffers: one message after the backward pass (mpi4py), or several during it (torch.distributed).

DistributedDataParallel does not fit: its forward pass must go through its own wrapper, and it writes the averages over
the local gradients, which AGVM compares. Post-accumulate hooks, which torch documents for this, leave both as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from megdet_hpc.parallel.communicator import MESSAGES
from megdet_hpc.parallel.runtime import SynchronizedOptimizer

# Sums a flat tensor over the ranks in place, and gives the function that waits for the result.
Send = Callable[[Tensor, str], Callable[[], object]]


class Bucket:
    """Parameters of one type, whose gradients travel in one message."""

    def __init__(self, parameters: list[nn.Parameter], wire: torch.dtype, name: str) -> None:
        self.name, self.parameters, self._buffer = name, parameters, torch.empty(0)
        self._wire, self._sizes = wire, [p.numel() for p in parameters]
        self.unready = len(parameters)
        self.wait: Callable[[], object] | None = None

    def places(self) -> list[Tensor]:
        """The place of each parameter in the buffer, in the parameter's shape."""
        parts = self._buffer.split(self._sizes)
        return [part.view(p.shape) for p, part in zip(self.parameters, parts, strict=True)]

    def send(self, send: Send) -> None:
        """Copy the gradients into the buffer and send it. A parameter without a gradient counts as 0."""
        if not self._buffer.numel():
            self._buffer = torch.empty(sum(self._sizes), dtype=self._wire, device=self.parameters[0].device)
        gradients, filled = [], []
        for parameter, place in zip(self.parameters, self.places(), strict=True):
            if parameter.grad is None:
                place.zero_()
            else:
                gradients.append(parameter.grad)
                filled.append(place)
        if gradients:
            torch._foreach_copy_(filled, gradients)
        self.wait = send(self._buffer, self.name)

    def receive(self, size: int) -> None:
        """Wait for the sum, and write the mean over `size` ranks into the gradients."""
        if self.wait is not None:
            self.wait()
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            gradients.append(parameter.grad)
        if self._buffer.dtype == gradients[0].dtype:
            self._buffer.div_(size)
            torch._foreach_copy_(gradients, self.places())
        else:  # half precision is divided as float32
            torch._foreach_copy_(gradients, self.places())
            torch._foreach_div_(gradients, size)

    def reset(self) -> None:
        """Forget the last update; a message that is under way arrives first."""
        if self.wait is not None:
            self.wait()
        self.wait, self.unready = None, len(self.parameters)


class BucketOptimizer(SynchronizedOptimizer):
    """An optimizer whose gradients travel in flat buffers.

    The buffers leave in the same order on every rank, whatever the order in which a rank's gradients are ready.

    Args:
        optimizer: optimizer of the model's parameters.
        model: model on one device.
        accumulate: number of backward passes in an update.
        compression: none or fp16.
        overlap: send a buffer as soon as the last backward pass has filled it. Otherwise all leave in `synchronize`.
        size: number of ranks.
        send: function that sums a flat tensor over the ranks.
        most_bytes: size of a buffer from which on another begins; None: one buffer for each type [bytes].
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        accumulate: int,
        compression: str,
        overlap: bool,
        *,
        size: int,
        send: Send,
        most_bytes: int | None = None,
    ) -> None:
        super().__init__(optimizer)
        self._accumulate, self._size, self._send = accumulate, size, send
        # the backward pass makes the last layers' gradients first
        trained = [p for p in model.parameters() if p.requires_grad][::-1]
        self.buckets = list(_fill(trained, compression, most_bytes))
        self._passes: dict[Tensor, int] = {}
        self._sent = 0
        self._of: dict[Tensor, Bucket] = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        if overlap:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(self._ready)

    def _ready(self, parameter: Tensor) -> None:
        self._passes[parameter] = self._passes.get(parameter, 0) + 1
        if self._passes[parameter] == self._accumulate:
            self._of[parameter].unready -= 1
            while self._sent < len(self.buckets) and not self.buckets[self._sent].unready:
                self._send_next()

    def _send_next(self) -> None:
        self.buckets[self._sent].send(self._send)
        self._sent += 1

    def synchronize(self) -> None:
        begin, before = time.perf_counter(), MESSAGES.seconds
        while self._sent < len(self.buckets):
            self._send_next()
        for bucket in self.buckets:
            bucket.receive(self._size)
        self._reset()
        MESSAGES.seconds = before  # MPI's messages among them counted themselves
        MESSAGES.add_gradients(time.perf_counter() - begin)

    def set_passes(self, number: int) -> None:
        self._accumulate = number

    def zero_grad(self) -> None:
        self._reset()
        super().zero_grad()

    def _reset(self) -> None:
        for bucket in self.buckets:
            bucket.reset()
        self._passes.clear()
        self._sent = 0


def _fill(parameters: list[nn.Parameter], compression: str, most_bytes: int | None) -> Iterator[Bucket]:
    """Buckets of parameters of one type, in the order of the parameters where the number of bytes is limited."""
    limit = float("inf") if most_bytes is None else most_bytes
    ordered = sorted(parameters, key=lambda p: str(p.dtype)) if most_bytes is None else parameters
    rows: list[tuple[torch.dtype, list[nn.Parameter]]] = []
    filled = 0
    for parameter in ordered:
        if not rows or rows[-1][0] != parameter.dtype or filled >= limit:
            rows.append((parameter.dtype, []))
            filled = 0
        rows[-1][1].append(parameter)
        filled += parameter.numel() * (2 if compression == "fp16" else parameter.element_size())
    for number, (dtype, row) in enumerate(rows):
        yield Bucket(row, torch.float16 if compression == "fp16" else dtype, f"gradients.{number}")
