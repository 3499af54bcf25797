"""Speed of reading without decoding, in several ways: images per second of one process, from a warm cache."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import h5py

from megdet_hpc.bench.loader_sources import drop_from_cache
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.shard_format import file_position

# Least time of a turn. It makes the clock's resolution and first page faults negligible [seconds].
_TURN_SECONDS = 0.05

PLAIN = "positioned reads, plain file"
FILES = "open and read single files"
Read = Callable[[int], object]


def read_rows(pack: PackedCoco, files: list[Path], folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Compare the ways to read, in turns.

    Args:
        pack: the packed images.
        files: the same images as single files.
        folder: folder for a plain file of all images, one after the other.

    Returns:
        A row for each way. Its ratios compare processor time and are medians over the turns. Above 1 the way is faster.
    """
    plain = folder / "plain"
    encoded = [pack.read_image_bytes(index) for index in range(len(files))]
    plain.write_bytes(b"".join(encoded))
    counts = [len(data) for data in encoded]
    begins = [0, *accumulate(counts)]
    del encoded
    # the layout of cached pages depends on how they were read, so all files are dropped and read from disk
    drop_from_cache([plain, *files, *pack.shard_paths])
    with ExitStack() as stack:
        plain_file = stack.enter_context(open(plain, "rb"))
        descriptor = plain_file.fileno()
        single = [stack.enter_context(h5py.File(path, "r", locking=False)) for path in pack.shard_paths]
        blobs = [file["images/bytes"] for file in single]
        raw = [stack.enter_context(open(path, "rb")) for path in pack.shard_paths]
        places, positions = [], []
        for file, blob, bare in zip(single, blobs, raw, strict=True):
            offset = file["images/bytes_offset"][()].tolist()
            places += [(blob, begin, end) for begin, end in pairwise(offset)]
            positions += [(bare.fileno(), file_position(blob) + begin) for begin in offset[:-1]]

        def open_and_read(index: int) -> bytes:
            with open(files[index], "rb") as file:
                return file.read()

        def shard_pread(index: int) -> bytes:
            shard, position = positions[index]
            return os.pread(shard, counts[index], position)

        def h5py_slice(index: int) -> bytes:
            blob, begin, end = places[index]
            data: bytes = blob[begin:end].tobytes()
            return data

        ways: dict[str, Read] = {
            PLAIN: lambda index: os.pread(descriptor, counts[index], begins[index]),
            "positioned reads, the shards": shard_pread,
            FILES: open_and_read,
            "h5py slices": h5py_slice,
            "read_image_bytes": pack.read_image_bytes,
            "read_image_bytes, check=False": lambda index: pack.read_image_bytes(index, check=False),
            "read_image_bytes, memory_map": PackedCoco(pack.directory, memory_map=True).read_image_bytes,
        }
        speeds = _speeds(ways, len(files), repeats)
    by_cpu = {name: [cpu for _, cpu in turns] for name, turns in speeds.items()}
    positioned, single_files = by_cpu[PLAIN], by_cpu[FILES]
    return [
        {
            "reading": name,
            "images_per_s": statistics.median(speed for speed, _ in turns),
            "least": min(speed for speed, _ in turns),
            "most": max(speed for speed, _ in turns),
            "cpu_us": statistics.median(by_cpu[name]),
            "to_positioned": statistics.median(b / a for a, b in zip(by_cpu[name], positioned, strict=True)),
            "to_files": statistics.median(b / a for a, b in zip(by_cpu[name], single_files, strict=True)),
        }
        for name, turns in speeds.items()
    ]


def _speeds(ways: dict[str, Read], count: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Images per second, and microseconds of processor time per image, of each turn of each way."""
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first turn warms the cache
        for name, read in ways.items():
            done, begin, begin_cpu = 0, time.perf_counter(), time.process_time()
            while (seconds := time.perf_counter() - begin) < _TURN_SECONDS or not done:
                for index in range(count):
                    read(index)
                done += count
            if repeat:
                speeds[name].append((done / seconds, (time.process_time() - begin_cpu) / done * 1e6))
    return speeds
