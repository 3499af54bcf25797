"""`megdet ensemble`: cases computed by hand, scores better than each file's, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megdet_hpc.data.masks import box_mask
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.ensemble import method
from megdet_hpc.ensemble.__main__ import main
from tests.conftest import Here


def row(image: int, box: list[float], score: float, category: int = 1) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def write(path: Path, rows: Any) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def merged(here: Here, folder: Path, *words: str) -> list[dict[str, Any]]:
    done = here(main, [*words, "--output", str(folder / "out.json"), "--overwrite"])
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return rows


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Three files: two that find an object at IoU 2/3, one that does not; another class stands alone."""
    return [
        write(tmp_path / "a.json", [row(7, [0, 0, 10, 10], 0.8), row(7, [0, 0, 10, 10], 0.4, category=2**40)]),
        write(tmp_path / "b.json", [row(7, [2, 0, 10, 10], 0.4)]),
        write(tmp_path / "c.json", [row(7, [50, 50, 10, 10], 0.6)]),
    ]


def test_weighted_boxes_fusion(here: Here, three: list[str], tmp_path: Path) -> None:
    rows = merged(here, tmp_path, *three)
    assert [r["image_id"] for r in rows] == [7, 7, 7]
    assert [r["category_id"] for r in rows] == [1, 1, 2**40]
    # mean of the scores, times the share of the files that found it
    assert [r["score"] for r in rows] == pytest.approx([0.6 * 2 / 3, 0.6 / 3, 0.4 / 3], abs=1e-6)
    assert rows[0]["bbox"] == pytest.approx([2 * 0.4 / 1.2, 0, 10, 10], abs=2e-3)
    weighted = merged(here, tmp_path, *three, "--weights", "2", "1", "1")
    assert weighted[0]["score"] == pytest.approx((2 * 0.8 + 0.4) / 3 * 3 / 4, abs=1e-6)
    assert weighted[0]["bbox"][0] == pytest.approx(2 * 0.4 / 2.0, abs=2e-3)


def test_the_other_methods(here: Here, three: list[str], tmp_path: Path) -> None:
    assert [r["score"] for r in merged(here, tmp_path, *three, "--method", "nms")] == [0.8, 0.6, 0.4]
    halved = merged(here, tmp_path, *three, "--method", "nms", "--weights", "1", "1", "2")
    assert [(r["score"], r["bbox"][0]) for r in halved] == [(0.6, 50), (0.4, 0), (0.2, 0)]
    soft = merged(here, tmp_path, *three, "--method", "soft_nms")
    assert [r["score"] for r in soft] == pytest.approx([0.8, 0.6, 0.4, 0.4 * math.exp(-8 / 9)], abs=1e-6)
    # each box counts by its score times its IoU with the best, whose score it keeps
    nmw = merged(here, tmp_path, *three, "--method", "nmw")
    assert [r["score"] for r in nmw] == pytest.approx([0.8, 0.6, 0.4], abs=1e-6)
    assert nmw[0]["bbox"][0] == pytest.approx(2 * (0.4 * 2 / 3) / (0.8 + 0.4 * 2 / 3), abs=2e-3)
    assert [r["score"] for r in merged(here, tmp_path, *three, "--method", "nms", "--max-detections", "1")] == [0.8]


def test_an_ensemble_is_scored_beside_its_files(here: Here, shapes: Path, tmp_path: Path) -> None:
    """Three files with the objects of the set, each shifted at random: their mean is nearer to the truth."""
    pack = PackedCoco(shapes / "val")
    draw = np.random.default_rng(0)
    files = []
    for name in "abc":
        rows = []
        for index, image_id in enumerate(pack.image_ids.tolist()):
            own = pack.annotations(index)
            size = [int(pack.heights[index]), int(pack.widths[index])]
            for box, category in zip(own.boxes_xywh, own.category_ids.tolist(), strict=True):
                x, y, w, h = box.tolist()
                shifted = [x + draw.normal(0, w / 10), y + draw.normal(0, h / 10), w, h]
                mask = box_mask(shifted, *size)
                found = row(image_id, shifted, float(draw.uniform(0.5, 1)), category)
                rows.append(found | {"segmentation": {"size": size, "counts": mask["counts"].decode()}})
        files.append(write(tmp_path / f"{name}.json", rows))
    data = ["--data.val", str(shapes / "val")]
    out = tmp_path / "out.json"
    done = here(main, [*files, *data, "--output", str(out)])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    single = [float(re.findall(r": AP=(\S+)", line)[0]) for line in lines[:3]]
    assert lines[3].startswith("masks were left out: only nms and soft_nms keep them")
    together = float(re.findall(r"^result: AP=(\S+) AP50=\S+ images=10$", lines[-1])[0])
    assert together > max(single) + 0.05
    # the file scores the same as any other, and its boxes lie in their images
    words = [*data, "--output", str(tmp_path / "again.json"), "--method", "nms", "--metric", "voc07"]
    again = here(main, [str(out), files[0], *words]).stdout.splitlines()
    assert re.search(rf": AP50_voc07=[01]\.\d+ AP={together:.3f}", again[0])
    assert re.match(r"result: AP50_voc07=[01]\.\d+ AP=", again[-1])
    kept = merged(here, tmp_path, *files, *data, "--method", "nms")
    assert all("segmentation" in found for found in kept)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.json"], "a.json alone is no ensemble; name 2 or more"),
        (["a.json", "a.json"], "a.json: is named twice; --weights gives a file more weight"),
        (["a.json", "b.json", "--weights", "1"], "--weights has 1 numbers for 2 files; accepted: one each"),
        (["a.json", "b.json", "--weights", "1", "-1"], "--weights 1 -1; accepted: finite numbers above 0"),
        (["a.json", "b.json", "--iou", "1.5"], "--iou 1.5; accepted: 0 to 1"),
        (["a.json", "lost.json"], "results lost.json: cannot be read (No such file or directory)"),
        (["a.json", "logits.json"], "results logits.json: has the score 3.5; accepted for an ensemble: 0 to 1"),
        (["a.json", "other.json"], "a.json has detections in 1 images, other.json in 1, and only 0 are the same; an "),
        (["a.json", "classes.json"], "a.json has detections in 1 categories, classes.json in 1, and only 0 are the s"),
        (["a.json", "best.json"], "best.json: there is no best.detections.json beside it; `python -m megdet_hpc.eval"),
        (["a.json", "there.json", "--output", "there.json"], "there.json: exists already; give another --output or -"),
        (["a.json", "there.json", "--output", "there.json", "--overwrite"], "--output there.json: is one of the files"),
    ],
)
def test_what_is_refused(
    words: list[str], said: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, own in {
        "a": row(1, [0, 0, 5, 5], 0.5),
        "b": row(1, [1, 0, 5, 5], 0.5),
        "logits": row(1, [0, 0, 5, 5], 3.5),
        "other": row(2, [0, 0, 5, 5], 0.5),
        "classes": row(1, [0, 0, 5, 5], 0.5, category=9),
        "there": row(1, [0, 0, 5, 5], 0.5),
        "best": row(1, [0, 0, 5, 5], 0.5),
    }.items():
        write(tmp_path / f"{name}.json", [own])
    before = (tmp_path / "there.json").read_bytes()
    done = here(main, words if "--output" in words else [*words, "--output", "out.json"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"python -m megdet_hpc.ensemble: error: {said}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.json").exists() and (tmp_path / "there.json").read_bytes() == before


def test_a_file_without_detections_lowers_the_scores(here: Here, three: list[str], tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.json", [])
    rows = merged(here, tmp_path, three[0], empty)
    assert [r["score"] for r in rows] == pytest.approx([0.4, 0.2], abs=1e-6)
    rows = merged(here, tmp_path, empty, write(tmp_path / "flat.json", [row(1, [3, 3, 0, 5], 0.5)]))
    assert rows == []


def test_without_the_library(here: Here, three: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "ensemble_boxes", None)
    done = here(main, [*three, "--output", str(tmp_path / "out.json")])
    assert done.returncode == 2
    assert done.stderr.endswith(
        "--method wbf needs ensemble-boxes, which is not installed: pip install ensemble-boxes, or '.[ensemble]' in a "
        "checkout; nms and soft_nms do without\n"
    )
    assert here(main, [*three, "--method", "nms", "--output", str(tmp_path / "out.json")]).returncode == 0
