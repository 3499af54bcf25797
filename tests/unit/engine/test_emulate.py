"""Emulated ranks in one process: graphs that are kept give the same bits as a forward pass for counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megdet_hpc.config import Config, DataConfig, FasterRcnnConfig, NormConfig
from megdet_hpc.data.batch import collate
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.engine.emulate import VirtualPasses
from megdet_hpc.errors import UserError
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
