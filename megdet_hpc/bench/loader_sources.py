"""The same images in several forms of storage. Each is a data set that differs only in the source of the bytes.

Every source decodes and augments with `DetectionDataset.sample`. Only "files, Pillow" decodes as a simple torch data
set does. Keys are (epoch, index), the same as in the training loader.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.decode import decode_rgb, decode_with_pillow
from megdet_hpc.data.sample import Sample
from megdet_hpc.files import sync_folder

PACK = "this pack"
MEMORY = "bytes in memory (limit)"
FILES = "files, our decoder"
FILES_PILLOW = "files, Pillow"
LMDB = "LMDB"
TAR = "WebDataset"
# WebDataset gives whole tar files to workers.
TAR_SHARDS = 4


class FileSource(Dataset[Sample]):
    """One file per image."""

    def __init__(
        self, data: DetectionDataset, paths: list[Path], decode: Callable[[bytes | memoryview, bool], Any] = decode_rgb
    ) -> None:
        self._data, self._decode = data, decode
        self.paths = paths

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        with open(self.paths[key[1]], "rb") as file:
            return self._data.sample(key, file.read(), self._decode)


class MemorySource(Dataset[Sample]):
    """Bytes in memory, for the speed of decoding and augmentation alone. Each worker holds a copy."""

    def __init__(self, data: DetectionDataset, encoded: list[bytes]) -> None:
        self._data, self._encoded = data, encoded

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self._data.sample(key, self._encoded[key[1]])


class LmdbSource(Dataset[Sample]):
    """An LMDB database, opened in each process at its first read."""

    def __init__(self, data: DetectionDataset, path: Path) -> None:
        self._data, self._path = data, path
        self._transaction: Any = None

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        if self._transaction is None:
            environment = importlib.import_module("lmdb").open(
                str(self._path), subdir=False, readonly=True, lock=False, readahead=False
            )
            self._transaction = environment.begin(buffers=False)
        return self._data.sample(key, self._transaction.get(b"%08d" % key[1]))

    def __reduce__(self) -> tuple[type[LmdbSource], tuple[DetectionDataset, Path]]:
        return LmdbSource, (self._data, self._path)


class TarSource(IterableDataset[Sample]):
    """WebDataset over tar files, read in order and repeated."""

    def __init__(self, data: DetectionDataset, paths: list[Path]) -> None:
        self._data, self._paths = data, paths

    def __iter__(self) -> Iterator[Sample]:
        webdataset = importlib.import_module("webdataset")
        samples = webdataset.WebDataset([str(path) for path in self._paths], shardshuffle=False, empty_check=False)
        for sample in samples.repeat():
            yield self._data.sample((0, int(sample["__key__"])), sample["jpg"])


def write_lmdb(path: Path, encoded: list[bytes]) -> None:
    """Write images under the keys 00000000, 00000001, ..."""
    size = 2 * sum(map(len, encoded)) + 2**24
    environment = importlib.import_module("lmdb").open(str(path), subdir=False, map_size=size)
    with environment.begin(write=True) as transaction:
        for index, data in enumerate(encoded):
            transaction.put(b"%08d" % index, data)
    environment.close()


def write_tars(folder: Path, encoded: list[bytes]) -> list[Path]:
    """Write TAR_SHARDS tar files, images in order, and return their paths."""
    webdataset = importlib.import_module("webdataset")
    paths = [folder / f"images-{number:03d}.tar" for number in range(min(TAR_SHARDS, len(encoded)))]
    for number, path in enumerate(paths):
        with webdataset.TarWriter(str(path)) as writer:
            for index in range(number, len(encoded), len(paths)):
                writer.write({"__key__": f"{index:08d}", "jpg": encoded[index]})
    return paths


def write_files(folder: Path, encoded: list[bytes]) -> list[Path]:
    """Write each image as a file of its own and return their paths."""
    folder.mkdir()
    paths = [folder / f"{index:08d}.jpg" for index in range(len(encoded))]
    for path, data in zip(paths, encoded, strict=True):
        path.write_bytes(data)
    return paths


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):  # OSError: a library that it loads is missing
        return False
    return True


def drop_from_cache(paths: list[Path]) -> None:
    """Ask the kernel to forget the pages of these files.

    The kernel keeps names and inodes, and pages that a process has mapped. The caches of a file server and of the host
    of a virtual machine stay.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only clean pages are dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Sources:
    """All sources of the images of one pack, written into a folder.

    Args:
        data: data set of the pack.
        encoded: bytes of the image files.
        folder: empty folder on the file system that is measured.
    """

    def __init__(self, data: DetectionDataset, encoded: list[bytes], folder: Path) -> None:
        self.files = write_files(folder / "files", encoded)
        self.missing = [module for module in ("lmdb", "webdataset") if not installed(module)]
        self.datasets: dict[str, Dataset[Sample]] = {
            MEMORY: MemorySource(data, encoded),
            PACK: data,
            FILES: FileSource(data, self.files),
            FILES_PILLOW: FileSource(data, self.files, decode_with_pillow),
        }
        self.paths = {PACK: data.pack.shard_paths, FILES: self.files, FILES_PILLOW: self.files}
        if "lmdb" not in self.missing:
            write_lmdb(folder / "images.lmdb", encoded)
            self.datasets[LMDB], self.paths[LMDB] = LmdbSource(data, folder / "images.lmdb"), [folder / "images.lmdb"]
        if "webdataset" not in self.missing:
            tars = write_tars(folder, encoded)
            self.datasets[TAR], self.paths[TAR] = TarSource(data, tars), tars
        sync_folder(folder)
