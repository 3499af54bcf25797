"""Averaged weights from the run to the commands that use them. tests/parallel/test_toy.py has the ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import megdet_hpc
from megdet_hpc import evaluate, train
from megdet_hpc.analyze.inputs import inputs_of_run
from megdet_hpc.engine import loop
from megdet_hpc.engine.checkpoint import load_checkpoint, read_best
from megdet_hpc.errors import UserError
from megdet_hpc.log import read_metrics
from tests.parallel.test_toy import IMAGES, STEPS, arguments, known

pytestmark = pytest.mark.parallel
EMA = ("--solver.ema_decay", "0.999")
__all__ = ["known"]  # the fixture


@pytest.fixture(scope="module")
def averaged(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 updates with averaged weights."""
    with pytest.MonkeyPatch.context() as patch:
        known.__wrapped__(patch)  # type: ignore[attr-defined]
        folder = tmp_path_factory.mktemp("ema") / "run"
        train.main(arguments(shapes, folder, IMAGES // 2, *EMA))
    return folder


def checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("*.pt"))[-1]


def test_a_run_scores_both_and_its_best_is_of_the_average(averaged: Path) -> None:
    row = read_metrics(averaged / "metrics.jsonl")[-1]
    assert {"val/AP", "val/AP50", "val/ema_AP", "val/ema_AP50", "val/ema_AR100"} <= row.keys()
    best = read_best(averaged)
    assert (best.weights, best.metric, best.AP) == ("ema", "ema_AP", row["val/ema_AP"])
    state = load_checkpoint(checkpoint(averaged))
    assert state["ema"]["iterations"] == 2 * STEPS * 12 / 16
    assert any(not torch.equal(value, state["ema"]["model"][name]) for name, value in state["model"].items())


@pytest.mark.parametrize(("options", "own"), [((), "detections.json"), (("--weights", "raw"), "detections_raw.json")])
def test_evaluate_takes_the_weights_that_are_asked_for(
    averaged: Path, shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], own: str
) -> None:
    file = tmp_path / "found.json"
    words = ["--checkpoint", str(checkpoint(averaged)), "--data.val", str(shapes / "val"), "--device", "cpu"]
    evaluate.main([*words, "--results", str(file), *options])
    assert json.loads(file.read_text()) == json.loads((averaged / own).read_text())
    both = [json.loads((averaged / name).read_text()) for name in ("detections.json", "detections_raw.json")]
    assert both[0] != both[1]
    kind = "raw, those of the last update" if options else "ema, the moving average"
    assert f"weights: {kind} (--weights " in capfd.readouterr().out


def test_a_detector_in_python_and_an_analysis(averaged: Path) -> None:
    state = load_checkpoint(checkpoint(averaged))
    for choice, stored in ((None, state["ema"]["model"]), ("ema", state["ema"]["model"]), ("raw", state["model"])):
        own = megdet_hpc.load(averaged, device="cpu", weights=choice).model.state_dict()
        assert all(torch.equal(value, stored[name]) for name, value in own.items()), choice
    row = read_metrics(averaged / "metrics.jsonl")[-1]
    for choice, name, ap in ((None, "detections.json", "val/ema_AP"), ("raw", "detections_raw.json", "val/AP")):
        inputs = inputs_of_run(averaged, None, None, choice)
        assert (inputs.results.name, inputs.logged_ap) == (name, row[ap])


def test_an_average_begins_with_the_raw_weights_and_ends_with_a_word(
    shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train.main(arguments(shapes, run, IMAGES, "--max_steps", "1", "--data.val", "null"))
    before = load_checkpoint(checkpoint(run))
    assert "ema" not in before
    with pytest.raises(UserError, match="has no averaged weights; --weights raw takes those it has"):
        megdet_hpc.load(run, device="cpu", weights="ema")
    more = ("--resume", "auto", "--data.val", "null", "--max_steps")
    train.main(arguments(shapes, run, IMAGES, *more, "2", *EMA, "--solver.ema_ramp", "false"))
    assert "begins with the raw weights, since the checkpoint has no averaged ones" in capfd.readouterr().out
    after = load_checkpoint(checkpoint(run))
    for name in ("backbone.0.weight", "head.bias"):
        weight = 1 - 0.999 ** (24 / 16)
        torch.testing.assert_close(
            after["ema"]["model"][name], torch.lerp(before["model"][name], after["model"][name], weight)
        )
    train.main(arguments(shapes, run, IMAGES, *more, "3"))
    assert "ema:           off; the averaged weights of the checkpoint are left behind" in capfd.readouterr().out
    assert "ema" not in load_checkpoint(checkpoint(run))


def test_a_skipped_update_is_none_of_the_average(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float16's skipped updates; here the loop is told that each second one was."""
    step = loop.train_step

    def skipping(*given: Any, **named: Any) -> Any:
        return dataclasses.replace(step(*given, **named), skipped=named["step"] % 2 == 1)

    monkeypatch.setattr(loop, "train_step", skipping)
    run = tmp_path / "run"
    train.main(arguments(shapes, run, IMAGES, *EMA, "--data.val", "null"))
    assert load_checkpoint(checkpoint(run))["ema"]["iterations"] == STEPS / 2 * 24 / 16
