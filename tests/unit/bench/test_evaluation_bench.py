from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megdet_hpc.bench.__main__ import main
from tests.conftest import ROOT, environment


def test_both_detectors_find_the_same(tmp_path: Path) -> None:
    options = ["--images", "0", "--backbone", "resnet18", "--detect", "3", "--image-size", "64", "--batches", "1", "2"]
    main(["evaluation", *options, "--detect-repeats", "1", "--json", str(tmp_path / "r.json")])
    rows = json.loads((tmp_path / "r.json").read_text())["images/s"]
    assert [row["detector"] for row in rows][1:] == ["ours, 1 at a time", "ours, 2 at a time"]
    for row in rows:
        assert row["median"] > 0 and row["largest difference of scores"] < 1e-4
    assert "scorer" not in rows[0]


def test_without_hotcoco_the_other_scorer_is_timed(tmp_path: Path) -> None:
    """As on a machine that lacks it: no such module is found."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec; sys.modules['hotcoco'] = None; "
        "u.find_spec = lambda name, *a: None if name == 'hotcoco' else find(name, *a); "
        "from megdet_hpc.bench.__main__ import main; main(sys.argv[1:])"
    )
    scored = ["--images", "10", "--detections", "5", "--classes", "3", "--detect", "0", "--json", str(tmp_path / "r")]
    done = subprocess.run(
        [sys.executable, "-c", code, "evaluation", *scored], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r").read_text())
    assert [row["scorer"] for row in report["times of the processor"]] == ["pycocotools"]
    assert report["not measured"] == "hotcoco, which is not installed; pip install hotcoco"


def test_both_scorers_are_timed_and_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = ["--images", "40", "--detections", "20", "--classes", "3", "--detect", "0"]
    main(["evaluation", *scored, "--json", str(tmp_path / "r.json")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["largest difference of precision, recall and scores"] == "0 0 0"
    assert [row["scorer"] for row in report["times of the processor"]] == ["hotcoco", "pycocotools"]
    assert "40 images, 292 boxes, 3 classes, 800 detections" in capsys.readouterr().out
