"""What users of every peer ask of the evaluation: other programs' results, AP by class, the best checkpoint kept."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from megdet_hpc import train
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.engine.checkpoint import (
    Best,
    checkpoint_files,
    load_checkpoint,
    load_newest,
    note_best,
    read_best,
    save_checkpoint,
    step_of,
)
from megdet_hpc.errors import UserError
from megdet_hpc.evaluate import _read_task
from megdet_hpc.evaluation.results import read_results
from megdet_hpc.log import read_metrics
from tests.cases.scoring_sets import BOXES, coco, pack
from tests.conftest import Here, run

ROW = {"image_id": 1, "category_id": 1, "bbox": [8, 10, 36, 28], "score": 0.9}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(coco([1, 2]), tmp_path_factory.mktemp("set"))


def evaluate(*arguments: str) -> Any:
    return run([sys.executable, "-m", "megdet_hpc.evaluate", *arguments])


def test_results_of_another_program_get_the_twelve_numbers(packed: Path, tmp_path: Path) -> None:
    boxes = [(image, place, box) for image in (1, 2) for place, box in enumerate(BOXES)][:-1]
    rows = [{**ROW, "image_id": i, "category_id": 1 + place % 2, "bbox": box} for i, place, box in boxes]
    rows.append({**ROW, "bbox": [0, 0, 5, 5], "score": 1, "segmentation": []})
    (tmp_path / "results.json").write_text(json.dumps(rows))
    done = evaluate("--results", str(tmp_path / "results.json"), "--data.val", str(packed))
    assert done.returncode == 0, done.stderr
    truth = COCO(str(packed.parent / "annotations.json"))
    scorer = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
    scorer.evaluate(), scorer.accumulate(), scorer.summarize()
    lines = done.stdout.splitlines()
    numbers = [word.split("=")[1] for word in lines[-3].split()]
    assert numbers == ["none" if value == -1 else f"{value:.4f}" for value in scorer.stats]
    assert lines[-1] == f"result: AP={scorer.stats[0]:.3f} AP50={scorer.stats[1]:.3f} images=2"
    table = [line.split() for line in lines[1:4]]
    assert [row[:2] for row in table] == [["class", "boxes"], ["red", "4"], ["blue", "4"]]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_id": 3}, r"row 1 .*: image_id is 3, which .* has not; its 2 images: 1, 2$"),
        ({"image_id": "1"}, r"image_id is '1', expected an integer"),
        ({"category_id": 0}, r"category_id is 0, which .* has not; its categories: 1, 2$"),
        ({"bbox": None, "segmentation": {}}, r"bbox is None, expected 4 finite numbers"),
        ({"bbox": [1, 2, math.nan, 4]}, r"bbox is \[1, 2, nan, 4\], expected 4 finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, r"width >= 0, height >= 0"),
        ({"score": math.nan}, r"score is nan, expected a finite number"),
        ({"score": 10**400}, r"score is 1000.*, expected a finite number"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(row: dict[str, Any], message: str, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps([ROW, {**ROW, **row}]))
    with pytest.raises(UserError, match=message):
        read_results(tmp_path / "results.json", PackedCoco(packed))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "not valid JSON"),
        ('{"annotations": []}', "holds an object with the keys 'annotations', expected a list of detections"),
        ('[{"image_id": 1, "category_id": 1, "segmentation": {}, "score": 1}]', "has no 'bbox', nor a segmentation"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}, 7]', "has no 'score'.*; 2 of 2 rows cannot be"),
    ],
)
def test_a_file_of_another_kind_is_named(text: str, message: str, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_results(tmp_path / "results.json", PackedCoco(packed))


def test_the_command_line_says_what_it_takes(packed: Path, tmp_path: Path) -> None:
    neither = evaluate("--data.val", str(packed))
    assert neither.returncode == 2 and "--results FILE.json --data.val DIR" in neither.stderr
    missing = evaluate("--data.val", str(packed), "--results", str(tmp_path / "none.json"))
    assert missing.returncode == 2
    assert (
        missing.stderr
        == f"megdet_hpc: error: results {tmp_path / 'none.json'}: cannot be read (No such file or directory)\n"
    )


def save(run: Path, step: int) -> Path:
    state = {"step": step, "model": {"w": torch.full((3,), float(step))}}
    return save_checkpoint(run / "checkpoints", step, state, keep=2, spared=[run / read_best(run).file])


def steps(run: Path) -> list[int]:
    return [step_of(file) for file in checkpoint_files(run / "checkpoints")]


def test_the_best_checkpoint_outlives_the_newest(tmp_path: Path) -> None:
    assert read_best(tmp_path) == Best()
    for step, ap in enumerate((0.1, 0.5, 0.2, 0.3, 0.6, 0.2, 0.1, 0.0), start=1):
        file = save(tmp_path, step)
        if ap > read_best(tmp_path).AP:
            note_best(tmp_path, file, {"AP": ap, "AP50": ap})
        if step == 4:
            assert steps(tmp_path) == [2, 3, 4]
    assert steps(tmp_path) == [5, 7, 8]
    best = tmp_path / "checkpoints" / "step_00000005.pt"
    assert read_best(tmp_path) == Best("checkpoints/step_00000005.pt", 5, 0.6, 0.6)
    newest = load_newest(tmp_path / "checkpoints")
    assert newest is not None and newest[1]["step"] == 8
    assert load_checkpoint(tmp_path / "best.json")["step"] == 5
    best.unlink()
    assert read_best(tmp_path) == Best()
    with pytest.raises(UserError, match=r"best\.json: names no checkpoint that is there"):
        load_checkpoint(tmp_path / "best.json")


def test_a_run_keeps_its_best_and_goes_on_from_its_newest(packed: Path, tmp_path: Path, here: Here) -> None:
    output = tmp_path / "run"
    keys = ["--config", "tiny", "--device", "cpu", "--data.num_workers", "0", "--data.train", str(packed)]
    keys += ["--data.val", str(packed), "--data.images_per_rank", "2", "--solver.epochs", "4", "--output", str(output)]
    keys += ["--evaluation.every_epochs", "1", "--checkpoints.every_epochs", "1"]
    first = here(train.main, [*keys, "--max_steps", "3"])
    assert first.returncode == 0, first.stderr
    best = read_best(output)
    scores = {row["step"]: row["val/AP"] for row in read_metrics(output / "metrics.jsonl") if "val/AP" in row}
    assert best.AP == max(scores.values()) == scores[best.step]
    assert "val/AP50/red" in read_metrics(output / "metrics.jsonl")[-1]
    # an earlier step was the best of all
    note_best(output, output / "checkpoints" / "step_00000002.pt", {"AP": 0.99, "AP50": 1.0})
    again = here(train.main, [*keys, "--resume", "auto"])
    assert again.returncode == 0, again.stderr
    assert "from " + str(output / "checkpoints" / "step_00000003.pt") in again.stdout
    assert steps(output) == [2, 3, 4]
    scored = evaluate("--checkpoint", str(output / "best.json"), "--data.val", str(packed))
    assert scored.returncode == 0 and scored.stdout.startswith("step 2, "), scored.stderr
    # a results file that cannot be written is no success, although there are scores
    lost = output / "config.yaml" / "results.json"
    scored = evaluate("--checkpoint", str(output), "--data.val", str(packed), "--results", str(lost))
    assert scored.returncode == 2 and "\nresult: AP=" in scored.stdout
    assert f"{lost}: cannot be written (" in scored.stderr and "so the detections are lost" in scored.stderr


def test_the_results_of_a_runs_folder_are_in_it(tmp_path: Path) -> None:
    of = {path: _read_task(["--checkpoint", str(path)], None).results for path in (tmp_path, tmp_path / "best.json")}
    assert set(of.values()) == {tmp_path / "best.detections.json"}
