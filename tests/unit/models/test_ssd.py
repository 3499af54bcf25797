"""The core of SSD: default boxes, objects, the background in the loss; where torchvision's classes do otherwise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from megdet_hpc.config import EvaluationConfig, NormConfig, SsdConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.layers.l2_norm import L2Norm
from megdet_hpc.models.detector import Draws, torchvision_targets
from megdet_hpc.models.heads.default_boxes import boxes_of, hardest, match, without_crowds
from megdet_hpc.models.ssd import Ssd, SsdFeatures, build_ssd
from megdet_hpc.parallel.serial import SerialCommunicator
from tests.families import batch

RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
CONFIG = SsdConfig(detector="ssd", backbone="none")
STEPS = (8, 16, 32, 64, 100, 300)


class Pooled(SsdFeatures):
    """Average colours as maps."""

    channels = (3,) * 6

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return [torch.nn.functional.adaptive_avg_pool2d(self.norm(pixels), n) for n in (8, 4, 2, 2, 1, 1)]


def ssd(*where: str, **keys: object) -> Ssd:
    norm = NormConfig(where=where)  # type: ignore[arg-type]
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, **keys)  # type: ignore[arg-type]
    return build_ssd(Pooled(), RATIOS, config, norm, EvaluationConfig(), 4, SerialCommunicator()).double()


def boxes(ratios: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], steps: tuple[int, ...] | None) -> Tensor:
    generator = DefaultBoxGenerator(
        [list(own) for own in ratios], scales=list(CONFIG.box_scales), steps=steps and list(steps), clip=False
    )
    side = 304 if len(set(ratios)) == 1 else 300
    return boxes_of(generator, torch.zeros(1, 3, side, side), [torch.zeros(1, 1, size, size) for size in sizes])


@pytest.mark.parametrize(
    ("last", "number"), [((5, 3, 1), 8732), ((5, 3, 2), 8744), ((5, 5, 5), 8892), ((5, 3, 3), 8764)]
)
def test_numbers_of_default_boxes(last: tuple[int, ...], number: int) -> None:
    """SSD, DSOD, ScratchDet as its Caffe code has it, ScratchDet as in MMDetection."""
    assert len(boxes(RATIOS, (38, 19, 10, *last), None)) == number


def test_peleenets_default_boxes() -> None:
    assert len(boxes(((2, 3),) * 6, (19, 19, 10, 5, 3, 1), None)) == 5142


def test_centres_of_the_authors_and_in_the_image() -> None:
    """With the authors' steps 126 of DSOD's boxes have their centre outside; without steps none has."""
    outside = []
    for steps in (STEPS, None):
        found = boxes(RATIOS, (38, 19, 10, 5, 3, 2), steps)
        centre = (found[:, :2] + found[:, 2:]) / 2
        outside.append(int((centre > 300).any(1).sum()))
    assert outside == [126, 0]
    first = boxes(RATIOS, (38, 19, 10, 5, 3, 2), STEPS)[:4]
    sides = first[:, 2:] - first[:, :2]
    # 30 x 30, the root of 30 * 60, then 30 times and by the root of 2
    assert torch.allclose(sides, torch.tensor([[30, 30], [42.426, 42.426], [42.426, 21.213], [21.213, 42.426]]))
    assert torch.allclose(first[0], torch.tensor([-11.0, -11, 19, 19]))


def test_each_object_has_a_box() -> None:
    """Two objects with the same best box: torchvision's matcher leaves one without."""
    default = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60], [0, 0, 9, 10]])
    objects = torch.tensor([[21.0, 21, 31, 31], [22, 22, 32, 32]])
    assert SSDMatcher(0.5)(box_iou(objects, default)).tolist().count(0) == 0
    matched = match(default, objects)
    assert matched[1] == 0 and 1 in matched.tolist() and sorted(matched.tolist())[:2] == [-1, -1]
    assert match(default, torch.tensor([[70.0, 70, 71, 71]])).tolist().count(0) == 1  # no box overlaps it
    assert match(default, default[:1]).tolist() == [0, -1, -1, 0]  # a box of its own, and one of IoU 0.9
    assert match(default, torch.zeros(0, 4)).tolist() == [-1] * 4
    assert sorted(match(default[:2], objects[[0, 1, 1]]).tolist()) == [0, 1]  # more objects than boxes


def test_background_in_crowds_is_left_out() -> None:
    default = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    matched = torch.tensor([-1, 0, -1])
    assert without_crowds(matched, default, torch.tensor([[0.0, 0, 30, 30]])).tolist() == [-2, 0, -1]


def test_the_hardest_are_no_boxes_with_an_object() -> None:
    losses, candidates = torch.tensor([3.0, 9, 1, 2, 8]), torch.tensor([True, False, True, True, False])
    assert hardest(losses, candidates, torch.tensor(2)).tolist() == [True, False, False, True, False]
    assert hardest(losses, candidates, torch.tensor(9)).tolist() == candidates.tolist()
    assert not hardest(losses, candidates, torch.tensor(0)).any()


def torchvisions(model: Ssd, images: Batch) -> dict[str, Tensor]:
    """torchvision's losses on our matches."""
    model.neg_to_pos_ratio = model.negatives
    outputs, default = model._run(images)
    targets = torchvision_targets(images.targets)
    matched = [match(default, target["boxes"]) for target in targets]
    found: dict[str, Tensor] = SSD.compute_loss(model, targets, outputs, [default] * len(targets), matched)  # type: ignore[arg-type]
    return found


def test_losses_beside_torchvisions() -> None:
    """Equal on one process; with more background asked for than there is, torchvision counts objects twice."""
    images = batch()
    for negatives, equal in ((3, True), (500, False)):
        model = ssd(negatives=negatives)
        found = model.losses(images, Draws(0, 0))
        theirs = torchvisions(model, images)
        count = found["loss_box_reg"].count
        assert count >= 4
        assert torch.allclose(found["loss_box_reg"].value / count, theirs["bbox_regression"])
        assert torch.allclose(found["loss_classifier"].value / count, theirs["classification"]) == equal
        assert found["loss_classifier"].value / count <= theirs["classification"] + 1e-9


def test_images_without_objects_give_no_loss_and_a_gradient() -> None:
    model = ssd("heads")
    losses = model.losses(batch(2, 4), Draws(0, 0))
    assert [float(loss.value.detach()) for loss in losses.values()] == [0, 0]
    assert all(int(loss.count) == 0 for loss in losses.values())
    sum(loss.value for loss in losses.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_heads_with_normalization_and_their_class_layers() -> None:
    model = ssd("heads")
    assert all(conv.bias is None for conv in model.modules() if isinstance(conv, torch.nn.Conv2d))
    state = model.state_dict()
    for path, (number, after) in model.class_layers().items():
        assert len(state[f"{path}.weight"]) == 4 * number * after
    assert len(model.class_layers()) == 12 and len(ssd().class_layers()) == 6


def test_found_boxes_lie_in_the_image() -> None:
    found = ssd().eval().detect(batch())
    assert all(len(image.boxes) and image.boxes.min() >= 0 and image.boxes.max() <= 64 for image in found)
    assert all(image.labels.min() >= 1 for image in found)


def test_rows_of_the_head_follow_the_boxes() -> None:
    """The score of the third box in cell (1, 2) of the finest map is its own output channel."""
    model = ssd()
    with torch.no_grad():
        for conv in model.head.classes:
            conv[0].weight.zero_()
            conv[0].bias.zero_()
        model.head.classes[0][0].bias[2 * 4 + 1] = 5.0
    outputs, _ = model._run(batch())
    hit = outputs["cls_logits"][0, :, 1].nonzero().flatten()
    assert hit.tolist() == [cell * 4 + 2 for cell in range(64)]


def test_l2_norm_by_hand() -> None:
    layer = L2Norm(2)
    cell = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    assert torch.allclose(layer(cell).flatten(), torch.tensor([12.0, 16.0]))
