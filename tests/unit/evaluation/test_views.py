"""Views of an image at test time: sizes, the way back to the image, and one list of detections of them all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megdet_hpc.config import Config, DataConfig, EvaluationConfig, NormConfig
from megdet_hpc.data.batch import Batch, collate
from megdet_hpc.data.categories import LabelIds, match_labels
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.masks import decode_masks
from megdet_hpc.data.sample import Sample, Target
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.inference import SetDetection
from megdet_hpc.evaluation.merging import hard_nms
from megdet_hpc.evaluation.views import Seen, merged, see, views_of, what_is_merged
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks
from tests.families import FAMILIES, NUM_CATEGORIES, batch

DATA = DataConfig(val_short_side=60, max_side=100)
CPU = torch.device("cpu")
LABELS = LabelIds(np.array([0, 5, 7]), np.array([False, True, True]), "")
HEIGHT, WIDTH = 50, 70


class Finder(nn.Module):
    """Finds the white rectangle of a black image, and a mask whose left half is certain, the right half not."""

    def found(self, batch: Batch) -> list[dict[str, Tensor]]:
        found = []
        for image in batch.images:
            rows, columns = (image[0] > 127).nonzero(as_tuple=True)
            box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
            # in the image the object is brighter on its left, wherever that lies in the view
            left = image[0, rows.min(), columns.min()] > image[0, rows.min(), columns.max()]
            mask = torch.zeros(1, 1, 28, 28)
            mask[..., :14] = 1.0 if left else 0.0
            mask[..., 14:] = 0.0 if left else 1.0
            found.append({"boxes": box, "scores": torch.tensor([0.9]), "labels": torch.tensor([1]), "masks": mask})
        return found


def picture() -> Tensor:
    image = torch.zeros((3, HEIGHT, WIDTH), dtype=torch.uint8)
    image[:, 10:30, 5:45] = 200
    image[:, 10:30, 5:25] = 255
    return image


def test_views_of_a_configuration() -> None:
    nothing = Target.ordinary(torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64))
    evaluation = EvaluationConfig(scales=(30, 60, 120), flip=True)
    views = views_of(DATA, evaluation, square=False)
    assert [view.flipped for view in views] == [False, True] * 3
    wide = torch.arange(40 * 80).reshape(1, 40, 80).expand(3, -1, -1).to(torch.uint8)
    shapes = [tuple(view.augmentation(wide, nothing, 0)[0].shape[1:]) for view in views]
    # 60 would be 60 x 120, and the long side is 100 at most: the other sides in proportion
    assert shapes == [(25, 50)] * 2 + [(50, 100)] * 2 + [(100, 200)] * 2
    plain, flipped = (view.augmentation(wide, nothing, 0)[0] for view in views[2:4])
    assert torch.equal(plain.flip(2), flipped)
    (own,) = views_of(DATA, EvaluationConfig(), square=False)
    assert torch.equal(own.augmentation(wide, nothing, 0)[0], plain) and not own.flipped
    squares = views_of(DATA, EvaluationConfig(scales=(32, 64)), square=True)
    assert [tuple(view.augmentation(wide, nothing, 0)[0].shape[1:]) for view in squares] == [(32, 32), (64, 64)]
    assert what_is_merged(DATA, EvaluationConfig()) == []
    assert what_is_merged(DATA, evaluation) == [
        "6 views of each image: short sides 30, 60, 120, each flipped too; detections are merged by NMS"
    ]


def test_every_view_is_mapped_back_to_the_image() -> None:
    nothing = Target.ordinary(torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64))
    evaluation = EvaluationConfig(scales=(50, 75, 100), flip=True)
    every = []
    for view in views_of(DATA, evaluation, square=False):
        image, target = view.augmentation(picture(), nothing, 0)
        scale = image.shape[2] / WIDTH, image.shape[1] / HEIGHT
        # images of other sizes beside it, so that it is padded
        other = Sample(torch.full((3, 150, 180), 255, dtype=torch.uint8), (1.0, 1.0), 2, target)
        pair = collate([Sample(image, scale, 1, target), other])
        seen = see(Finder(), pair, CPU, flipped=view.flipped)[0]  # type: ignore[arg-type]
        assert seen.boxes[0] == pytest.approx([5, 10, 45, 30], abs=1.01)
        every.append(seen)
    assert len(every) == 6
    table = merged(every, 9, (HEIGHT, WIDTH), evaluation, LABELS)
    assert (table.image_ids.tolist(), table.category_ids.tolist()) == ([9], [5])
    assert table.scores == pytest.approx([0.9])
    assert table.boxes_xywh[0] == pytest.approx([5, 10, 40, 20], abs=1.01)
    assert table.masks is not None
    mask = decode_masks(table.masks.tolist(), HEIGHT, WIDTH)[0]
    left = np.zeros((HEIGHT, WIDTH), np.bool_)
    left[10:30, 5:25] = True
    assert (mask & left).sum() / (mask | left).sum() > 0.9


def seen(boxes: list[list[float]], scores: list[float], labels: list[int], masks: list[float] | None = None) -> Seen:
    grids = None if masks is None else torch.tensor(masks).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    return Seen(np.array(boxes, np.float64).reshape(-1, 4), np.array(scores), np.array(labels, np.int64), grids)


def test_views_are_merged_by_class_and_cut_to_the_best() -> None:
    first = seen([[0, 0, 10, 10], [30, 30, 40, 40]], [0.8, 0.3], [1, 2])
    second = seen([[1, 0, 11, 10], [0, 0, 10, 10]], [0.9, 0.7], [1, 2])
    table = merged([first, second], 3, (50, 50), EvaluationConfig(flip=True, nms_iou=0.5), LABELS)
    assert table.scores.tolist() == [0.9, 0.7, 0.3]
    assert table.category_ids.tolist() == [5, 7, 7]
    assert table.boxes_xywh.tolist() == [[1, 0, 10, 10], [0, 0, 10, 10], [30, 30, 10, 10]]
    assert table.masks is None
    few = merged([first, second], 3, (50, 50), EvaluationConfig(flip=True, max_detections=2), LABELS)
    assert few.scores.tolist() == [0.9, 0.7]
    linear = EvaluationConfig(flip=True, soft_nms="linear", soft_nms_score=0.01)
    lowered = merged([first, second], 3, (50, 50), linear, LABELS)
    # IoU 9 / 11 of the first two
    assert lowered.scores.tolist() == pytest.approx([0.9, 0.7, 0.3, 0.8 * (1 - 9 / 11)])
    absent = LabelIds(LABELS.ids, np.array([False, True, False]), "")
    assert merged([first, second], 3, (50, 50), EvaluationConfig(flip=True), absent).category_ids.tolist() == [5]
    assert len(merged([seen([], [], [])], 3, (50, 50), linear, LABELS)) == 0


@pytest.mark.parametrize(("probabilities", "there"), [((0.9, 0.2, 0.6), True), ((0.6, 0.3, 0.5), False)])
def test_masks_are_averaged_over_the_views_that_see_the_object(probabilities: list[float], there: bool) -> None:
    box, elsewhere = [10, 10, 30, 30], [35, 35, 45, 45]
    views = [seen([box, elsewhere], [0.9 - own, 0.1], [1, 1], [own, 0.0]) for own in probabilities]
    views.append(seen([elsewhere], [0.1], [1], [0.0]))  # it does not see the object, so it has no say
    views.append(seen([box], [0.1], [2], [0.0]))  # of another class
    table = merged(views, 3, (50, 50), EvaluationConfig(flip=True), LABELS)
    assert table.masks is not None and len(table) == 3
    best = decode_masks(table.masks[:1].tolist(), 50, 50)[0]
    assert best[12:28, 12:28].all() == best[12:28, 12:28].any() == there
    assert not best[:9].any() and not best[32:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_soft_nms_gets_the_boxes_before_nms(family: str) -> None:
    """NMS over them gives what the detector gives by itself."""
    limits = EvaluationConfig(score_threshold=0.004, nms_iou=0.3, max_detections=12)
    kept = []
    for evaluation in (limits, dataclasses.replace(limits, soft_nms="gaussian", max_detections=100)):
        config = Config(model=FAMILIES[family], evaluation=evaluation, norm=NormConfig(kind="bn"))
        model = build_detector(config, num_categories=NUM_CATEGORIES, group=SerialCommunicator()).eval()
        kept.append(see(model, batch(3, 4, torch.float32), CPU, flipped=False)[0])
    plain, candidates = kept
    assert len(candidates.scores) > 2 * len(plain.scores)
    own = hard_nms(candidates.boxes, candidates.scores, candidates.labels, limits.nms_iou)[:12]
    assert candidates.scores[own].tolist() == plain.scores.tolist()
    if family != "retinanet":  # many of its first scores are the same number, so their order is not
        assert candidates.boxes[own].tolist() == plain.boxes.tolist()


class Bright(nn.Module):
    """Finds the first quarter of each image, with a score that depends on the pixels."""

    def found(self, batch: Batch) -> list[dict[str, Tensor]]:
        found = []
        for image, (height, width) in zip(batch.images, batch.sizes, strict=True):
            score = image.double().mean() / 255
            box = torch.tensor([[0.0, 0.0, width / 2, height / 2]])
            found.append({"boxes": box, "scores": score[None], "labels": torch.tensor([1])})
        return found


def test_all_images_in_all_views_at_any_number_of_ranks(shapes: Path) -> None:
    evaluation = EvaluationConfig(scales=(40, 60), flip=True)

    def body(world: Communicator) -> DetectionTable | None:
        dataset = DetectionDataset.open(shapes / "val", DATA, training=False, seed=0)
        labels = match_labels(dataset.categories, dataset.categories, "one", "the same")
        model: Any = Bright()
        return SetDetection(dataset, CPU, labels, world, num_workers=0, evaluation=evaluation).of_all(model)

    (alone,) = run_ranks(1, body)
    assert alone is not None
    # the flip's quarter is another one; that of the other scale is the same box, and NMS drops it
    assert np.unique(alone.image_ids, return_counts=True)[1].tolist() == [2] * 10
    shared, *_ = run_ranks(3, body)
    assert shared is not None
    for name in ("image_ids", "boxes_xywh", "scores", "category_ids"):
        assert np.array_equal(getattr(alone, name), getattr(shared, name))
