"""Annotation ids that start at 0, are negative or occur twice: detections that are the truth score 1."""

from __future__ import annotations

from pathlib import Path

import pytest

from megdet_hpc.data.coco_json import rebuild_coco
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.coco import average_precision
from tests.cases.scoring_sets import coco, pack, truth


@pytest.mark.parametrize("first", [1, 0, -3, -4, 2**62])
def test_perfect_detections_score_1_whatever_the_ids(first: int, tmp_path: Path) -> None:
    ids = range(first, first + 4)
    packed = PackedCoco(pack(coco([1], annotation_ids=ids), tmp_path))
    found = average_precision(packed, truth(packed))
    assert (found["AP"], found["AP50"], found["AR100"]) == pytest.approx((1, 1, 1))
    assert [record["id"] for record in rebuild_coco(packed)["annotations"]] == list(ids)


@pytest.mark.parametrize("ids", [[0] * 8, [7] * 8, [1, 2, 3, 4] * 2])
def test_ids_that_occur_repeatedly(ids: list[int], tmp_path: Path) -> None:
    packed = PackedCoco(pack(coco([1, 2], annotation_ids=ids), tmp_path))
    assert average_precision(packed, truth(packed))["AR100"] == pytest.approx(1)
    assert average_precision(packed, truth(packed))["AP"] == pytest.approx(1)
