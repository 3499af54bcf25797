"""evaluation/voc.py: VOC's AP by hand, and beside a plain program written from the devkit's definition."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megdet_hpc import evaluate
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.engine.checkpoint import note_best, read_best
from megdet_hpc.evaluation.coco import class_table, score, score_text
from megdet_hpc.evaluation.columns import Columns, Truth
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.results import write_results
from megdet_hpc.evaluation.voc import voc_average_precisions
from tests.unit.evaluation.test_scorer import guesses, with_crowds


def columns(boxes: list[list[float]], scores: list[float] | None = None) -> Columns:
    """Boxes of one class in one image."""
    number, xywh = len(boxes), np.array(boxes, np.float64).reshape(-1, 4)
    zeros = np.zeros(number, np.int64)
    marks = np.array(scores or [1.0] * number, np.float64)[:number]
    return Columns(zeros, xywh, zeros, xywh[:, 2] * xywh[:, 3], np.zeros(number, np.bool_), marks)


def truth_of(shapes: Path, boxes: list[list[float]], difficult: list[bool]) -> Truth:
    truth = Truth(PackedCoco(shapes / "val"), 1)
    truth.boxes, truth.difficult, truth.names = columns(boxes), np.array(difficult, np.bool_), ["thing"]
    return truth


def at(x: float) -> list[float]:
    return [x, 0, 10, 10]


def test_by_hand(shapes: Path) -> None:
    truth = truth_of(shapes, [at(0), at(100), at(200), at(300)], [False, False, True, False])
    # right, twice on the difficult one, a second on the first object, right, nowhere; object at 300 is missed
    found = columns([at(0), at(201), at(199), at(1), at(100), at(500)], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    # precision 1 at recall 1/3, then 2/3 at recall 2/3: recalls 0 to 0.3 and 0.4 to 0.6
    assert voc_average_precisions(truth, found, "voc07")[0] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    assert voc_average_precisions(truth, found, "voc12")[0] == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)


def test_what_is_a_match(shapes: Path) -> None:
    truth = truth_of(shapes, [at(0), at(4)], [False, False])
    # both detections have their highest IoU with the first object: the second is wrong, though the other is free
    assert voc_average_precisions(truth, columns([at(0), at(1)], [0.9, 0.8]), "voc12")[0] == 0.5
    half = truth_of(shapes, [at(0)], [False])
    assert voc_average_precisions(half, columns([[0, 0, 10, 5]]), "voc12")[0] == 1  # IoU 0.5 itself
    assert voc_average_precisions(half, columns([[0, 0, 10, 4.99]]), "voc12")[0] == 0
    # within a difficult object, but IoU 0.25: wrong, where COCO's crowd regions would ignore it
    inside = truth_of(shapes, [at(0), [100, 0, 20, 20]], [False, True])
    assert voc_average_precisions(inside, columns([at(100), at(0)], [0.9, 0.8]), "voc12")[0] == 0.5


def test_three_of_ten_objects_reach_the_recall_0_3(shapes: Path) -> None:
    truth = truth_of(shapes, [at(50 * i) for i in range(10)], [False] * 10)
    found = columns([at(50 * i) for i in range(3)], [0.9, 0.8, 0.7])
    assert voc_average_precisions(truth, found, "voc07")[0] == pytest.approx(4 / 11)


@pytest.mark.parametrize("metric", ["voc07", "voc12"])
def test_nothing_there(shapes: Path, metric: str) -> None:
    for boxes, difficult in ([], []), ([at(0)], [True]):
        truth = truth_of(shapes, boxes, difficult)
        assert math.isnan(voc_average_precisions(truth, columns([at(0)]), metric)[0])
        assert math.isnan(voc_average_precisions(truth, columns([]), metric)[0])
    assert voc_average_precisions(truth_of(shapes, [at(0)], [False]), columns([]), metric).tolist() == [0.0]


def _plain(truth: Truth, found: Columns, metric: str, label: int) -> float:
    """The AP of a class, one detection at a time, in fractions, after the devkit's description."""
    boxes, ignored = truth.boxes, truth.boxes.crowd | truth.difficult
    own = [row for row in range(len(boxes)) if boxes.classes[row] == label]
    to_find = sum(not ignored[row] for row in own)
    if not to_find:
        return math.nan
    taken: set[int] = set()
    right = wrong = 0
    curve = []
    ranked = [row for row in range(len(found)) if found.classes[row] == label]
    for row in sorted(ranked, key=lambda row: -found.scores[row]):
        best, match = 0.0, -1
        x, y, w, h = found.boxes_xywh[row].tolist()
        for other in own:
            if boxes.images[other] != found.images[row]:
                continue
            a, b, c, d = boxes.boxes_xywh[other].tolist()
            both = max(min(x + w, a + c) - max(x, a), 0) * max(min(y + h, b + d) - max(y, b), 0)
            if both / (w * h + c * d - both) > best:
                best, match = both / (w * h + c * d - both), other
        if best >= 0.5 and ignored[match]:
            continue
        if best >= 0.5 and match not in taken:
            taken.add(match)
            right += 1
        else:
            wrong += 1
        curve.append((Fraction(right, to_find), Fraction(right, right + wrong)))
    if metric == "voc07":
        points = [max((p for r, p in curve if r >= Fraction(k, 10)), default=Fraction(0)) for k in range(11)]
        return float(sum(points) / 11)
    recalls = sorted({Fraction(0), *(r for r, _ in curve)})
    parts = [(b - a) * max(p for r, p in curve if r >= b) for a, b in itertools.pairwise(recalls)]
    return float(sum(parts))


@pytest.mark.parametrize("metric", ["voc07", "voc12"])
def test_equals_a_plain_program(shapes: Path, metric: str) -> None:
    truth = with_crowds(Truth(PackedCoco(shapes / "val")))
    truth.difficult = np.random.default_rng(5).random(len(truth.boxes)) < 0.2
    found = truth.found(guesses(truth, 600, seed=4))
    plain = [_plain(truth, found, metric, label) for label in range(len(truth.names))]
    assert voc_average_precisions(truth, found, metric).tolist() == pytest.approx(plain, abs=1e-12)
    assert all(0.05 < value < 0.95 for value in plain)


def test_names_in_what_is_printed_and_logged(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = PackedCoco(shapes / "val")
    truth = Truth(pack)
    table = guesses(truth, 300, seed=1)
    plain, voc = score(truth, table), score(truth, table, metric="voc07")
    assert "voc" not in " ".join(plain.logged()) and "voc" not in class_table(plain.classes)
    value = voc.metrics["AP50_voc07"]
    assert voc.logged().items() >= plain.logged().items()
    assert value == np.mean([voc.logged()[f"AP50_voc07/{name}"] for name in truth.names])
    assert score_text(voc.metrics).startswith(f"AP50_voc07={value:.3f} AP=")
    write_results(tmp_path / "found.json", table)
    named = ["--results", str(tmp_path / "found.json"), "--data.val", str(shapes / "val")]
    evaluate.main([*named, "--evaluation.metric", "voc12"])
    last = capsys.readouterr().out.splitlines()[-1]
    expected = score(truth, DetectionTable.of(table), metric="voc12").metrics["AP50_voc12"]
    assert last.startswith(f"result: AP50_voc12={expected:.3f} AP=")
    with pytest.raises(SystemExit):
        evaluate.main([*named, "--evaluation.metric", "voc08"])


def test_best_checkpoint_names_its_score(tmp_path: Path) -> None:
    file = tmp_path / "step_00000003.pt"
    file.touch()
    note_best(tmp_path, file, {"AP": 0.1, "AP50": 0.2, "AP50_voc07": 0.3}, by="AP50_voc07")
    best = read_best(tmp_path)
    assert (best.metric, best.highest, best.AP) == ("AP50_voc07", 0.3, 0.1)
    note_best(tmp_path, file, {"AP": 0.1, "AP50": 0.2})
    assert read_best(tmp_path).metric == "AP" and "score" not in json.loads((tmp_path / "best.json").read_text())
