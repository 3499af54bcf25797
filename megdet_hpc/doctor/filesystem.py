"""Probes of the job's folders: type, free space, speed, HDF5's locks. No collectives."""

from __future__ import annotations

import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import h5py
import numpy as np

from megdet_hpc.doctor.findings import Finding

_MIB = 2**20
_GIB = 2**30
# Two checkpoints are kept while a third is written. Logs and detections need some space too.
MIN_FREE_BYTES = 2 * _GIB
_READ_BYTES = 256 * _MIB
_CHUNK = 4 * _MIB
_RANDOM_BYTES, _RANDOM_READS = 100_000, 64
_WRITE_BYTES = 64 * _MIB
_SMALL_FILES = 50
_SLOW_READ, _SLOW_WRITE = 50e6, 50e6
_SLOW_RANDOM, _SLOW_CREATE = 20e-3, 10e-3
# A ResNet-50 detector with FPN: 41 million weights in float32, and the momentum of each.
_CHECKPOINT_BYTES = 41e6 * 4 * 2
# The kernel writes blank, tab, line feed and backslash of a mount point in octal, and all else as it is.
_ESCAPED = re.compile(r"\\(040|011|012|134)")


def mount_of(folder: Path, mounts: Path = Path("/proc/mounts")) -> tuple[str, str]:
    """Mount point and file system type that a folder lies on."""
    path, best = folder.resolve(), ("/", "unknown")
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").split("\n"):
        if not line:
            continue
        _, point, kind, *_ = line.split(" ")
        point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), point)
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best


def existing_part(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def free_space(folder: Path) -> int:
    """Bytes that a user without root may still write."""
    state = os.statvfs(existing_part(folder))
    return state.f_bavail * state.f_frsize


def probe_writable(use: str, folder: Path) -> Finding:
    """Make the folder if it is missing, write and remove 1 MiB there, and check the free space."""
    name = folder / f".doctor-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _write(name, _MIB)
        finally:
            with suppress(OSError):
                name.unlink()
        free = free_space(folder)
    except OSError as error:
        do = f"give --{use} a folder that this user can write to from this host"
        return Finding("wrong", f"{use} folder", f"{folder}: cannot be written: {error.strerror or error}", do)
    if free < MIN_FREE_BYTES:
        do = f"make room: {MIN_FREE_BYTES / _GIB:g} GiB is the least"
        return Finding("wrong", f"{use} folder", f"{folder}: {free / _GIB:.2f} GiB free", do)
    # rounded, since the space of a shared folder changes between two ranks' calls and equal lines are merged
    return Finding("fine", f"{use} folder", f"{folder}: writable, {_rough(free)} free")


def _rough(size: int) -> str:
    return f"{float(f'{size / _GIB:.1g}'):g} GiB or so"


def _write(path: Path, count: int) -> None:
    block = secrets.token_bytes(_MIB)
    with open(path, "xb", buffering=0) as file:
        for _ in range(count // _MIB):
            file.write(block)
        os.fsync(file.fileno())


def probe_type(use: str, folder: Path) -> Finding:
    """The kind of file system under a folder."""
    point, kind = mount_of(existing_part(folder))
    text = f"{folder}: {kind} mounted on {point}, {_rough(free_space(folder))} free"
    if use == "output" and kind in ("tmpfs", "ramfs"):
        costs = "memory, and checkpoints are lost with the node; write to a disk or the parallel file system"
        return Finding("slow", f"{use} file system", text, costs)
    return Finding("fine", f"{use} file system", text)


def probe_reading(use: str, file: Path, pack_bytes: int) -> list[Finding]:
    """Speed of one long read and of many reads of an image's size. The kernel is asked to drop its copy first.

    Args:
        use: purpose of the folder, as the findings name it.
        file: a shard.
        pack_bytes: size of all shards together.

    Raises:
        OSError: the file cannot be read.
    """
    size = file.stat().st_size
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        begin, count = time.perf_counter(), 0
        while count < min(size, _READ_BYTES):
            got = len(os.pread(descriptor, _CHUNK, count))
            if not got:
                break
            count += got
        rate = count / max(time.perf_counter() - begin, 1e-9)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        positions = np.random.default_rng(0).integers(0, max(1, size - _RANDOM_BYTES), _RANDOM_READS)
        times = []
        for position in positions.tolist():
            begin = time.perf_counter()
            os.pread(descriptor, _RANDOM_BYTES, position)
            times.append(time.perf_counter() - begin)
    finally:
        os.close(descriptor)
    text = f"{file.name}: {rate / 1e6:.0f} MB/s over {count / _MIB:.1f} MiB in order"
    found = []
    if rate < _SLOW_READ and count >= _CHUNK:
        once = f"{pack_bytes / rate:.0f} s to read the {pack_bytes / 1e9:.3g} GB pack once"
        costs = f"{once}; stage it to local scratch"
        found.append(Finding("slow", f"{use} read", text, costs))
    else:
        found.append(Finding("fine", f"{use} read", text))
    middle = median(times)
    text = f"{file.name}: {middle * 1e3:.2f} ms (worst {max(times) * 1e3:.1f}) per random read of 100 KB"
    if middle > _SLOW_RANDOM:
        costs = f"{1 / middle:.0f} images/s per loader worker at most; more data.num_workers, or stage to local scratch"
        found.append(Finding("slow", f"{use} random read", text, costs))
    else:
        found.append(Finding("fine", f"{use} random read", text))
    return found


def probe_writing(use: str, folder: Path) -> list[Finding]:
    """Speed of writing a flushed 64 MiB file and small files, in a temporary folder.

    Raises:
        OSError: the folder cannot be written to.
    """
    own = folder / f".doctor-{os.getpid()}-{secrets.token_hex(4)}"
    own.mkdir(parents=True)
    try:
        begin = time.perf_counter()
        _write(own / "large", _WRITE_BYTES)
        rate = _WRITE_BYTES / (time.perf_counter() - begin)
        begin = time.perf_counter()
        for number in range(_SMALL_FILES):
            (own / f"small-{number}").write_bytes(b"x" * 1000)
        create = (time.perf_counter() - begin) / _SMALL_FILES
        locks = probe_locks(use, folder, own / "locked.h5", write=True)
    finally:
        for path in own.iterdir():
            path.unlink()
        own.rmdir()
    text = f"{folder}: 64 MiB written and flushed at {rate / 1e6:.0f} MB/s"
    if rate < _SLOW_WRITE:
        costs = f"a checkpoint of {_CHECKPOINT_BYTES / 1e9:.2g} GB takes {_CHECKPOINT_BYTES / rate:.0f} s"
        found = [Finding("slow", f"{use} write", text, costs)]
    else:
        found = [Finding("fine", f"{use} write", text)]
    text = f"{folder}: {create * 1e3:.2f} ms per new file of 1 KB"
    if create > _SLOW_CREATE:
        costs = "logs and single image files are slow; keep data packed, and few files in this folder"
        found.append(Finding("slow", f"{use} new files", text, costs))
    else:
        found.append(Finding("fine", f"{use} new files", text))
    return [*found, locks]


def probe_locks(use: str, folder: Path, file: Path, write: bool) -> Finding:
    """Whether HDF5 can lock a file in a folder. The probe makes a file if it may write, else it opens a given one."""
    try:
        with h5py.File(file, "w" if write else "r", locking=True):
            pass
    except OSError as error:
        costs = "nothing here: shards are opened without locks. Other HDF5 programs need HDF5_USE_FILE_LOCKING=FALSE"
        return Finding("slow", f"{use} HDF5 locks", f"{folder}: locks are refused: {error}", costs)
    return Finding("fine", f"{use} HDF5 locks", f"{folder}: locks work")
