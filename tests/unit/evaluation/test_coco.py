from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.coco import average_precision, result_line, write_results


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
    assert average_precision(pack, detections)["AP"] == pytest.approx(scorer.stats[0], abs=1e-6)
    assert set(json.loads((tmp_path / "results.json").read_text())[0]) == {"image_id", "category_id", "bbox", "score"}


def test_result_line() -> None:
    assert result_line({"AP": 0.12345, "AP50": -1.0}, images=7) == "result: AP=0.123 AP50=0.000 images=7"
