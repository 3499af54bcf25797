"""A page-locked buffer in host memory, for GPU tensors where a library reads host memory only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megdet_hpc.devices import event_on, stream_of

# Smallest buffer. The message of a layer has a few kilobytes, so most messages fit into the first buffer.
_MIN_BYTES = 64 * 1024


class HostStage:
    """One buffer for all messages. It grows and never shrinks.

    Page-locked memory allows asynchronous copies on the stream of the tensor. So the host waits for that stream alone,
    not for the whole device. Not a collective.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._copied: Any = None

    def room(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A host tensor of a shape, with the type of `like`, which may be written. It is valid until the next call."""
        if self._copied is not None:
            # the last message may still be on its way to the GPU, possibly on another stream
            self._copied.synchronize()
        size = math.prod(shape) * like.element_size()
        if self._buffer.numel() < size:
            capacity = max(_MIN_BYTES, 1 << (size - 1).bit_length())
            self._buffer = torch.empty(capacity, dtype=torch.uint8, pin_memory=True)
        return self._buffer[:size].view(like.dtype).view(*shape)

    def fetch(self, tensor: Tensor, host: Tensor) -> None:
        """Copy a GPU tensor into a part of the buffer. Returns once the stream has made the copy."""
        host.copy_(tensor, non_blocking=True)
        stream_of(tensor.device).synchronize()

    def send(self, host: Tensor, tensor: Tensor) -> None:
        """Copy a part of the buffer to a GPU tensor, in the order of its stream. The host does not wait."""
        tensor.copy_(host, non_blocking=True)
        if self._copied is None:
            self._copied = event_on(tensor.device)
        self._copied.record(stream_of(tensor.device))
