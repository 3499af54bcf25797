"""Two sets that number the same names differently: names decide; what cannot be matched is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from megdet_hpc import evaluate, train
from megdet_hpc.config import DataConfig
from megdet_hpc.data.categories import Categories, match_labels
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.engine.checkpoint import load_checkpoint
from megdet_hpc.errors import UserError
from megdet_hpc.evaluation.coco import score
from megdet_hpc.evaluation.inference import SetDetection
from megdet_hpc.parallel.serial import SerialCommunicator
from tests.cases.scoring_sets import Perfect, coco, pack
from tests.conftest import Here, run

TRAIN = {1: "apple", 2: "banana", 3: "cherry"}
VAL = {1: "apple", 2: "cherry", 3: "banana"}


def categories(names: dict[int, str]) -> Categories:
    return Categories([{"id": key, "name": name} for key, name in names.items()])


def matched(train: dict[int, str], val: dict[int, str]) -> tuple[list[int | None], str]:
    """The scored set's id by the trained categories in order, and the note."""
    labels = match_labels(categories(train), categories(val), "data.train", "data.val")
    ids = [int(key) if has else None for key, has in zip(labels.ids, labels.present, strict=True)]
    assert ids[0] is None
    return ids[1:], labels.note


def test_the_same_names_are_matched_and_it_is_said() -> None:
    assert matched(TRAIN, TRAIN) == ([1, 2, 3], "")
    assert matched(TRAIN, dict(reversed(TRAIN.items()))) == ([1, 2, 3], "")
    ids, note = matched(TRAIN, VAL)
    assert ids == [1, 3, 2]
    assert "matched by name: cherry 3 -> 2, banana 2 -> 3" in note
    ids, note = matched(TRAIN, {0: "apple", -5: "banana", 90: "cherry"})
    assert ids == [0, -5, 90] and "apple 1 -> 0" in note


def test_a_set_with_some_of_the_names() -> None:
    ids, note = matched(TRAIN, {7: "cherry"})
    assert ids == [None, None, 7]
    assert "data.val lacks 2 of data.train's 3 (apple, banana)" in note and "cherry 3 -> 7" in note


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (
            {1: "apple", 2: "durian", 3: "cherry"},
            "id 2 is banana in data.train, durian in data.val; data.val has 'durian'",
        ),
        ({**TRAIN, 4: "durian"}, "id 4 is durian in data.val, and data.train has no such id"),
        ({1: "apple", 2: "Banana ", 3: "cherry"}, "data.train has 'banana': make case and blanks the same in both"),
        ({1: "apple", 2: "bananas"}, "which data.train has not (the nearest is 'banana')"),
        ({1: "apple", 2: "apple", 3: "cherry"}, "id 2 is banana in data.train, apple in data.val; names cannot tell"),
    ],
)
def test_other_names_are_refused(val: dict[int, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        matched(TRAIN, val)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_occur_twice_leave_it_to_the_ids() -> None:
    twice = {1: "thing", 2: "thing", 3: "part"}
    assert matched(twice, twice) == ([1, 2, 3], "")
    assert matched(twice, {2: "thing", 3: "part"})[0] == [None, 2, 3]
    with pytest.raises(UserError, match=r"'thing' occurs twice in data\.train"):
        matched(twice, {1: "thing", 2: "part", 3: "thing"})


def test_perfect_detections_score_1(tmp_path: Path) -> None:
    dataset = DetectionDataset.open(pack(coco([5, 6], VAL), tmp_path), DataConfig(), training=False, seed=0)
    labels = match_labels(categories(TRAIN), dataset.categories, "data.train", "data.val")
    # boxes are apple, cherry, banana, apple, which training calls 1, 3, 2, 1
    detector, world = Perfect([1, 3, 2, 1]), SerialCommunicator()
    found = SetDetection(dataset, torch.device("cpu"), labels, world, num_workers=0).of_all(detector)
    assert found is not None and found.category_ids.tolist() == [1, 2, 3, 1] * 2
    assert score(dataset.pack, found).metrics["AP"] == pytest.approx(1)


def test_train_resume_and_evaluate(tmp_path: Path, here: Here) -> None:
    packs = {
        name: pack(coco(range(1, 3), names), tmp_path / name)
        for name, names in {"train": TRAIN, "val": VAL, "other": {**TRAIN, 2: "durian"}}.items()
    }
    small = ["--device", "cpu", "--data.num_workers", "0"]
    keys = ["--config", "tiny", *small, "--data.train", str(packs["train"])]
    keys += ["--data.images_per_rank", "2", "--solver.epochs", "1", "--output", str(tmp_path / "run")]
    refused = here(train.main, [*keys, "--data.val", str(packs["other"])])
    assert refused.returncode == 2 and not (tmp_path / "run").exists()
    assert "id 2 is banana in data.train, durian in data.val" in refused.stderr
    scored_at_the_end = ["--data.val", str(packs["val"]), "--evaluation.score_threshold", "0"]
    done = here(train.main, [*keys, *scored_at_the_end])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("matched by name: cherry 3 -> 2, banana 2 -> 3") == 1
    rows = json.loads((tmp_path / "run" / "detections.json").read_text())
    assert rows and {row["category_id"] for row in rows} <= {1, 2, 3}

    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001.pt"
    words = ["--checkpoint", str(checkpoint), *small, "--data.val"]
    program, results = [sys.executable, "-m", "megdet_hpc.evaluate"], ["--results", str(tmp_path / "again.json")]
    scored = run([*program, *words, str(packs["val"]), *results])
    assert scored.returncode == 0, scored.stderr
    assert "categories: data.val numbers them differently than the checkpoint" in scored.stdout
    assert json.loads((tmp_path / "again.json").read_text()) == rows
    refused = here(evaluate.main, [*words, str(packs["other"])])
    assert refused.returncode == 2
    assert "id 2 is banana in the checkpoint, durian in data.val" in refused.stderr

    state = load_checkpoint(checkpoint)
    torch.save({**state, "category_names": list(VAL.values())}, tmp_path / "renamed.pt")
    own = [*keys[:-1], str(tmp_path / "new"), "--data.val", "null", "--resume", str(tmp_path / "renamed.pt")]
    resumed = here(train.main, own)
    assert resumed.returncode == 2
    assert "id 2 is cherry in checkpoint" in resumed.stderr and "banana in data.train" in resumed.stderr
