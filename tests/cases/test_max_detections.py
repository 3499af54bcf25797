"""evaluation.max_detections reaches the scorer, and each number means what its name says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.coco import metric_text, score, what_is_missing, what_is_scored
from tests.cases.scoring_sets import coco, pack, truth


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> PackedCoco:
    """One image with 150 boxes of one class, 9 x 7 pixels each."""
    source = coco([1], {1: "seed"})
    boxes = [[x * 10, y * 8, 9, 7] for y in range(10) for x in range(15)]
    source["images"][0] |= {"width": 160, "height": 90}
    record = source["annotations"][0]
    source["annotations"] = [{**record, "id": i, "bbox": box, "area": 63} for i, box in enumerate(boxes)]
    return PackedCoco(pack(source, tmp_path_factory.mktemp("crowded")))


def test_more_than_100_of_a_class_count_where_they_are_asked_for(crowded: PackedCoco) -> None:
    found = truth(crowded)
    usual = score(crowded, found).metrics
    assert usual["AR100"] == pytest.approx(100 / 150) and usual["AP"] < 0.7
    more = score(crowded, found, max_detections=300).metrics
    assert more["AP"] == more["AP50"] == more["APs"] == pytest.approx(1) and more["AR300"] == pytest.approx(1)
    assert [key for key in more if key.startswith("AR")] == ["AR1", "AR10", "AR300", "ARs", "ARm", "ARl"]
    assert more["AR10"] == usual["AR10"] == pytest.approx(10 / 150)


def test_fewer_than_100(crowded: PackedCoco) -> None:
    few = score(crowded, truth(crowded), max_detections=50).metrics
    assert few["AR50"] == pytest.approx(50 / 150) and "AR100" not in few
    least = score(crowded, truth(crowded), max_detections=5).metrics
    assert [key for key in least if key.startswith("AR")] == ["AR1", "AR5", "ARs", "ARm", "ARl"]
    assert least["AR5"] == pytest.approx(5 / 150)


def test_another_number_than_100_is_said(crowded: PackedCoco) -> None:
    assert what_is_scored(crowded, 1, 100) == []
    (said,) = what_is_scored(crowded, 1, 300)
    assert (
        said
        == "evaluation.max_detections is 300: AP and AR300 count so many boxes of an image and class, COCO's own 100"
    )


def test_a_size_without_boxes_has_no_number(crowded: PackedCoco) -> None:
    scores = score(crowded, truth(crowded))
    assert math.isnan(scores.metrics["APl"]) and metric_text(scores.metrics["APl"]) == "none"
    assert what_is_missing(scores, crowded, 1) == ["none: there is no box of that size to find (APm, APl, ARm, ARl)"]
    nothing = score(crowded, truth(crowded).rows(np.zeros(0, dtype=np.int64)))
    assert nothing.metrics["AP"] == 0.0 and metric_text(nothing.metrics["AP"]) == "0.000"
