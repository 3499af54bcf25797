"""The shards of a pack as files to read from, by position."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megdet_hpc.data.shard_format import PackError


class ShardFiles:
    """Open files of one process. A fork or a pickle of them starts with none, and opens its own at its first read.

    Args:
        paths: the file of each shard.
        sizes: size of each file, as the manifest gives it [bytes].
        memory_map: read through mappings.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], *, memory_map: bool) -> None:
        self.paths, self.sizes, self.memory_map = list(paths), list(sizes), memory_map
        self._forget()

    def _forget(self) -> None:
        self._descriptors: dict[int, int] = {}
        self._mappings: dict[int, memoryview] = {}
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[Callable[..., ShardFiles], tuple[Any, ...]]:
        return (partial(ShardFiles, memory_map=self.memory_map), (self.paths, self.sizes))

    def check_size(self, shard: int) -> None:
        """Raise PackError unless a shard is there and has its size."""
        path, expected = self.paths[shard], self.sizes[shard]
        if not path.is_file():
            raise PackError(f"{path}: missing, but manifest.json lists it; copy it or pack the set again")
        if path.stat().st_size != expected:
            raise PackError(
                f"{path}: {path.stat().st_size} bytes, manifest.json says {expected}; "
                "copy it again or pack the set again"
            )

    def read(self, shard: int, position: int, count: int) -> bytes | memoryview:
        """`count` bytes of a shard, a view of its map if there is one; fewer only at the end of a damaged file.

        Raises:
            OSError: the file system failed.
            PackError: the shard is missing or has another size.
        """
        if self._pid != os.getpid():  # forked since the last read: the parent's descriptors stay the parent's
            self._forget()
        if self.memory_map and shard in self._mappings:
            return self._mappings[shard][position : position + count]
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            self.check_size(shard)  # the folder may have been packed anew since it was opened
            descriptor = self._descriptors[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        if self.memory_map:
            self._mappings[shard] = memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
            return self._mappings[shard][position : position + count]
        data = os.pread(descriptor, count, position)
        while len(data) < count:  # a signal or the 2 GiB limit of one call
            more = os.pread(descriptor, count - len(data), position + len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        """Close this process's files; a later read opens them again."""
        if self._pid == os.getpid():
            for descriptor in self._descriptors.values():
                os.close(descriptor)
        self._forget()
