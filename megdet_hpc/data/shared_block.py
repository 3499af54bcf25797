"""Memory that loader workers map instead of copying it, in whatever way they are started."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class SharedBlock:
    """Arrays of zeros in an unnamed file in memory, which the kernel frees with the last process that maps it.

    Nothing in the file system or in /dev/shm can be left over, whichever way a process ends. A forked child has the
    mapping already; a process that multiprocessing starts by spawn or forkserver gets the descriptor when the block
    is among its arguments. Pickling it for anything else is no use.

    Args:
        arrays: name to shape and type.
        descriptor: descriptor of the block to map; None makes a new one.
    """

    def __init__(self, arrays: dict[str, tuple[tuple[int, ...], DTypeLike]], descriptor: int | None = None) -> None:
        self._layout = arrays
        begins, size = {}, 0
        for name, (shape, dtype) in arrays.items():
            begins[name] = size
            size += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64  # whole cache lines
        self.size = size  # bytes
        if descriptor is None:
            descriptor = _unnamed_file()
            os.ftruncate(descriptor, max(size, 1))
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        memory = mmap.mmap(descriptor, max(size, 1))
        self.arrays: dict[str, NDArray[Any]] = {
            name: np.ndarray(shape, dtype, memory, begins[name]) for name, (shape, dtype) in arrays.items()
        }

    def __reduce__(self) -> tuple[Callable[..., SharedBlock], tuple[Any, ...]]:
        return (_map_again, (self._layout, DupFd(self._descriptor)))


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("megdet_hpc_index")
    with tempfile.TemporaryFile() as file:  # not Linux
        return os.dup(file.fileno())


def _map_again(arrays: dict[str, tuple[tuple[int, ...], DTypeLike]], descriptor: Any) -> SharedBlock:
    return SharedBlock(arrays, descriptor.detach())
