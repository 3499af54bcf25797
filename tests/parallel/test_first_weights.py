"""Training with, without and against the backbone's first weights, as a user types it."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.models import resnet18

from megdet_hpc.engine.checkpoint import load_checkpoint
from megdet_hpc.train import main
from tests.parallel.test_doctor import mpmd
from tests.parallel.test_training import arguments, newest

ONE_STEP = ["--data.val", "null", "--max_steps", "1", "--model.backbone_weights", "auto"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, without weights."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("fetched") / "resnet18.pth"
    torch.manual_seed(7)
    torch.save(resnet18().state_dict(), file)
    return file


def put(weights: Path, work: Path) -> Path:
    (work / "weights").mkdir()
    return shutil.copy(weights, work / "weights" / weights.name)


def words(shapes: Path, output: Path, *further: str) -> list[str]:
    return arguments(shapes, output, *ONE_STEP, "--model.backbone", "resnet18", *further)[2:]


@pytest.mark.parallel
def test_rank_0_alone_needs_the_file_and_a_resumed_run_none(shapes: Path, work: Path, weights: Path) -> None:
    file, output = put(weights, work), work / "run"
    python = [sys.executable, "-m", "megdet_hpc.train", *words(shapes, output)]
    done = mpmd(["-wdir", str(work), *python], ["-wdir", "/", *python])
    assert done.returncode == 0, done.stdout + done.stderr
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"{file}, sha256 {digest[:12]}" in done.stdout and "random weights" not in done.stderr
    stored = yaml.safe_load((output / "config.yaml").read_text())["model"]
    assert (stored["backbone_weights"], stored["backbone_sha256"]) == (str(file), digest)
    assert load_checkpoint(newest(output))["config"]["model"]["backbone_sha256"] == digest
    file.unlink()
    main([*words(shapes, output), "--max_steps", "2", "--resume", "auto"])
    state = load_checkpoint(newest(output))
    assert state["step"] == 2 and state["config"]["model"]["backbone_weights"] == str(file)


def test_a_run_without_weights_starts_as_typed_and_says_what_that_costs(
    shapes: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(words(shapes, work / "run"))
    shown = capfd.readouterr()
    assert "warning: the backbone begins with random weights: model.backbone_weights is auto" in shown.err
    assert "fetch_backbone --backbone resnet18 --output weights/resnet18.pth" in shown.err
    assert "first weights: random weights, from scratch" in shown.out
    assert yaml.safe_load((work / "run" / "config.yaml").read_text())["model"]["backbone_weights"] is None


def test_fixed_statistics_on_random_weights_are_refused_unless_accepted(
    shapes: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    frozen = words(shapes, work / "run", "--norm.kind", "frozen")
    with pytest.raises(SystemExit) as ended:
        main(frozen)
    assert ended.value.code == 2
    assert "error: norm.kind frozen would keep random weights or statistics" in capfd.readouterr().err
    main([*frozen, "--model.fixed_from_scratch", "true"])
    assert load_checkpoint(newest(work / "run"))["step"] == 1


def test_a_run_begins_with_another_runs_detector(shapes: Path, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main([*words(shapes, work / "first"), "--model.backbone", "resnet10"])
    began = load_checkpoint(newest(work / "first"))
    capfd.readouterr()
    more = ["--model.backbone", "resnet10", "--model.weights", str(work / "first"), "--model.frozen_stages", "5"]
    main([*words(shapes, work / "second"), *more])
    file = newest(work / "first")
    lines = capfd.readouterr().out
    assert f"begins with:   {file} (checkpoint of megdet_hpc, step 1)" in lines
    assert "kept for circle, square, triangle, star, ring\n" in lines and "drawn anew" not in lines
    state = load_checkpoint(newest(work / "second"))
    backbone = [key for key in began["model"] if key.startswith("backbone.body.") and "num_batches" not in key]
    assert len(backbone) > 30
    assert all(torch.equal(began["model"][key], state["model"][key]) for key in backbone)
    moved = "roi_heads.box_predictor.cls_score.bias"
    assert not torch.equal(began["model"][moved], state["model"][moved])
    stored = state["config"]["model"]
    assert (stored["weights"], stored["weights_sha256"]) == (str(file), hashlib.sha256(file.read_bytes()).hexdigest())
    shutil.rmtree(work / "first")
    main([*words(shapes, work / "second"), *more, "--max_steps", "2", "--resume", "auto"])
    assert load_checkpoint(newest(work / "second"))["step"] == 2


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (["--model.weights", "absent"], "model.weights absent: no such file"),
        (["--model.weights", "."], "is no run's folder"),
        (["--model.weights", "x.pth", "--model.backbone_weights", "y.pth"], "a detector brings its backbone"),
    ],
)
def test_a_detector_that_is_not_there_is_named(
    shapes: Path, work: Path, capfd: pytest.CaptureFixture[str], wish: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words(shapes, work / "run"), *wish])
    assert ended.value.code == 2 and message in capfd.readouterr().err
