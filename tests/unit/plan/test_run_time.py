"""Hours of a run beside its updates: evaluations, checkpoints and starts, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megdet_hpc.plan.__main__ import main
from megdet_hpc.plan.run_time import checkpoint_bytes

RUN = [
    "--config",
    "megdet_r50_fpn_256",
    "--ranks",
    "128",
    "--images-per-second",
    "5",
    "--model.backbone_weights",
    "null",
]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """The plan's lines by their first word."""
    main([*RUN, *words])
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: " ".join(line.split()) for line in lines if line and not line.startswith(" ")}


def test_assumptions_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """11 epochs: 11 evaluations of 40 of COCO's 5,000 images a rank at 15 images/s, 11 checkpoints, one start."""
    main(RUN)
    shown = " ".join(capsys.readouterr().out.split())
    assert "evaluation 0.00815 h = 11 of 2.67 s, in which the training waits" in shown
    assert "5000 images (assumed: COCO val2017) at 3 x the speed of training, assumed" in shown
    assert "checkpoints 0.00204 h = 11 of 0.668 s (0.334 GB at 0.5 GB/s, assumed)" in shown
    assert "start-up 0.167 h = 1 job(s) x 10 min to start and to end (assumed)" in shown


def test_given_times_replace_them(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--evaluation-seconds",
        "360",
        "--write-seconds",
        "36",
        "--restart-minutes",
        "6",
        "--evaluation.times",
        "5",
    ]
    lines = said(capsys, *options, "--checkpoints.every_epochs", "2")
    assert lines["evaluation"] == "evaluation 0.5 h = 5 of 360 s, in which the training waits"
    assert lines["checkpoints"] == "checkpoints 0.06 h = 6 of 36 s (0.334 GB; time given)"
    assert lines["start-up"].startswith("start-up 0.1 h = 1 job(s) x 6 min")
    training = float(lines["training"].split()[1])
    assert float(lines["total"].split()[1]) == pytest.approx(training + 0.5 + 0.06 + 0.1, abs=6e-3)


def test_a_queues_limit_holds_for_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """0.6 h of updates fit one job of 1 h; with 5 evaluations of 6 minutes it takes two, each with its start."""
    options = ["--queue-limit", "1", "--restart-minutes", "6"]
    assert said(capsys, *options)["walltime"] == "walltime 1 job(s) of 1 h"
    lines = said(capsys, *options, "--evaluation-seconds", "360", "--evaluation.times", "5")
    assert lines["walltime"] == "walltime 2 job(s) of 1 h" and lines["start-up"].startswith("start-up 0.2 h = 2 job(s)")


def test_a_deferred_evaluation_takes_a_checkpoint_and_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--evaluation.mode", "deferred", "--evaluation.times", "20", "--write-speed", "0.1"]
    lines = said(capsys, *options)
    assert lines["evaluation"].startswith("evaluation 0 h of this job: evaluation.mode deferred leaves 20 checkpoints")
    assert lines["checkpoints"] == "checkpoints 0.0186 h = 20 of 3.34 s (0.334 GB at 0.1 GB/s, given)"


def test_views_and_minutes_count(capsys: pytest.CaptureFixture[str]) -> None:
    """Two scales seen both ways are four passes; 0.6 h of updates with a checkpoint every minute has 37."""
    options = ["--evaluation.scales", "[400,800]", "--evaluation.flip", "true", "--checkpoints.every_minutes", "1"]
    lines = said(capsys, *options, "--val-images", "1280")
    assert "= 11 of 2.67 s" in lines["evaluation"] and "= 37 of" in lines["checkpoints"]


def test_without_a_validation_set_nothing_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--data.val", "null")["evaluation"] == "evaluation none, since data.val is null"


def test_a_checkpoint_has_no_gradients() -> None:
    """Of 10 values 8 are trained: 10 weights and 8 momenta, 4 bytes each."""
    assert checkpoint_bytes(4 * (10 + 2 * 8), 8) == 4 * 18


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--val-images", "0"], "--val-images 0; accepted: 1 or more"),
        (["--write-speed", "0"], "--write-speed 0; accepted: a number above 0"),
        (["--evaluation-seconds", "-1"], "--evaluation-seconds -1; accepted: a number of 0 or more"),
        (["--queue-limit", "0.1"], "--queue-limit 0.1 h: --restart-minutes 10 leaves no time to train"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*RUN, *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_pack_tells_its_images(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*RUN, "--data.val", str(shapes / "val")])
    assert f"10 images (manifest of {shapes / 'val'})" in " ".join(capsys.readouterr().out.split())
