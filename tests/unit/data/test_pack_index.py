"""megdet_hpc/data/pack_index.py: one file for all processes of a node, which says what the shards say."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # data_prep of this checkout

from data_prep import verify_pack
from data_prep.stage_pack import stage
from megdet_hpc.data.pack_index import BEGIN, INDEX_NAME
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.shard_format import PackError

MAPPED = "one copy for all processes of this node"


@pytest.fixture
def pack(shapes: Path, tmp_path: Path) -> Path:
    """A pack of its own, with the times of the original."""
    shutil.copytree(shapes / "train", tmp_path / "pack")
    return tmp_path / "pack"


def digest(pack: PackedCoco) -> str:
    """Of all that the index holds."""
    total = hashlib.sha256()
    for name, array in sorted(pack.index.block.arrays.items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def in_memory(folder: Path) -> PackedCoco:
    """The pack without a file for its index: a folder has its name."""
    (folder / INDEX_NAME).unlink(missing_ok=True)
    (folder / INDEX_NAME).mkdir()
    pack = PackedCoco(folder)
    (folder / INDEX_NAME).rmdir()
    return pack


def test_the_packer_writes_what_a_reader_would_make(pack: Path) -> None:
    written = (pack / INDEX_NAME).read_bytes()
    mapped = PackedCoco(pack)
    assert mapped.index.origin == MAPPED
    own = in_memory(pack)
    assert "in memory, one copy for this rank" in own.index.origin
    assert f"{pack / INDEX_NAME} cannot be written" in own.index.origin
    assert digest(own) == digest(mapped)
    PackedCoco(pack)
    assert (pack / INDEX_NAME).read_bytes() == written
    assert [path.name for path in pack.iterdir() if path.name.endswith(".tmp")] == []


def test_the_index_says_what_the_shards_say(pack: Path) -> None:
    found = PackedCoco(pack)
    ids, boxes, names = [], [], []
    for path in found.shard_paths:
        with h5py.File(path, "r") as file:
            ids += file["images/id"][()].tolist()
            boxes += file["annotations/bbox"][()].tolist()
            offset = file["images/file_name_offset"][()]
            names += [bytes(file["images/file_name"][a:b]) for a, b in pairwise(offset)]
    assert found.image_ids.tolist() == ids
    assert found.index.boxes.tolist() == boxes
    assert [found.file_name(index).encode() for index in range(len(found))] == names
    assert not found.index.boxes.flags.writeable


def flip(index: Path, position: int) -> None:
    data = bytearray(index.read_bytes())
    data[position] ^= 1
    index.write_bytes(data)


DAMAGE: dict[str, Any] = {
    "missing": lambda pack: (pack / INDEX_NAME).unlink(),
    "empty": lambda pack: (pack / INDEX_NAME).write_bytes(b""),
    "cut off": lambda pack: os.truncate(pack / INDEX_NAME, (pack / INDEX_NAME).stat().st_size - 8),
    "a bit of the header": lambda pack: flip(pack / INDEX_NAME, 20),
    "a bit of a box": lambda pack: flip(pack / INDEX_NAME, BEGIN + 999),
    "a bit of the sums": lambda pack: flip(pack / INDEX_NAME, -1),
    "another manifest": lambda pack: (pack / "manifest.json").write_text(
        json.dumps(json.loads((pack / "manifest.json").read_text()))
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_missing_or_damaged_file_is_written_anew(name: str, pack: Path) -> None:
    expected, sound = digest(PackedCoco(pack)), (pack / INDEX_NAME).read_bytes()
    DAMAGE[name](pack)
    again = PackedCoco(pack)
    assert (again.index.origin, digest(again)) == (MAPPED, expected)
    assert len((pack / INDEX_NAME).read_bytes()) == len(sound)
    if name != "another manifest":
        assert (pack / INDEX_NAME).read_bytes() == sound


def test_a_shard_that_changed_is_read_again(pack: Path) -> None:
    before = PackedCoco(pack).annotations(0)
    with h5py.File(pack / "shard-00000.h5", "r+") as file:
        file["annotations/bbox"][0, 0] += 1
    assert PackedCoco(pack).annotations(0).boxes_xywh[0, 0] == before.boxes_xywh[0, 0] + 1
    with h5py.File(pack / "shard-00000.h5", "r+") as file:
        file["annotations/bbox"][0, 2] = -1
    with pytest.raises(PackError, match=r"annotations/bbox\[0\] is .* accepted: 4 finite numbers"):
        PackedCoco(pack)


def test_a_copy_with_other_times_keeps_its_file(pack: Path) -> None:
    inode = (pack / INDEX_NAME).stat().st_ino
    later = time.time_ns() + 10**9
    for path in pack.glob("shard-*.h5"):
        os.utime(path, ns=(later, later))
    PackedCoco(pack)
    status = (pack / INDEX_NAME).stat()
    assert (status.st_ino, status.st_mtime_ns > later) == (inode, True)


def open_at_once(folder: Path, start: Any, found: Any) -> None:
    start.wait(60)
    pack = PackedCoco(folder)
    found.put((pack.index.origin, digest(pack), (folder / INDEX_NAME).stat().st_ino))


def test_processes_that_open_at_once_share_one_file(pack: Path) -> None:
    expected = digest(PackedCoco(pack))
    (pack / INDEX_NAME).unlink()
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(4), context.Queue()
    processes = [context.Process(target=open_at_once, args=(pack, start, found)) for _ in range(4)]
    for process in processes:
        process.start()
    results = {found.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert results == {(MAPPED, expected, (pack / INDEX_NAME).stat().st_ino)}


def test_verify_compares_it_with_the_shards(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_pack.main([str(pack)]) == 0
    # two ids change places: the sums are right, which only a look at the shards shows
    with open(pack / INDEX_NAME, "r+b") as file:
        file.seek(BEGIN)
        one, other = np.frombuffer(file.read(16), np.int64)
        file.seek(BEGIN)
        file.write(np.array([other, one]).tobytes())
    capsys.readouterr()
    assert verify_pack.main([str(pack)]) == 1
    assert f"index: {INDEX_NAME}: images/id differs from the shards; remove it" in capsys.readouterr().err


def test_staging_writes_one(pack: Path, tmp_path: Path) -> None:
    expected = (pack / INDEX_NAME).read_bytes()
    (pack / INDEX_NAME).unlink()
    stage(pack, tmp_path / "copy")
    assert (tmp_path / "copy" / INDEX_NAME).read_bytes() == expected
    assert not (pack / INDEX_NAME).exists()


def test_a_pack_of_format_1_gets_one(tmp_path: Path) -> None:
    old, pack = Path(__file__).resolve().parents[2] / "files" / "pack_format_1", tmp_path / "pack"
    pack.mkdir()
    (pack / "manifest.json").write_bytes((old / "manifest.json").read_bytes())
    (pack / "shard-00000.h5").write_bytes(gzip.decompress((old / "shard-00000.h5.gz").read_bytes()))
    found = PackedCoco(pack)
    assert found.index.origin == MAPPED
    assert not found.index.segmentation_crc32.any()
    assert not found.index.flags["difficult"].any()
    assert digest(found) == digest(in_memory(pack))
