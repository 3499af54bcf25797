from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.image import imread

from data_prep.pack_coco import main as pack_coco
from data_prep.pack_statistics import draw_statistics
from data_prep.show_pack import draw_images
from megdet_hpc.augmented import draw_augmented
from megdet_hpc.compare.figure import draw_comparison
from megdet_hpc.config import Config, DataConfig
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.masks import box_mask
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.page import plain
from megdet_hpc.eigenspectrum.figure import draw_spectra
from megdet_hpc.evaluation.detections import DetectionTable, objects
from megdet_hpc.log import MetricsLog, read_metrics
from megdet_hpc.record.run_record import read_run
from megdet_hpc.report.curves import draw_curves
from megdet_hpc.report.pictures import draw_predictions


def test_metrics_survive_a_resume_and_a_cut_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('\0\0\0\n7\n{"step": "2", "loss": 1.0}\n{"step": null}\n{"step": 4, "lo')
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


def test_names_with_underscores_before_them_are_in_the_legend() -> None:
    """matplotlib takes them for its own lines. Names of classes and of runs' folders are shown beside others."""
    figure, axes = plt.subplots()
    for name in ("_person", "person", "cat_"):
        axes.plot([1, 2], label=plain(name))
    shown = [text.get_text().strip("\u200b") for text in axes.legend().get_texts()]
    plt.close(figure)
    assert shown == ["_person", "person", "cat_"]


def test_names_with_dollars_are_drawn_as_they_are(shapes: Path, tmp_path: Path) -> None:
    """What matplotlib takes for mathematics, and cannot read, ended a training at its evaluation."""
    coco = json.loads((shapes / "coco" / "annotations" / "instances_val.json").read_text())
    for number, category in enumerate(coco["categories"]):
        category["name"] = f"$_$ {number}"
    named = tmp_path / "named.json"
    named.write_text(json.dumps(coco))
    words = ["--annotations", named, "--images", shapes / "coco" / "val", "--output", tmp_path / "pack"]
    pack_coco([str(word) for word in words])
    dataset = DetectionDataset(PackedCoco(tmp_path / "pack"), DataConfig(), training=False, seed=0)
    found = np.array([[dataset.pack.image_ids[1], 5, 5, 30, 30, 0.9, dataset.categories.ids[0]]])
    draw_predictions(dataset, found, tmp_path / "predictions.png", num_images=2)
    draw_augmented(Config(data=DataConfig(train=str(tmp_path / "pack"))), tmp_path / "augmented.png", 1, 1)
    for figure in (draw_images(dataset.pack, [0, 1], "$_$"), draw_statistics(dataset.pack, "$_$")):
        figure.savefig(io.BytesIO())
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 2.0, "lr": 0.01})
    log.close()
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "runs/$_$")
    (tmp_path / "config.yaml").write_text("log_every: 1\n")
    draw_comparison([read_run(tmp_path)], ["$_$"], tmp_path / "compare.png")
    draw_spectra({"$_$": []}, tmp_path / "spectra.png", "$_$")
