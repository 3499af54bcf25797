from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation import coco, scorer
from megdet_hpc.evaluation.coco import measure_together, score
from megdet_hpc.evaluation.columns import Truth
from megdet_hpc.evaluation.detections import DetectionTable, objects
from megdet_hpc.evaluation.reference import compare_by_pycocotools
from megdet_hpc.evaluation.results import result_rows
from megdet_hpc.evaluation.scorer import Measured, compare
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.threads import run_ranks


def guesses(truth: Truth, number: int, seed: int, *, without: int | None = None) -> DetectionTable:
    """Boxes near those of the set, crowd regions too, with many equal scores.

    Args:
        truth: the set.
        number: detections to make.
        seed: seed of the draws.
        without: position of a class that is never found.
    """
    draw = np.random.default_rng(seed)
    near = draw.integers(len(truth.boxes), size=number)
    boxes = truth.boxes.boxes_xywh[near] + draw.normal(0, 3, (number, 4))
    boxes[:, 2:] = np.abs(boxes[:, 2:])
    classes = np.where(
        draw.random(number) < 0.2, draw.integers(len(truth.names), size=number), truth.boxes.classes[near]
    )
    images, scores = truth.pack.image_ids[truth.boxes.images[near]], draw.integers(0, 40, number) / 40
    table = DetectionTable(images, boxes, scores, truth.category_ids[classes])
    return table if without is None else table.rows(classes != without)


def with_crowds(truth: Truth) -> Truth:
    """Some of the boxes as crowd regions."""
    crowd = np.random.default_rng(3).random(len(truth.boxes)) < 0.1
    truth.boxes = replace(truth.boxes, crowd=crowd)
    assert crowd.any()
    return truth


def equal(one: Measured, other: Measured) -> bool:
    arrays = ("precision", "recall", "scores")
    return one.limits == other.limits and all(np.array_equal(getattr(one, a), getattr(other, a)) for a in arrays)


@pytest.mark.parametrize("limit", [5, 100, 300])
@pytest.mark.parametrize(("number", "without"), [(0, None), (1, None), (6000, None), (6000, 1)])
def test_every_bit_of_pycocotools_arrays(shapes: Path, number: int, without: int | None, limit: int) -> None:
    truth = with_crowds(Truth(PackedCoco(shapes / "val")))
    found = truth.found(guesses(truth, number, seed=limit, without=without))
    fast = compare(truth, found, "bbox", limit)
    assert equal(fast, compare_by_pycocotools(truth, found, "bbox", limit))
    assert number < 2 or 0.05 < fast.precision[fast.precision > -1].mean() < 0.95


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("at_once", [1, 300, 2000])
def test_a_few_classes_at_a_time_give_the_same_bits(
    shapes: Path, at_once: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = with_crowds(Truth(PackedCoco(shapes / "val")))
    columns = truth.masks if kind == "segm" else truth.boxes
    found = replace(
        truth.found(guesses(truth, 2000, seed=1)) if kind == "bbox" else columns,
        crowd=np.zeros(2000 if kind == "bbox" else len(columns), np.bool_),
    )
    found = replace(found, scores=np.random.default_rng(0).integers(0, 20, len(found)) / 20)
    whole = compare(truth, found, kind, 100)
    monkeypatch.setattr(scorer, "AT_ONCE", at_once)
    assert equal(compare(truth, found, kind, 100), whole)
    assert whole.precision.max() > 0.5


def test_classes_are_put_together_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "AT_ONCE", 10)
    assert scorer._parts(np.array([3, 7, 1, 0, 25, 2])) == [range(2), range(2, 4), range(4, 5), range(5, 6)]
    assert scorer._parts(np.array([0, 0])) == [range(2)]


def test_a_category_without_a_box_and_an_image_without_one(shapes: Path) -> None:
    pack = PackedCoco(shapes / "val")
    pack.categories = [*pack.categories, {"id": 99, "name": "unicorn"}]
    truth = Truth(pack, 7)
    table = guesses(truth, 200, seed=1)
    beyond = guesses(Truth(pack), 200, seed=2)  # some lie in images that are not scored
    found = truth.found(DetectionTable.joined([table, beyond]))
    assert 200 < len(found) < 400
    fast = compare(truth, found, "bbox", 100)
    assert equal(fast, compare_by_pycocotools(truth, found, "bbox", 100))
    assert (fast.precision[:, :, -1] == -1).all()


def test_masks_too(shapes: Path) -> None:
    truth = with_crowds(Truth(PackedCoco(shapes / "val")))
    masks = truth.masks.masks
    assert masks is not None
    draw = np.random.default_rng(0)
    shuffled = [masks[k] if draw.random() < 0.7 else masks[max(k - 1, 0)] for k in range(len(masks))]
    same = [k for k, mask in enumerate(shuffled) if mask["size"] == masks[k]["size"]]
    boxes = truth.boxes
    table = DetectionTable(
        truth.pack.image_ids[boxes.images[same]],
        boxes.boxes_xywh[same],
        draw.integers(0, 9, len(same)) / 9,
        truth.category_ids[boxes.classes[same]],
        objects([shuffled[k] for k in same]),
    )
    found = truth.found(table, "segm")
    fast = compare(truth, found, "segm", 100)
    assert equal(fast, compare_by_pycocotools(truth, found, "segm", 100))
    assert 0.1 < fast.precision[fast.precision > -1].mean() < 0.95


def test_the_original_annotation_file_gives_the_same(shapes: Path) -> None:
    """Ids, categories and areas of the file, as pycocotools reads it by itself."""
    truth = Truth(PackedCoco(shapes / "val"))
    table = guesses(truth, 3000, seed=5)
    rounded = result_rows(table)
    with redirect_stdout(io.StringIO()):
        original = COCO(str(shapes / "coco" / "annotations" / "instances_val.json"))
        scorer = COCOeval(original, original.loadRes(copy.deepcopy(rounded)), "bbox")
        scorer.evaluate()
        scorer.accumulate()
    table = DetectionTable(
        table.image_ids,
        np.array([row["bbox"] for row in rounded]),
        np.array([row["score"] for row in rounded]),
        table.category_ids,
    )
    assert equal(compare(truth, truth.found(table), "bbox", 100), Measured.of(scorer, scorer.params.maxDets))


@pytest.mark.parametrize("ranks", [1, 3])
def test_without_the_library_the_ranks_share_the_work(
    shapes: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = PackedCoco(shapes / "val")
    table = guesses(Truth(pack), 2000, seed=7)
    expected = score(pack, table)
    monkeypatch.setattr(coco, "has_fast_scorer", lambda: False)

    def body(world: Communicator) -> dict[str, float] | None:
        truth = Truth(pack, 2 if ranks == 1 else None)
        measured = measure_together(truth, table if world.rank == 0 else None, 100, world)
        assert (measured is None) == (world.rank > 0)
        return score(truth, table, measured=measured).logged() if measured else None

    first, *others = run_ranks(ranks, body)
    assert others == [None] * (ranks - 1)
    if ranks == 1:
        expected = score(pack, table, 2)
    assert first == pytest.approx(expected.logged(), abs=0, nan_ok=True)
