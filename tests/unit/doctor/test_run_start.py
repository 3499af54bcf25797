"""What the preflight says of a training before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megdet_hpc.doctor.findings import Finding
from megdet_hpc.doctor.run_start import probe_training
from megdet_hpc.models.weights import default_file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megdet_hpc.models.weights._CHECKOUT", tmp_path)
    monkeypatch.delenv("MEGDET_ROOT", raising=False)
    return tmp_path


def probe(*words: str) -> Finding:
    (found,) = probe_training(["--config", "megdet_r50_fpn_256", "--output", "run", *words], 128)
    return found


def test_the_papers_run_without_and_with_weights(folder: Path) -> None:
    found = probe()
    assert (found.verdict, found.detail) == (
        "slow",
        "5093 steps of 256 images on 128 rank(s); the backbone starts from scratch",
    )
    assert "36.8 against 40.3 at 2x" in found.advice and "\n" not in found.advice
    assert "--output weights/resnet50.pth; the same start with --model.backbone_weights" in found.advice
    assert probe("--model.backbone_weights", "null").verdict == "fine"
    default_file("resnet50").parent.mkdir()
    default_file("resnet50").touch()
    assert probe().detail.endswith("backbone: weights/resnet50.pth")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--norm.size", "3"], "norm.size 3: 128 ranks x 2 images per rank"),
        (["--norm.kind", "frozen"], "norm.kind frozen would keep random weights"),
        (["--model.backbone_weights", "mine.pth"], "model.backbone_weights mine.pth: no such file"),
        (["--norm.kind", "frozen", "--model.backbone_weights", "null"], "norm.kind frozen would keep random weights"),
    ],
)
def test_what_every_attempt_would_end_with_is_wrong_for_good(words: list[str], message: str) -> None:
    found = probe(*words)
    assert (found.verdict, found.lasting) == ("wrong", True)
    assert found.detail.startswith(message)


def test_a_run_that_goes_on_has_weights(folder: Path) -> None:
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "step_00000010.pt").touch()
    frozen = ("--norm.kind", "frozen", "--model.backbone_weights", "null")
    assert probe(*frozen, "--resume", "auto").verdict == "fine"
    assert probe(*frozen).verdict == "wrong"
