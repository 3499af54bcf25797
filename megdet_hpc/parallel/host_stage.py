"""A page-locked buffer in host memory, for GPU tensors that a library reads from the host only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The least that is locked at once: a layer's message has a few kilobytes, so that most fit the first buffer.
_MIN_BYTES = 64 * 1024


class HostStage:
    """One buffer, used again by each message; it grows and never shrinks.

    Page-locked memory takes asynchronous copies on the tensor's own stream, so the host waits for that stream alone
    and not for the whole device. Not a collective.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def room(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A host tensor of a shape and of the type of `like`, free to be written; valid until the next call."""
        if self._copied is not None:
            # the last message may still be on its way to the GPU, possibly on another stream
            self._copied.synchronize()
        size = math.prod(shape) * like.element_size()
        if self._buffer.numel() < size:
            capacity = max(_MIN_BYTES, 1 << (size - 1).bit_length())
            self._buffer = torch.empty(capacity, dtype=torch.uint8, pin_memory=True)
        return self._buffer[:size].view(like.dtype).view(*shape)

    def fetch(self, tensor: Tensor, host: Tensor) -> None:
        """Copy a GPU tensor into a part of the buffer. Returns when its stream has come so far."""
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()

    def send(self, host: Tensor, tensor: Tensor) -> None:
        """Copy a part of the buffer to a GPU tensor, in the order of its stream; the host does not wait."""
        tensor.copy_(host, non_blocking=True)
        if self._copied is None:
            self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(tensor.device))
