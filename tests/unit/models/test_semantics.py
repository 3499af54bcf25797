"""Keys that switch what docs/semantics.md compares: smooth L1's beta, RoIAlign, crowd regions, proposals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torchvision.models.detection.roi_heads import fastrcnn_loss

from megdet_hpc.config import FasterRcnnConfig
from megdet_hpc.data.sample import Target
from megdet_hpc.models.backbones.base import Stage
from megdet_hpc.models.detector import Draws
from megdet_hpc.models.heads.boxes import box_losses, roi_pool
from megdet_hpc.models.heads.crowds import within_crowds
from megdet_hpc.models.heads.rpn import build_rpn
from megdet_hpc.models.losses import Loss
from tests import families
from tests.families import FAMILIES, SIDE, batch


def test_beta_of_the_box_head() -> None:
    """Of four regions two have an object; errors 0.05 and 0.5, four of each: with beta 1 / 9 one is quadratic."""
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels, wanted = [torch.tensor([0, 2]), torch.tensor([1, 0])], [torch.zeros(2, 4), torch.zeros(2, 4)]
    moves = torch.zeros(4, 3, 4)
    moves[1, 2], moves[2, 1] = 0.05, 0.5
    moves = moves.view(4, 12)
    expected = {
        0.0: 4 * (0.05 + 0.5) / 4,
        1 / 9: 4 * (0.05**2 / (2 / 9) + 0.5 - 1 / 18) / 4,
        1.0: (0.05**2 + 0.5**2) / 2,
    }
    for beta, value in expected.items():
        classes, boxes = box_losses(logits, moves, labels, wanted, beta)
        assert float(boxes) == pytest.approx(value)
        theirs, theirs_boxes = fastrcnn_loss(logits, moves, labels, wanted)
        assert torch.equal(classes, theirs) and torch.equal(boxes, theirs_boxes) == (beta == 1 / 9)


@pytest.mark.parametrize(("beta", "value"), [(0.0, 4 * 0.5 / 3), (1 / 9, 4 * (0.5 - 1 / 18) / 3), (1.0, 4 * 0.125 / 3)])
def test_beta_of_the_rpn(beta: float, value: float) -> None:
    """Three of four anchors are sampled, one has an object."""
    rpn = build_rpn(FasterRcnnConfig(rpn_box_beta=beta), 5, None)
    rpn.fg_bg_sampler.prepare(Draws(0, 0), [1])  # type: ignore[operator]
    labels = [torch.tensor([1.0, 0.0, -1.0, 0.0])]
    objectness, boxes = rpn.compute_loss(torch.zeros(4, 1), torch.full((4, 4), 0.5), labels, [torch.zeros(4, 4)])
    assert float(boxes) == pytest.approx(value)
    assert float(objectness) == pytest.approx(0.6931472)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_lines_up_with_the_pixels_if_aligned(aligned: bool, ratio: int) -> None:
    """Cells hold the pixel at their centre; so does an output, or it is half a cell beside it."""
    levels = [Stage(name, 1, stride) for name, stride in (("0", 4), ("1", 8), ("2", 16), ("3", 32))]
    pool = roi_pool(levels, FasterRcnnConfig(roi_aligned=aligned, roi_sampling_ratio=ratio))
    features = {s.name: ((torch.arange(640 // s.stride) + 0.5) * s.stride).expand(2, 1, 16, -1) for s in levels}
    large, small = torch.tensor([[100.0, 60, 400, 360]]), torch.tensor([[100.0, 20, 164, 50], [130.0, 20, 194, 50]])
    found = pool(features, [large, small], [(640, 640)] * 2)
    sides, left = torch.tensor([300.0, 64, 64]), torch.tensor([100.0, 100, 130])
    centres = left[:, None] + sides[:, None] * (torch.arange(7) + 0.5) / 7
    off = torch.tensor([0.0, 0, 0] if aligned else [8.0, 2, 2])  # half of strides 16, 4, 4
    torch.testing.assert_close(found[:, 0, 0], centres + off[:, None])


def test_proposals_of_evaluation() -> None:
    kept = [
        build_rpn(FasterRcnnConfig(rpn_post_nms_top_n=1000, rpn_eval_post_nms_top_n=n), 5, None)._post_nms_top_n
        for n in (None, 1000)
    ]
    assert kept == [{"training": 1000, "testing": 500}, {"training": 1000, "testing": 1000}]


def test_boxes_within_crowd_regions() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [5, 0, 15, 10], [30, 30, 40, 40]])
    crowds = torch.tensor([[0.0, 0, 10, 10], [14, 0, 20, 10]])  # shares of the boxes: 1; 0.5; 0.5 and 0.1; none
    assert within_crowds(boxes, crowds).tolist() == [True, False, False, False]


@pytest.mark.parametrize("family", ["mask_rcnn", "cascade_mask_rcnn", "retinanet"])
def test_an_image_full_of_a_crowd_has_no_background(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its anchors and proposals are in no loss. Alone it gives 0 with count 0 and gradients of 0, not 0 / 0."""
    monkeypatch.setitem(FAMILIES, family, dataclasses.replace(FAMILIES[family], crowds="ignore"))  # type: ignore[call-arg]
    model = families.build(family)
    whole = torch.tensor([[-50.0, -50, SIDE + 50, SIDE + 50]], dtype=torch.float64)
    yes, no = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    full = Target(whole, torch.ones(1, dtype=torch.int64), yes, no, torch.ones(1, SIDE, SIDE, dtype=torch.bool))

    def losses(*targets: Target) -> dict[str, Loss]:
        return model.losses(dataclasses.replace(batch(0, 2), targets=list(targets)), Draws(0, 0))

    found = losses(full, full)
    assert {(float(loss.value.detach()), int(loss.count)) for loss in found.values()} == {(0.0, 0)}
    torch.stack([loss.value for loss in found.values()]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())

    ordinary = batch(0, 1).targets[0]
    with torch.no_grad():
        one, two = (
            losses(ordinary, other) for other in (full, dataclasses.replace(full, crowd=no, boxes=ordinary.boxes))
        )
    key = "loss_classifier" if family == "retinanet" else "loss_objectness"
    assert 0 < 2 * int(one[key].count) == int(two[key].count)
