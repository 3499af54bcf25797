"""Image and category ids beyond float64's integers, up to the ends of 64 bits, stay what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megdet_hpc.config import DataConfig
from megdet_hpc.data.categories import match_labels
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.coco import score
from megdet_hpc.evaluation.inference import SetDetection
from megdet_hpc.evaluation.results import read_results, write_results
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.report.pictures import draw_predictions
from tests.cases.scoring_sets import Perfect, coco, pack

IMAGES = [20230415123456002, 20230415123456001, 2**63 - 1, 2**63 - 2, -(2**63) + 1, 0]
CATEGORIES = {2**53 + 1: "red", 2**53 + 2: "blue"}


def test_ids_are_integers_from_end_to_end(tmp_path: Path) -> None:
    packed = PackedCoco(pack(coco(IMAGES, CATEGORIES), tmp_path))
    dataset = DetectionDataset(packed, DataConfig(val_short_side=90, max_side=200), training=False, seed=0)
    labels = match_labels(dataset.categories, dataset.categories, "data.train", "data.val")
    world, cpu = SerialCommunicator(), torch.device("cpu")
    found = SetDetection(dataset, cpu, labels, world, num_workers=0).of_all(Perfect([1, 2, 1, 2]))
    assert found is not None
    scores = score(packed, found)
    assert scores.metrics["AP"] == pytest.approx(1) and scores.boxes == 4 * len(IMAGES)
    write_results(tmp_path / "detections.json", found)
    rows = json.loads((tmp_path / "detections.json").read_text())
    assert [row["image_id"] for row in rows] == [i for i in IMAGES for _ in range(4)]
    assert {row["category_id"] for row in rows} == set(CATEGORIES)
    again = read_results(tmp_path / "detections.json", packed)
    assert again.image_ids.tolist() == [row["image_id"] for row in rows]
    assert score(packed, again).metrics["AP"] == pytest.approx(1)
    assert len(found.of_image(IMAGES[0])) == len(found.of_image(IMAGES[1])) == 4
    draw_predictions(dataset, found, tmp_path / "predictions.png", num_images=2)
    assert (tmp_path / "predictions.png").stat().st_size > 0
