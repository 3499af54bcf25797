from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from megdet_hpc.config import DataConfig
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.masks import box_mask
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.detections import DetectionTable, objects
from megdet_hpc.log import MetricsLog, read_metrics
from megdet_hpc.report.curves import draw_curves
from megdet_hpc.report.pictures import draw_predictions


def test_metrics_survive_a_resume_and_a_cut_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('\0\0\0\n7\n{"step": 4, "lo')
    again = MetricsLog(tmp_path, 2)
    again.write(3, {"loss": 0.25})
    again.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_pictures_show_something(shapes: Path, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 20):
        log.write(step, {"loss": 2 / step, "loss_classifier": 1 / step, "lr": 0.01, "grad_scale": 65536.0})
    log.write(19, {"val/AP": 0.3, "val/AP50": 0.6})
    log.close()
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "a run")
    dataset = DetectionDataset(PackedCoco(shapes / "val"), DataConfig(), training=False, seed=0)
    detection = np.array([[dataset.pack.image_ids[1], 5, 5, 30, 30, 0.9, dataset.categories.ids[0]]])
    draw_predictions(dataset, np.zeros((0, 7)), tmp_path / "nothing.png")
    draw_predictions(dataset, detection, tmp_path / "one.png")
    table = DetectionTable.of(detection)
    height, width = int(dataset.pack.heights[1]), int(dataset.pack.widths[1])
    mask = objects([box_mask([5, 5, 30, 30], height, width)])
    draw_predictions(dataset, dataclasses.replace(table, masks=mask), tmp_path / "mask.png")
    nothing, one, masked, curves = (imread(tmp_path / f"{name}.png") for name in ("nothing", "one", "mask", "curves"))
    assert nothing.shape == one.shape == masked.shape and min(nothing.shape[:2]) > 500
    assert not np.array_equal(nothing, one) and not np.array_equal(one, masked)
    assert curves.std() > 0.05
