"""megdet_hpc/data/shared_block.py and PackedCoco over it: one index for a process and its workers."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megdet_hpc.data.pack_index import INDEX_NAME
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.shared_block import Layout, SharedBlock, positions, unnamed_file

METHODS = ("fork", "forkserver", "spawn")


def digest(pack: PackedCoco) -> str:
    """Of everything a worker reads."""
    total = hashlib.sha256()
    for index in range(len(pack)):
        total.update(pack.read_image_bytes(index))
        total.update(pack.file_name(index).encode())
        total.update(b"".join(array.tobytes() for array in pack.annotations(index)))
        total.update(repr(pack.segmentations(index)).encode())
    return total.hexdigest()


def read_all(pack: PackedCoco, results: Any) -> None:
    results.put((digest(pack), os.getpid()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory_map", [False, True])
def test_workers_read_the_same_bytes(method: str, memory_map: bool, shapes: Path) -> None:
    pack = PackedCoco(shapes / "train", memory_map=memory_map)
    expected = digest(pack)
    assert digest(PackedCoco(shapes / "train")) == expected
    context = multiprocessing.get_context(method)
    results = context.Queue()
    workers = [context.Process(target=read_all, args=(pack, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert [text for text, _ in found] == [expected] * 2
    assert len({pid for _, pid in found} | {os.getpid()}) == 3
    assert digest(pack) == expected


def look(block: SharedBlock, ready: Any, done: Any) -> None:
    ready.wait(60)
    done.put((block.arrays["rows"].tolist(), block.arrays["counts"].tolist(), block.arrays["rows"].flags.writeable))


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_maps_the_very_memory(method: str) -> None:
    layout: Layout = {"counts": ((3,), np.int64), "rows": ((2, 2), np.float32), "none": ((0,), np.int64)}
    begins, size = positions(layout)
    descriptor = unnamed_file()
    os.ftruncate(descriptor, 4096 + size)
    block = SharedBlock(layout, os.dup(descriptor), 4096)
    context = multiprocessing.get_context(method)
    ready, done = context.Event(), context.Queue()
    worker = context.Process(target=look, args=(block, ready, done))
    worker.start()
    # what is written into the file after the worker has begun is seen by both
    os.pwrite(descriptor, np.full((2, 2), 5, np.float32).tobytes(), 4096 + begins["rows"])
    ready.set()
    expected = [[5, 5], [5, 5]], [0, 0, 0], False
    assert done.get(timeout=60) == expected
    worker.join(60)
    assert block.arrays["rows"].tolist() == expected[0]
    os.close(descriptor)


def test_the_index_is_bounded(shapes: Path) -> None:
    """56 bytes an image with its file name beside them, and 59 an annotation."""
    pack = PackedCoco(shapes / "train")
    arrays = pack.index.block.arrays
    names = sum(len(pack.file_name(index)) for index in range(len(pack)))
    rest = 24 + 16 * len(pack.shard_paths) + 64 * len(arrays)
    assert pack.index_bytes <= 56 * len(pack) + names + 59 * pack.num_annotations + rest
    assert pack.index_bytes == sum(-(-array.nbytes // 64) * 64 for array in arrays.values())
    private = {key: value for key, value in vars(pack.index).items() if isinstance(value, np.ndarray)}
    assert len(private) == 15
    for name, array in private.items():
        assert any(array is shared for shared in arrays.values()), f"{name} is a copy of its own"


def hold(folder: Path, ready: Any) -> None:
    pack = PackedCoco(folder)
    ready.put(pack.index_bytes)
    signal.pause()


def test_a_killed_process_leaves_nothing(shapes: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    context = multiprocessing.get_context("fork")
    ready = context.Queue()
    worker = context.Process(target=hold, args=(shapes / "train", ready))
    worker.start()
    assert ready.get(timeout=60) > 0
    if worker.pid:
        links = [os.readlink(entry) for entry in Path(f"/proc/{worker.pid}/map_files").iterdir()]
        assert str(shapes / "train" / INDEX_NAME) in links
    worker.kill()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    ours = {name for name in set(os.listdir("/dev/shm")) - before if "megdet" in name}
    assert not ours


def test_descriptors_are_closed_with_the_set(shapes: Path) -> None:
    PackedCoco(shapes / "train")  # whatever the first use opens for good
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        PackedCoco(shapes / "train").read_image_bytes(0)
    pack = PackedCoco(shapes / "train")
    pack.close()
    del pack
    assert len(os.listdir("/proc/self/fd")) <= before + 5  # the shard that each of the five read from
