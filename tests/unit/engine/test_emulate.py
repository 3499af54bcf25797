"""Emulated ranks in one process: graphs that are kept give the same bits as a forward pass for counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megdet_hpc.config import Config, DataConfig, FasterRcnnConfig, NormConfig
from megdet_hpc.data.batch import collate
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.engine.emulate import VirtualPasses
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.serial import SerialCommunicator

CONFIG = Config(
    data=DataConfig(short_sides=(48,), max_side=64, val_short_side=48),
    model=FasterRcnnConfig(
        backbone="resnet10_w16", backbone_weights=None, neck_channels=8, box_head_channels=16,
        anchor_sizes=(8, 12, 16, 24, 32), rpn_pre_nms_top_n=20, rpn_post_nms_top_n=10,
    ),
    norm=NormConfig(kind="cgbn", size=2, where=("backbone", "fpn")),
)  # fmt: skip


def passes(groups: BnGroups, keep_graphs: bool) -> VirtualPasses:
    torch.manual_seed(0)
    model = build_detector(CONFIG, num_categories=5, group=SerialCommunicator(), pretrained=False).train()
    return VirtualPasses(model, groups, keep_graphs=keep_graphs)


def test_kept_graphs_give_the_same_bits(shapes: Path) -> None:
    data = DetectionDataset.open(shapes / "train", CONFIG.data, training=True, seed=0)
    batches = [collate([data[(0, 2 * rank + i)] for i in range(2)], 64) for rank in range(3)]
    seen: list[tuple[dict[str, float], list[Tensor]]] = []
    for keep_graphs in (False, True):
        made = passes(BnGroups(3, 2, 2), keep_graphs)
        for step in range(2):
            losses, _ = made.forward_backward(batches, step=step, seed=0)
        made.average_running_statistics()
        gradients = [p.grad for p in made.model.parameters() if p.grad is not None]
        assert len(gradients) > 20
        seen.append((losses, [*gradients, *made.model.buffers()]))
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))


def test_kept_graphs_need_groups_of_one_rank() -> None:
    with pytest.raises(UserError, match=r"2 ranks share statistics; accepted .* such as data.images_per_rank 4"):
        passes(BnGroups(4, 2, 4), keep_graphs=True)
    assert not passes(BnGroups(2, 2, 0), keep_graphs=True).keep_graphs  # one group needs no counts


def test_a_rank_that_shares_its_images_out_equals_a_rank_for_each_group(shapes: Path) -> None:
    """6 images, 2 in each group: one rank of 6, against 3 emulated ranks of 2. Boxes stay float32."""
    data = DetectionDataset.open(shapes / "train", CONFIG.data, training=True, seed=0)
    images = [data[(0, i)] for i in range(6)]
    seen: list[list[Tensor]] = []
    for per_rank in (6, 2):
        config = replace(CONFIG, data=replace(CONFIG.data, images_per_rank=per_rank))
        model = build_detector(config, num_categories=5, group=SerialCommunicator(), pretrained=False).double().train()
        layers = [layer for layer in model.modules() if isinstance(layer, CrossGpuBatchNorm2d)]
        assert {layer.images for layer in layers} == {2 if per_rank > 2 else 0}
        made = VirtualPasses(model, BnGroups(6 // per_rank, per_rank, 2), keep_graphs=per_rank < 6)
        batches = [collate(images[first : first + per_rank], 64) for first in range(0, 6, per_rank)]
        batches = [replace(batch, images=batch.images.double()) for batch in batches]
        losses, _ = made.forward_backward(batches, step=0, seed=0)
        made.average_running_statistics()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        names = ("running_mean", "running_var")
        statistics = [layer.get_buffer(name) for layer in layers for name in names]
        seen.append([torch.tensor(list(losses.values())), *gradients, *statistics])
    assert len(seen[0]) > 40
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
