"""`bench index`: its report is whole, and what it says of memory is what the kernel counts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megdet_hpc.bench.__main__ import main
from megdet_hpc.bench.set_parts import index_mib
from megdet_hpc.data.pack_index import INDEX_NAME
from megdet_hpc.data.packed_coco import PackedCoco


def test_the_report_is_whole(tmp_path: Path) -> None:
    sizes = ["--images", "300", "900", "--boxes", "3", "--images-per-shard", "200", "--ranks", "2"]
    main(["index", *sizes, "--folder", str(tmp_path), "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    times = report["processor time, microseconds an image"]
    assert [row["images"] for row in times] == [300, 900] and [row["boxes"] for row in times] == [900, 2700]
    assert all(row[part] > 0 for row in times for part in ("packing", "verifying", "planning, uniform", "scoring"))
    (slope,) = report["slope: exponent of the number of images, 1 is linear"]
    assert set(slope) == {"packing", "verifying", "planning, uniform", "planning, shard_local", "scoring"}
    opened = report["opening by 2 ranks of a node"][1]
    # two ranks map the same pages, so together they hold the file once; a page of the header is not mapped
    assert opened["index in memory, all ranks, MiB"] == pytest.approx(opened["index, MiB"], abs=0.02)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


def test_memory_of_the_index_is_what_is_mapped(shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    shutil.copytree(shapes / "train", folder)  # which no other process maps
    pack = PackedCoco(folder)
    for array in pack.index.block.arrays.values():
        array.reshape(-1).view(np.uint8).max(initial=0)
    assert index_mib(os.getpid(), folder / INDEX_NAME) * 2**20 >= pack.index_bytes
    assert index_mib(os.getpid(), folder / "nothing") == 0
