"""`bench evaluation`: time of an evaluation. Detection is beside torchvision's, scoring beside pycocotools'."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from megdet_hpc.bench import detection
from megdet_hpc.bench.report import environment
from megdet_hpc.errors import UserError
from megdet_hpc.evaluation.coco import has_fast_scorer
from megdet_hpc.evaluation.columns import Columns, Truth
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.reference import compare_by_pycocotools
from megdet_hpc.evaluation.scorer import Measured, compare
from megdet_hpc.parallel.runtime import Runtime

_BOXES_PER_IMAGE = 7.3  # of COCO val2017: 36,781 in 5,000 images
_CROWD_SHARE = 0.01
_WRONG_CLASS = 0.3  # share of the detections
_WIDTH, _HEIGHT = 640, 480  # pixels


class GeneratedTruth(Truth):
    """A set that exists in memory only.

    Args:
        num_images: number of images.
        num_classes: number of classes.
        draw: generator of the boxes.
    """

    def __init__(self, num_images: int, num_classes: int, draw: np.random.Generator) -> None:
        self.num_images, number = num_images, int(num_images * _BOXES_PER_IMAGE)
        self.image_ids = 3 * np.arange(num_images) + 1
        self.sizes = np.tile([_HEIGHT, _WIDTH], (num_images, 1))
        self.category_ids = np.arange(1, num_classes + 1)
        self.names = [f"class {key}" for key in self.category_ids]
        boxes = np.concatenate([draw.uniform(0, 300, (number, 2)), draw.uniform(8, 300, (number, 2))], axis=1)
        images, classes = np.sort(draw.integers(num_images, size=number)), draw.integers(num_classes, size=number)
        crowd = draw.random(number) < _CROWD_SHARE
        self.boxes = Columns(images, boxes, classes, boxes[:, 2] * boxes[:, 3], crowd, np.ones(number))

    def guesses(self, number: int, draw: np.random.Generator) -> DetectionTable:
        """Detections near the boxes, some of another class."""
        near = draw.integers(len(self.boxes), size=number)
        boxes = self.boxes.boxes_xywh[near] + draw.normal(0, 8, (number, 4))
        boxes[:, 2:] = np.abs(boxes[:, 2:])
        wrong = draw.random(number) < _WRONG_CLASS
        classes = np.where(wrong, draw.integers(len(self.names), size=number), self.boxes.classes[near])
        images = self.image_ids[self.boxes.images[near]]
        return DetectionTable(images, boxes, draw.random(number), self.category_ids[classes])


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of this benchmark."""
    detection.options(parser)
    parser.add_argument("--images", type=int, default=5000, help="images of the generated set; 0: no scoring")
    parser.add_argument("--detections", type=int, default=100, help="detections an image")
    parser.add_argument("--classes", type=int, default=80, help="classes of the set")
    parser.add_argument("--repeats", type=int, default=3, help="measured passes of hotcoco")
    parser.add_argument("--reference-repeats", type=int, default=1, help="measured passes of pycocotools")


def run(options: argparse.Namespace, runtime: Runtime) -> dict[str, Any] | None:
    """The body. All ranks detect; rank 0 scores alone.

    Raises:
        UserError: an option is out of its range.
    """
    numbers = [*options.image_size, *options.batches, options.detect_repeats, options.repeats, options.detections]
    if len(options.image_size) > 2 or min(*numbers, options.classes, options.reference_repeats) < 1:
        raise UserError(
            "--image-size takes one or two numbers; it, --batches, --detections, --classes and all repeats must be "
            "1 or more"
        )
    if min(options.images, options.detect) < 0 or not options.images + options.detect:
        raise UserError("--images and --detect must be 0 or more, and one of them 1 or more")
    found = detection.measure_detection(options, runtime) if options.detect else {}
    if runtime.world.rank:
        return None
    scored = _scoring(options) if options.images else {}
    return {"environment": environment(runtime.device(options.device)), "ranks": runtime.description} | found | scored


def _scoring(options: argparse.Namespace) -> dict[str, Any]:
    """The part of scoring.

    From the table of detections to the arrays of precision and recall, as an evaluation of a run does it. The truth is
    made before, as once in a run. Times are of the process on all its threads, since cores may be shared.
    """
    draw = np.random.default_rng(0)
    truth = GeneratedTruth(options.images, options.classes, draw)
    table = truth.guesses(options.images * options.detections, draw)
    slow, expected = _timed(compare_by_pycocotools, truth, table, options.reference_repeats)
    timed = {"pycocotools": slow}
    measured = None
    if has_fast_scorer():
        compare(truth, truth.found(table.rows(np.arange(min(10, len(table))))), "bbox", 100)  # the import
        fast, measured = _timed(compare, truth, table, options.repeats)
        timed = {"hotcoco": fast, **timed}
    rows = [
        {"scorer": name, "median s": statistics.median(times), "least s": min(times), "most s": max(times)}
        | {"passes": len(times), "of pycocotools": statistics.median(times) / statistics.median(slow)}
        for name, times in timed.items()
    ]
    found = {
        "set": f"{options.images} images, {len(truth.boxes)} boxes, {options.classes} classes, {len(table)} detections",
        "times of the processor": rows,
    }
    if measured is None:
        return found | {"not measured": "hotcoco, which is not installed; pip install hotcoco"}
    names = ("precision", "recall", "scores")
    differences = [float(np.abs(getattr(measured, name) - getattr(expected, name)).max()) for name in names]
    return found | {
        "pycocotools takes": f"{statistics.median(slow) / statistics.median(fast):.0f} times as long",
        "largest difference of precision, recall and scores": " ".join(f"{value:g}" for value in differences),
    }


def _timed(
    measure: Callable[[Truth, Columns, str, int], Measured], truth: Truth, table: DetectionTable, repeats: int
) -> tuple[list[float], Measured]:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        measured = measure(truth, truth.found(table), "bbox", 100)
        times.append(time.process_time() - begin)
    return times, measured
