"""Sets without a box to find: crowd regions only, or no annotation. Nothing is trained, nothing scored, nothing 0."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megdet_hpc.config import DataConfig
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.errors import UserError
from megdet_hpc.log import MetricsLog, read_metrics
from megdet_hpc.report.curves import draw_curves
from megdet_hpc.study.outcome import judge
from tests.cases.scoring_sets import coco, pack
from tests.conftest import run


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    boxes, none = coco([1, 2]), coco([1, 2])
    none["annotations"] = []
    regions = coco([1, 2], iscrowd=1, segmentation={"size": [90, 120], "counts": [900, 1000, 8900]})
    sets = {"boxes": boxes, "crowd": regions, "none": none}
    return {name: pack(source, folder / name) for name, source in sets.items()}


def train(packs: dict[str, Path], train: str, val: str, output: Path) -> Any:
    command = [sys.executable, "-m", "megdet_hpc.train", "--config", "tiny", "--device", "cpu", "--solver.epochs", "1"]
    data = ["--data.train", str(packs[train]), "--data.val", str(packs[val]), "--data.num_workers", "0"]
    return run([*command, *data, "--data.images_per_rank", "2", "--output", str(output)])


def test_training_without_a_target_is_refused(packs: dict[str, Path], tmp_path: Path) -> None:
    crowd = train(packs, "crowd", "crowd", tmp_path / "a")
    assert crowd.returncode == 2
    assert "its 2 images hold 8 crowd regions (iscrowd 1), which training leaves out" in crowd.stderr
    none = train(packs, "none", "none", tmp_path / "b")
    assert none.returncode == 2 and "its 2 images hold no annotation" in none.stderr
    assert "Traceback" not in crowd.stderr + none.stderr


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0.1, 0.2, 0.3, 0.4], "8 boxes thinner than a pixel once resized (are they fractions of the image's sides?)"),
        ([500, 10, 36, 28], "8 boxes outside their image"),
        ([8, 10, 36, 0], "8 boxes thinner than a pixel"),
    ],
)
def test_boxes_that_training_would_drop_are_no_targets(box: list[float], message: str, tmp_path: Path) -> None:
    source = coco([1, 2])
    source["annotations"] = [{**record, "bbox": box} for record in source["annotations"]]
    config = DataConfig(short_sides=(90, 110), max_side=200)
    dataset = DetectionDataset.open(pack(source, tmp_path), config, training=True, seed=0)
    with pytest.raises(UserError, match=re.escape(message)):
        dataset.check_targets("data.train")
    assert all(len(dataset[(0, index)].target) == 0 for index in range(2))


def test_a_validation_set_without_boxes_gets_no_ap(packs: dict[str, Path], tmp_path: Path) -> None:
    done = train(packs, "boxes", "crowd", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"result: nothing to score output={tmp_path / 'run'}"
    assert "all 8 annotations are crowd regions (iscrowd 1)" in done.stdout
    assert "validation nothing to score" in done.stdout + done.stderr
    assert "AP=" not in done.stdout + done.stderr
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"val/AP": null' in text and "NaN" not in text and "-1" not in text
    assert (tmp_path / "run" / "curves.png").stat().st_size > 0
    assert not (tmp_path / "run" / "best.json").exists()
    assert judge(tmp_path / "run", 0, 2).ap is None

    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001.pt"
    command = ["--checkpoint", str(checkpoint), "--data.val", str(packs["none"]), "--results", str(tmp_path / "r.json")]
    scored = run([sys.executable, "-m", "megdet_hpc.evaluate", *command, "--evaluation.score_threshold", "0"])
    assert scored.returncode == 0, scored.stderr
    rows = json.loads((tmp_path / "r.json").read_text())
    assert {row["image_id"] for row in rows} == {1, 2}
    assert "nothing to score in the 2 images of" in scored.stdout and "AP=" not in scored.stdout
    assert scored.stdout.splitlines()[-1] == "result: nothing to score images=2"


def test_rows_of_older_runs_hold_no_minus_1(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "val/AP": 0.5, "val/APl": -1.0, "lr": -1}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "val/AP": 0.5, "val/APl": None, "lr": -1}]
    log = MetricsLog(tmp_path, 3)
    log.write(4, log.validation(3))
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 4, "AP": 0.5, "APl": None}
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "an older run")
    assert (tmp_path / "curves.png").stat().st_size > 0
