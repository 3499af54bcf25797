"""Other levels of the pyramid: what each part of a detector takes, parameters, ranks against one process, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megdet_hpc.config import Config, FasterRcnnConfig, RetinaNetConfig
from megdet_hpc.engine.emulate import VirtualPasses
from megdet_hpc.engine.passes import RankPasses
from megdet_hpc.errors import UserError
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.serial import SerialCommunicator
from tests.families import DRAWS, batch, build
from tests.parallel.equivalence import LOSS_TOLERANCE, WEIGHT_TOLERANCE
from tests.parallel.families import differences, local

SIZES = (8, 12, 16, 24, 32, 48)


@pytest.mark.parametrize(("family", "levels"), [("faster_rcnn", (2, 6)), ("retinanet", (3, 7))])
def test_the_default_is_that_of_the_papers(family: str, levels: tuple[int, int]) -> None:
    found, default = (build(family, fpn_levels=own) for own in (levels, None))
    expected = default.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    for key, loss in found.losses(batch(), DRAWS).items():
        assert torch.equal(loss.value, default.losses(batch(), DRAWS)[key].value)
        break


@pytest.mark.parametrize(
    ("family", "levels", "strides", "of_regions"),
    [
        ("faster_rcnn", (2, 5), [4, 8, 16, 32], 4),
        ("cascade_mask_rcnn", (3, 6), [8, 16, 32, 64], 3),
        ("mask_rcnn", (5, 5), [32], 1),
        ("retinanet", (4, 7), [16, 32, 64, 128], 0),
        ("retinanet", (2, 6), [4, 8, 16, 32, 64], 0),
        ("retinanet", (3, 5), [8, 16, 32], 0),
    ],
)
def test_each_part_has_the_levels_and_ranks_are_one_process(
    family: str, levels: tuple[int, int], strides: list[int], of_regions: int
) -> None:
    keys: dict[str, Any] = {"fpn_levels": levels, "anchor_sizes": SIZES[: len(strides)]}
    if of_regions:
        keys |= {"large_kernels": 3, "large_kernel_channels": 4}
    model: Any = build(family, **keys)
    maps = list(model.backbone(batch().images.double()).values())
    assert [64 // level.shape[2] for level in maps] == [min(stride, 64) for stride in strides]
    assert [level.stride for level in model.backbone.levels] == strides
    if of_regions:
        first = model.roi_heads.stages[0] if "cascade" in family else model.roi_heads
        assert first.box_roi_pool.scales == [1 / stride for stride in strides[:of_regions]]
        assert len(model.large_kernels.names) == of_regions
    one = local(family, lambda model: RankPasses(model, SerialCommunicator()), [batch()], **keys)
    each = [batch(0, 2), batch(2, 4)]
    two = local(family, lambda model: VirtualPasses(model, BnGroups(2, 2, 0)), each, **keys)
    losses, gradient, statistics = differences(two, one)
    assert losses < LOSS_TOLERANCE and gradient < WEIGHT_TOLERANCE and statistics < WEIGHT_TOLERANCE
    model.eval()
    assert len(model.detect(batch())) == 4


def test_parameters_by_hand() -> None:
    """A level of a ResNet-50's FPN has a 1 x 1 convolution of its channels and a 3 x 3 one; P6 and P7 have one each."""

    def count(model: FasterRcnnConfig | RetinaNetConfig) -> int:
        with torch.device("meta"):
            found = build_detector(Config(model=model), num_categories=80, group=SerialCommunicator())
        return sum(p.numel() for p in found.parameters())

    four = (64, 128, 256, 512)
    square = 9 * 256 * 256 + 256
    plain = {"backbone_weights": None}
    two_stage = count(FasterRcnnConfig(**plain))  # type: ignore[arg-type]
    coarse = FasterRcnnConfig(**plain, fpn_levels=(3, 6), anchor_sizes=four)  # type: ignore[arg-type]
    assert two_stage - count(coarse) == 256 * 256 + 256 + square
    assert count(FasterRcnnConfig(**plain, fpn_levels=(2, 5), anchor_sizes=four)) == two_stage  # type: ignore[arg-type]
    retina = count(RetinaNetConfig(**plain))  # type: ignore[arg-type]
    without_p7 = RetinaNetConfig(**plain, fpn_levels=(3, 6), anchor_sizes=four)  # type: ignore[arg-type]
    assert retina - count(without_p7) == square
    coarse_retina = RetinaNetConfig(**plain, fpn_levels=(4, 7), anchor_sizes=four)  # type: ignore[arg-type]
    assert retina - count(coarse_retina) == 512 * 256 + 256 + square


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fpn_levels": (3, 6)}, r"anchor_sizes is .*accepted: 4 size\(s\), one per FPN level, P3 to P6"),
        ({"fpn_levels": (3,)}, "fpn_levels is .*accepted: the numbers of two levels, or null"),
        ({"fpn_levels": (3, 7)}, "a first level from 2 to 5 and the last level 5 to 6 with resnet50"),
        ({"fpn_levels": (6, 6)}, "a first level from 2 to 5"),
        ({"fpn_levels": (2, 5), "backbone": "detnet59"}, "the last level 6 with detnet59"),
    ],
)
def test_what_does_not_fit_is_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(model=FasterRcnnConfig(**keys))
