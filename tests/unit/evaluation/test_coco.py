from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.coco import average_precision, class_table, result_line, score
from megdet_hpc.evaluation.results import write_results


def truth_as_detections(pack: PackedCoco, shift: float = 0.0) -> NDArray[np.float64]:
    """(k, 7) detections: every box that is no crowd, moved by `shift` of its width, scores falling."""
    rows = []
    for index, image_id in enumerate(pack.image_ids):
        found = pack.annotations(index)
        for box, category, crowd in zip(found.boxes_xywh, found.category_ids, found.iscrowd, strict=True):
            if not crowd:
                rows.append([image_id, box[0] + shift * box[2], *box[1:], 1 - len(rows) / 1000, category])
    return np.array(rows)


def test_perfect_none_and_shifted(shapes: Path) -> None:
    pack = PackedCoco(shapes / "val")
    perfect = average_precision(pack, truth_as_detections(pack))
    assert perfect["AP"] == pytest.approx(1.0) and perfect["AP50"] == pytest.approx(1.0)
    none = average_precision(pack, np.zeros((0, 7)))
    assert none["AP"] == none["AP50"] == 0.0
    shifted = average_precision(pack, truth_as_detections(pack, shift=0.2))  # IoU 0.8 / 1.2 = 0.67
    assert shifted["AP50"] == pytest.approx(1.0)
    assert shifted["AP75"] == 0.0


def test_results_file_scores_the_same_against_the_original_annotations(shapes: Path, tmp_path: Path) -> None:
    pack = PackedCoco(shapes / "val")
    detections = truth_as_detections(pack, shift=0.1)[3:]
    write_results(tmp_path / "results.json", detections)
    original = COCO(str(shapes / "coco" / "annotations" / "instances_val.json"))
    scorer = COCOeval(original, original.loadRes(str(tmp_path / "results.json")), "bbox")
    scorer.evaluate(), scorer.accumulate(), scorer.summarize()
    ours = average_precision(pack, detections)
    assert list(ours) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    theirs = [math.nan if value == -1 else value for value in scorer.stats]
    assert list(ours.values()) == pytest.approx(theirs, abs=1e-6, nan_ok=True)
    assert set(json.loads((tmp_path / "results.json").read_text())[0]) == {"image_id", "category_id", "bbox", "score"}


def test_each_class_has_its_own_score(shapes: Path) -> None:
    pack = PackedCoco(shapes / "val")
    perfect = truth_as_detections(pack)
    lost = int(pack.categories[0]["id"])
    scores = score(pack, perfect[perfect[:, 6] != lost])
    first, *others = scores.classes
    assert first.name == pack.categories[0]["name"] and first.boxes > 0 and first.ap == first.ap50 == 0.0
    assert all(c.ap == pytest.approx(1.0) for c in others) and scores.boxes == len(perfect)
    assert scores.metrics["AP"] == pytest.approx(np.mean([c.ap for c in scores.classes]))
    assert scores.logged()[f"AP50/{others[0].name}"] == pytest.approx(1.0)
    lines = class_table(scores.classes).splitlines()
    assert lines[0].split() == ["class", "boxes", "AP", "AP50"]
    assert lines[1].split() == [first.name, str(first.boxes), "0.000", "0.000"]


def test_a_number_that_does_not_exist_is_none(shapes: Path) -> None:
    assert result_line({"AP": 0.12345, "AP50": 0.0}, images=7) == "result: AP=0.123 AP50=0.000 images=7"
    assert result_line({"AP": math.nan, "AP50": math.nan}, images=7) == "result: nothing to score images=7"
