"""ScratchDet and Pelee: counts of the authors' networks, maps and boxes, configurations, a small image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config, ModelConfig, NormConfig, PeleeConfig, ScratchDetConfig
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.detectors.pelee import CoarserMap, ResidualPredictionBlock
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.serial import SerialCommunicator

HEADS = ("backbone", "heads")


def on_meta(model: ModelConfig, num_categories: int, where: tuple[Any, ...] = ("backbone",)) -> Detector:
    config = Config(model=model, norm=NormConfig(kind="bn", where=where))
    with torch.device("meta"):
        return build_detector(config, num_categories=num_categories, group=SerialCommunicator())


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("model", "labels", "where", "parameters", "side", "boxes"),
    [
        (ScratchDetConfig(), 21, HEADS, 24_573_212, 300, 8764),
        (ScratchDetConfig(), 81, HEADS, 28_171_052, 300, 8764),
        (ScratchDetConfig(block_order="pre"), 21, ("backbone",), 24_553_262, 300, 8892),
        (ScratchDetConfig(block_order="pre"), 81, HEADS, 28_151_852, 300, 8892),
        (ScratchDetConfig(block_order="pre", backbone="root_resnet18"), 21, ("backbone",), 14_445_102, 300, 8892),
        (PeleeConfig(), 21, ("backbone",), 5_425_892, 304, 5142),
        (PeleeConfig(), 81, ("backbone",), 5_981_012, 304, 5142),
        (PeleeConfig(head_kernel=3), 21, ("backbone",), 7_269_092, 304, 5142),
    ],
)
def test_parameters_and_boxes_are_the_authors(
    model: ModelConfig, labels: int, where: tuple[str, ...], parameters: int, side: int, boxes: int
) -> None:
    detector = on_meta(model, labels - 1, where)
    assert size_of(detector) == parameters
    *_, offsets, scores = detector.dense(torch.empty(2, 3, side, side, device="meta"))
    assert offsets.shape == (2, boxes, 4) and scores.shape == (2, boxes, labels)


def test_pelees_maps() -> None:
    """133 normalization layers with 8,704 channels; the finest map has both heads twice."""
    detector: Any = on_meta(PeleeConfig(), 20)
    norms = [module.num_features for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    assert (len(norms), sum(norms)) == (133, 8704)
    maps = detector.backbone(torch.empty(2, 3, 304, 304, device="meta"))
    assert [tuple(level.shape[1:]) for level in maps] == [(256, side, side) for side in (19, 19, 10, 5, 3, 1)]
    assert maps[0] is maps[1]


def test_a_map_of_one_or_two_cells_stays() -> None:
    shrink = CoarserMap(4, 4, 4, 1)
    sides = [(5, 5), (3, 4), (2, 2), (1, 3)]
    assert [tuple(shrink(torch.zeros(1, 4, *side)).shape[2:]) for side in sides] == [(3, 3), (1, 2), (2, 2), (1, 1)]


def test_residual_prediction_block_by_hand() -> None:
    torch.manual_seed(0)
    block = ResidualPredictionBlock(3, 8, nn.BatchNorm2d).eval()
    x = torch.randn(1, 3, 4, 4)
    found = block(x)
    assert found.shape == (1, 8, 4, 4) and bool((found >= 0).all())
    for module in (block.branch[-1], block.shortcut):
        assert not any(isinstance(layer, nn.ReLU) for layer in module.modules())
    assert torch.equal(found, (block.branch(x) + block.shortcut(x)).relu())


@pytest.mark.parametrize(
    ("name", "labels", "parameters", "norm_images", "batch"),
    [
        ("scratchdet300_voc", 21, 24_553_262, 32, 128),
        ("scratchdet300_coco", 81, 28_151_852, 16, 128),
        ("pelee304_voc", 21, 5_425_892, 32, 32),
        ("pelee304_coco", 81, 5_981_012, 32, 128),
    ],
)
def test_configurations(name: str, labels: int, parameters: int, norm_images: int, batch: int) -> None:
    """Normalization, batch and decay are those of the published recipes."""
    config, _ = parse_config(config_parser("train", "test"), ["--config", name])
    assert size_of(on_meta(config.model, labels - 1, config.norm.where)) == parameters
    assert config.norm.size == norm_images and config.solver.reference_batch == batch
    assert config.solver.weight_decay == 5e-4 and config.solver.warmup_epochs == 0
    assert config.norm.size % config.data.images_per_rank == 0
