"""Every detector family at width 8 and a batch of four images in memory: one object, three, none, none."""

from __future__ import annotations

import dataclasses

import torch

from megdet_hpc.config import (
    CascadeMaskRcnnConfig,
    CascadeRcnnConfig,
    Config,
    DsodConfig,
    FasterRcnnConfig,
    MaskRcnnConfig,
    ModelConfig,
    NormConfig,
    PeleeConfig,
    RetinaNetConfig,
    ScratchDetConfig,
)
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.sample import Target
from megdet_hpc.models.detector import PIXEL_MEAN, PIXEL_STD, Detector, Draws
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.serial import SerialCommunicator

NUM_CATEGORIES = 3
SIDE = 64
DRAWS = Draws(seed=0, step=3)
EVERYWHERE = NormConfig(where=("backbone", "fpn", "rpn", "heads"))
_TINY = {"backbone": "resnet10", "backbone_weights": None, "neck_channels": 8, "anchor_sizes": (8, 12, 16, 24, 32)}
_TWO_STAGES = _TINY | {
    "box_head": "4conv1fc",
    "box_head_channels": 16,
    "rpn_pre_nms_top_n": 100,
    "rpn_post_nms_top_n": 40,
    "rpn_samples_per_image": 32,
    "roi_samples_per_image": 16,
}
_DENSE = {
    "first_channels": 4,
    "bottleneck_channels": 8,
    "growth": 4,
    "block_layers": (2, 2, 1, 1),
    "map_channels": (4,) * 5,
}
FAMILIES: dict[str, ModelConfig] = {
    "faster_rcnn": FasterRcnnConfig(**_TWO_STAGES),
    "mask_rcnn": MaskRcnnConfig(**_TWO_STAGES, mask_head_channels=8),
    "cascade_rcnn": CascadeRcnnConfig(**_TWO_STAGES, stage_ious=(0.5, 0.6)),
    "cascade_mask_rcnn": CascadeMaskRcnnConfig(**_TWO_STAGES, mask_head_channels=8),
    "retinanet": RetinaNetConfig(**_TINY, anchor_scales=2),
    "scratchdet": ScratchDetConfig(backbone="root_resnet10", root_channels=4),
    "scratchdet_pre": ScratchDetConfig(backbone="root_resnet10", root_channels=4, block_order="pre"),
    "pelee": PeleeConfig(growth=8),
    "dsod": DsodConfig(**_DENSE),
}


def build(family: str, group: Communicator | None = None, norm: NormConfig = EVERYWHERE, **keys: object) -> Detector:
    """A family in float64, pixels' mean and deviation included, so that nothing is rounded to float32."""
    config = Config(model=dataclasses.replace(FAMILIES[family], **keys), norm=norm)  # type: ignore[arg-type]
    model = build_detector(config, num_categories=NUM_CATEGORIES, group=group or SerialCommunicator()).double()
    model.pixel_mean, model.pixel_std = (
        torch.tensor(value, dtype=torch.float64).view(1, 3, 1, 1) * 255 for value in (PIXEL_MEAN, PIXEL_STD)
    )
    return model


def target(boxes: list[list[float]]) -> Target:
    """Objects that fill their boxes but for a corner."""
    masks = torch.zeros((len(boxes), SIDE, SIDE), dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[int(top) : int(bottom), int(left) : int(right)] = True
        mask[int(top) : int(top) + 5, int(left) : int(left) + 5] = False
    labels = torch.arange(len(boxes)) % NUM_CATEGORIES + 1
    return Target.ordinary(torch.tensor(boxes, dtype=torch.float64).view(-1, 4), labels, masks)


def batch(first: int = 0, last: int = 4, dtype: torch.dtype = torch.float64) -> Batch:
    """Some of the four images, their boxes in the type of the detector."""
    images = torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    targets = [
        target([[8, 10, 40, 50]]),
        target([[4, 4, 20, 30], [30, 8, 60, 40], [20, 36, 34, 60]]),
        target([]),
        target([]),
    ]
    targets = [dataclasses.replace(own, boxes=own.boxes.to(dtype)) for own in targets]
    whole = Batch(images, [(SIDE, SIDE)] * 4, [(1.0, 1.0)] * 4, [11, 12, 13, 14], targets)
    some = slice(first, last)
    return dataclasses.replace(
        whole,
        images=images[some],
        sizes=whole.sizes[some],
        scales=whole.scales[some],
        image_ids=whole.image_ids[some],
        targets=targets[some],
    )
