"""Every kind of detector as a graph, at sizes that its example had not and on an image without objects."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from megdet_hpc.config import Config, EvaluationConfig
from megdet_hpc.export.check import compare
from megdet_hpc.export.graph import DetectorGraph, Format, read, write
from megdet_hpc.models.detector import Draws
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.serial import SerialCommunicator
from tests.families import EVERYWHERE, FAMILIES, NUM_CATEGORIES, batch

SIZES = ((64, 64), (70, 101), (40, 64))
LIMIT = 20


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mask_rcnn", "torchscript"),
        ("cascade_mask_rcnn", "onnx"),
        ("retinanet", "onnx"),
        ("retinanet", "torchscript"),
        ("pelee", "onnx"),
        ("dsod", "torchscript"),
    ],
)
def test_a_graph_finds_what_the_detector_finds(family: str, kind: Format, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    geometry = FAMILIES[family].geometry
    sizes = [SIZES[0]] * 3 if geometry.square else SIZES
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    limits = EvaluationConfig(score_threshold=0.03, max_detections=LIMIT)
    norm = dataclasses.replace(EVERYWHERE, momentum=1.0)
    config = Config(model=FAMILIES[family], norm=norm, evaluation=limits)
    model = build_detector(config, num_categories=NUM_CATEGORIES, group=SerialCommunicator())
    # first weights would give all boxes nearly one score, and rounding would choose among them
    torch.manual_seed(0)
    for path in model.class_layers():
        nn.init.normal_(model.get_submodule(path).weight, std=0.2)  # type: ignore[arg-type]
    with torch.no_grad():
        model.losses(batch(dtype=torch.float32), Draws(0, 0))  # for the running statistics
    model.eval()
    graph = DetectorGraph(model, geometry).eval()
    write(graph, kind, tmp_path / "graph", images[0], {})
    run = read(tmp_path / "graph", kind)
    found = compare(graph, run, images, threshold=limits.score_threshold, limit=LIMIT, edge=1e-4)
    lines = "\n".join(difference.line() for difference in found)
    assert all(difference.within(0.01, 1e-4) for difference in found), lines
    assert sum(difference.counts[0] for difference in found) > LIMIT
    outputs = run(images[1])
    assert len(outputs) == (4 if model.has_masks else 3)
    if geometry.square:
        with pytest.raises(Exception, match=r"64 x 64 pixels|Got: 70"):
            run(torch.zeros(3, 70, 101, dtype=torch.uint8))
    if model.has_masks:
        assert outputs[3].shape == (len(outputs[0]), 28, 28) and 0 <= float(outputs[3].min()) <= 1
