"""pycocotools' comparison, the reference of `scorer.py`, and what takes its place where hotcoco is not installed."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from megdet_hpc.evaluation.columns import Columns, Truth
from megdet_hpc.evaluation.detections import objects
from megdet_hpc.evaluation.scorer import Measured, limits_of
from megdet_hpc.parallel.communicator import Communicator


def compare_by_pycocotools(truth: Truth, found: Columns, kind: str, max_detections: int) -> Measured:
    """The same as `scorer.compare`, by pycocotools alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = _scorer(truth, found, kind, max_detections)
        scorer.evaluate()
        scorer.accumulate()
    return Measured.of(scorer, scorer.params.maxDets)


def compare_on_all_ranks(
    truth: Truth, found: Columns, kind: str, max_detections: int, world: Communicator
) -> Measured | None:
    """The same, with the images shared out over the ranks. Collective of the world; blocks; name `matches`.

    Matching, which takes nearly all of the time, looks at one image alone. Rank 0 puts the matches in pycocotools'
    order and accumulates them.

    Args:
        truth: the ground truth, the same on every rank.
        found: all detections, on every rank.
        kind: what is compared, bbox or segm.
        max_detections: the best so many of an image and class count.
        world: all ranks.

    Returns:
        None on other ranks than 0.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = _scorer(truth, found, kind, max_detections)
        images = scorer.params.imgIds
        scorer.params.imgIds = images[world.rank :: world.size]
        matches: list[Any] = []
        if scorer.params.imgIds:
            scorer.evaluate()
            matches = scorer.evalImgs
        parts = world.gather_object(matches, name="matches")
        if parts is None:
            return None
        every = np.empty((len(scorer.params.catIds), len(scorer.params.areaRng), len(images)), np.object_)
        for rank, part in enumerate(parts):
            if part:  # [class, area, image], as one list
                every[:, :, rank :: world.size] = objects(part).reshape(*every.shape[:2], -1)
        scorer.params.imgIds = images
        scorer.evalImgs, scorer._paramsEval = every.ravel().tolist(), copy.deepcopy(scorer.params)
        scorer.accumulate()
    return Measured.of(scorer, scorer.params.maxDets)


def _scorer(truth: Truth, found: Columns, kind: str, max_detections: int) -> COCOeval:
    boxes = truth.masks if kind == "segm" else truth.boxes
    scorer = COCOeval(_indexed(truth, boxes), _indexed(truth, found), kind)
    scorer.params.maxDets = limits_of(max_detections)
    return scorer


def _indexed(truth: Truth, boxes: Columns) -> COCO:
    """pycocotools' records. Annotations count from 1: it takes a match with id 0 for none."""
    images = [{"id": number, "height": h, "width": w} for number, (h, w) in enumerate(truth.sizes.tolist())]
    columns = [boxes.images, boxes.classes, boxes.boxes_xywh, boxes.areas, boxes.crowd, boxes.scores]
    rows = zip(*(column.tolist() for column in columns), boxes.masks or [None] * len(boxes), strict=True)
    annotations: list[dict[str, Any]] = [
        {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
        | {"score": score, "segmentation": mask}
        for number, (image, label, box, area, crowd, score, mask) in enumerate(rows, start=1)
    ]
    coco = COCO()
    categories = [{"id": place, "name": name} for place, name in enumerate(truth.names)]
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco
