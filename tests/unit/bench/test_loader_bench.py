"""`bench loader`: all sources give the same samples, and its report is whole."""

from __future__ import annotations

import json
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megdet_hpc.bench.__main__ import main
from megdet_hpc.bench.loader import AUGMENT, DECODE, LOAD, READ
from megdet_hpc.bench.loader_sources import FILES, FILES_PILLOW, MEMORY, PACK, TAR, Sources
from megdet_hpc.bench.loader_speed import proportional_mib, run_once
from megdet_hpc.bench.read_speed import PLAIN
from megdet_hpc.config import DataConfig
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.packed_coco import PackedCoco

CONFIG = DataConfig(short_sides=(64,), max_side=128, val_short_side=64)


@pytest.fixture(scope="module")
def sources(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    data = DetectionDataset(PackedCoco(shapes / "train"), CONFIG, training=True, seed=0)
    encoded = [data.pack.read_image_bytes(index) for index in range(len(data))]
    return Sources(data, encoded, tmp_path_factory.mktemp("sources"))


def test_every_source_gives_the_same_samples(sources: Sources) -> None:
    assert {MEMORY, PACK, FILES, FILES_PILLOW} <= set(sources.datasets)
    for index in (0, 7):
        expected = sources.datasets[PACK][(0, index)]
        for name, dataset in sources.datasets.items():
            if name == TAR:
                found = next(sample for sample in iter(dataset) if sample.image_id == expected.image_id)
            else:
                found = dataset[(0, index)]
            assert found.image_id == expected.image_id, name
            assert (found.image.int() - expected.image.int()).abs().max() <= 2, name
            assert torch.equal(found.target.boxes, expected.target.boxes), name


def test_the_set_is_repeated_and_workers_are_weighed(sources: Sources) -> None:
    run = run_once(sources.datasets[PACK], num_images=4, images=12, workers=1)
    assert run.images_per_s > 0 and run.first_batch_s > 0
    assert run.worker_mib is None or 1 < run.worker_mib < 4096
    assert run_once(sources.datasets[PACK], num_images=4, images=12, workers=0).worker_mib is None


def test_memory_counts_what_a_process_holds() -> None:
    before = proportional_mib(os.getpid())
    if before is None:
        pytest.skip("no /proc/PID/smaps_rollup here")
    # fresh pages: an array might get memory that the process holds already
    with mmap.mmap(-1, 32 * 2**20) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        after = proportional_mib(os.getpid())
    assert after is not None and 24 < after - before < 64


def test_report_over_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = []
    (tmp_path / "images").mkdir()
    for index in range(4):
        noise = np.random.default_rng(index).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{index}.jpg")
        images.append({"id": index, "file_name": f"{index}.jpg", "height": 60, "width": 80})
    coco = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "noise"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    named = ["--images", str(tmp_path / "images"), "--annotations", str(tmp_path / "coco.json")]
    sizes = ["--loads", "6", "--repeats", "1", "--workers", "0", "--short-side", "64", "--folder", str(tmp_path)]
    main(["loader", *named, *sizes, "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    reading = {row["reading"]: row for row in report[READ]}
    assert {"open and read single files", "h5py slices", "read_image_bytes"} < set(reading)
    assert reading[PLAIN]["to_positioned"] == reading["open and read single files"]["to_files"] == 1
    assert [row["max_difference"] for row in report[DECODE] if row["decoder"] == "Pillow"] == [0]
    rows = {(row["source"], row["cache"]) for row in report[LOAD]}
    assert {(PACK, "warm"), (PACK, "cold"), (FILES, "cold"), (MEMORY, "-")} <= rows
    assert not list(tmp_path.glob("megdet_bench.*"))
    assert "images_per_s" in capsys.readouterr().out


def test_report_over_the_augmentations(shapes: Path, tmp_path: Path) -> None:
    sizes = ["--limit", "4", "--loads", "4", "--repeats", "1", "--workers", "0", "--short-side", "64"]
    named = ["--data", str(shapes / "train"), "--parts", "augment", "--folder", str(tmp_path)]
    main(["loader", *named, *sizes, "--json", str(tmp_path / "report.json")])
    rows = {row["augmentation"]: row for row in json.loads((tmp_path / "report.json").read_text())[AUGMENT]}
    assert rows["resize and flip"]["to_plain"] == 1
    assert {"photometric 0.5", "mosaic 1", "copy_paste 1"} <= set(rows)
    assert all(row["cpu_ms"] > 0 and row["images_per_s"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a set"),
        (["--data", "x", "--repeats", "0"], "1 or more"),
        (["--data", "x", "--loads", "3"], "--loads 3"),
        (["--data", "x", "--short-side", "2000"], "--short-side 2000"),
        (["--data", "does/not/exist"], "does/not/exist"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["loader", *arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert "megdet_hpc.bench" in sys.modules
