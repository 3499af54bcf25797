"""COCO average precision by pycocotools, and detections as a COCO results file."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from megdet_hpc.data.coco_json import rebuild_coco
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.files import atomic_write

# The order of COCOeval.stats for boxes.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def average_precision(
    pack: PackedCoco, detections: NDArray[np.float64], num_images: int | None = None
) -> dict[str, float]:
    """Box metrics of COCO over a packed set.

    Args:
        pack: the ground truth.
        detections: (k, 7), see inference.NUM_COLUMNS; k may be 0.
        num_images: score only the first so many images.

    Returns:
        The twelve COCO metrics, 0 to 1. Where COCO has none, since the set holds no box of that size, it gives
        -1; without any detection every other metric is 0.
    """
    truth = COCO()
    truth.dataset = rebuild_coco(pack, with_segmentations=False)
    for annotation in truth.dataset["annotations"]:  # pycocotools demands both keys; COCO sets may lack them
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        # COCO() without annotations is a valid answer of no detections, which loadRes rejects
        found = truth.loadRes(detections) if len(detections) else COCO()
        scorer = COCOeval(truth, found, "bbox")
        scorer.params.imgIds = sorted(int(i) for i in pack.image_ids[:num_images])
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return dict(zip(METRICS, map(float, scorer.stats), strict=True))


def write_results(path: Path, detections: NDArray[np.float64]) -> None:
    """Write detections as a COCO results JSON, which the original annotation file's loadRes accepts."""
    rows: list[dict[str, Any]] = [
        {
            "image_id": int(row[0]),
            "category_id": int(row[6]),
            "bbox": [round(float(value), 3) for value in row[1:5]],
            "score": round(float(row[5]), 6),
        }
        for row in detections
    ]
    with atomic_write(path) as file:
        file.write(json.dumps(rows).encode())


def result_line(metrics: dict[str, float], **further: object) -> str:
    """The last line that a program prints: `result: AP=0.xxx AP50=0.xxx key=value ...`."""
    scores = " ".join(f"{key}={max(metrics[key], 0.0):.3f}" for key in ("AP", "AP50"))
    return " ".join([f"result: {scores}", *[f"{key}={value}" for key, value in further.items()]])
