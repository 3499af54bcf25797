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

Layout = dict[str, tuple[tuple[int, ...], DTypeLike]]
"""Name to shape and type of arrays that lie one after the other."""


def positions(layout: Layout) -> tuple[dict[str, int], int]:
    """Where each array begins, at a whole cache line, and where all end [bytes]."""
    begins, size = {}, 0
    for name, (shape, dtype) in layout.items():
        begins[name] = size
        size += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64
    return begins, size


class SharedBlock:
    """Arrays in a file, on disk or unnamed in memory, that are mapped and not to be written to.

    A forked child has the mapping already; a process that multiprocessing starts by spawn or forkserver gets the
    descriptor when the block is among its arguments, so it maps the same file even where another one took its name.
    Pickling it for anything else is no use. The kernel frees an unnamed file with the last process that maps it.

    Args:
        layout: the arrays.
        descriptor: an open file that holds them; the block closes it.
        begin: where they begin in the file; a multiple of the page size [bytes].
    """

    def __init__(self, layout: Layout, descriptor: int, begin: int = 0) -> None:
        self._layout, self._descriptor, self._begin = layout, descriptor, begin
        weakref.finalize(self, os.close, descriptor)
        begins, self.size = positions(layout)  # bytes
        memory = mmap.mmap(descriptor, max(self.size, 1), prot=mmap.PROT_READ, offset=begin)
        self.arrays: dict[str, NDArray[Any]] = {
            name: np.ndarray(shape, dtype, memory, begins[name]) for name, (shape, dtype) in layout.items()
        }

    def __reduce__(self) -> tuple[Callable[..., SharedBlock], tuple[Any, ...]]:
        return (_map_again, (self._layout, DupFd(self._descriptor), self._begin))


def unnamed_file() -> int:
    """The descriptor of a new file in memory; nothing of it shows in the file system or in /dev/shm."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("megdet_hpc_index")
    with tempfile.TemporaryFile() as file:  # not Linux
        return os.dup(file.fileno())


def _map_again(layout: Layout, descriptor: Any, begin: int) -> SharedBlock:
    return SharedBlock(layout, descriptor.detach(), begin)
