"""A run whose checkpoints a follower scores: the same scores as inside, nothing lost, started in any order."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megdet_hpc import evaluate, owner, train
from megdet_hpc.engine.checkpoint import checkpoint_files, read_best, step_of
from megdet_hpc.errors import MachineError, UserError
from megdet_hpc.log import read_metrics
from megdet_hpc.log.deferred import Due, content_key, leave, read_due, repeat_after, score_rows, settle, waiting
from megdet_hpc.record.run_record import read_run
from megdet_hpc.validation import follower
from megdet_hpc.watch.facts import score_text as watched_scores
from tests.conftest import ROOT, Here, environment
from tests.parallel.test_training import arguments

EVERY = ["--evaluation.every_epochs", "0.25", "--checkpoints.every_epochs", "0.25", "--max_steps", "12"]
DEFERRED = [*EVERY, "--evaluation.mode", "deferred"]
SOON = ["--interval", "0.1"]


def training(shapes: Path, output: Path, *options: str) -> list[str]:
    return [*arguments(shapes, output, *options)[2:], "--solver.ema_decay", "0.9"]


def validations(output: Path) -> dict[int, dict[str, object]]:
    return {
        row["step"]: {key: value for key, value in row.items() if key.startswith("val/")}
        for row in read_metrics(output / "metrics.jsonl")
        if "val/AP" in row
    }


@pytest.fixture(scope="module")
def inside(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that scores itself every 3 updates, averaged weights too."""
    output = tmp_path_factory.mktemp("inside") / "run"
    train.main(training(shapes, output, *EVERY))
    return output


def test_a_follower_scores_what_the_run_would_have(here: Here, shapes: Path, inside: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    trained = here(train.main, training(shapes, output, *DEFERRED))
    assert trained.returncode == 0, trained.stderr
    assert "deferred, 4 to come; at most 4 checkpoints of about" in trained.stdout
    assert f"4 checkpoint(s) wait for their scores: megdet evaluate --follow {output}" in trained.stdout
    # none of them is deleted, although checkpoints.keep is 2
    assert [step_of(file) for file in checkpoint_files(output / "checkpoints")] == [3, 6, 9, 12]
    assert not validations(output) and not (output / "best.json").exists()
    assert watched_scores(read_run(output)).endswith("no validation yet; 4 checkpoint(s) wait for evaluate --follow")

    followed = here(evaluate.main, ["--follow", str(output), *SOON])
    assert followed.returncode == 0, followed.stderr
    assert validations(output) == validations(inside)
    assert " wait" not in watched_scores(read_run(output))
    assert followed.stdout.splitlines()[-1].startswith("result: AP=0.")
    assert (output / "best.json").read_bytes() == (inside / "best.json").read_bytes()
    for name in ("detections.json", "detections_raw.json"):
        assert (output / name).read_bytes() == (inside / name).read_bytes()
    # what nobody needs any more is gone, as in the other run
    kept = [step_of(file) for file in checkpoint_files(output / "checkpoints")]
    assert kept == [step_of(file) for file in checkpoint_files(inside / "checkpoints")]
    assert (output / "deferred" / "tensorboard").is_dir() and (output / "predictions.png").is_file()

    again = here(evaluate.main, ["--follow", str(output), *SOON])
    assert again.returncode == 0 and "step 12: validation" not in again.stdout


def test_started_first_killed_and_started_again(here: Here, shapes: Path, inside: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "megdet_hpc.evaluate", "--follow", str(output), *SOON]
    quiet = {"cwd": ROOT, "env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
    try:
        wait_until(lambda: owner.current(output / "deferred") is not None)
        second = here(evaluate.main, ["--follow", str(output)])
        assert second.returncode == 2 and "is held by" in second.stderr
        alone = here(train.main, training(shapes, output, *EVERY))
        assert alone.returncode == 2 and "evaluation.mode inside: " in alone.stderr
        assert here(train.main, training(shapes, output, *DEFERRED)).returncode == 0
        wait_until(lambda: score_rows(output))
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    followed = here(evaluate.main, ["--follow", str(output), *SOON])
    assert followed.returncode == 0, followed.stderr
    assert validations(output) == validations(inside)


def wait_until(holds: object) -> None:
    end = time.monotonic() + 120
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_that_goes_on_repeats_its_steps_and_loses_nothing(here: Here, shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    bound = ["--evaluation.max_waiting", "1"]
    first = here(train.main, training(shapes, output, *DEFERRED, *bound))
    assert first.returncode == 0, first.stderr
    assert "step 3 stays without scores: more than evaluation.max_waiting wait" in first.stdout
    assert [step_of(file) for file in checkpoint_files(output / "checkpoints")] == [9, 12]
    (output / "checkpoints" / "step_00000012.pt").write_bytes(b"cut by a disk")  # resumed from step 9
    (output / "deferred" / "due.json").write_text(
        json.dumps([vars(due) for due in read_due(output) if due.step != 9])  # died before it was noted
    )
    again = here(train.main, training(shapes, output, *DEFERRED, "--resume", "auto"))
    assert again.returncode == 0, again.stderr
    assert [due.step for due in read_due(output)] == [3, 6, 9, 12]
    followed = here(evaluate.main, ["--follow", str(output), *SOON])
    assert followed.returncode == 0, followed.stderr
    assert "step 3: cannot be scored: checkpoints/step_00000003.pt: the file is gone" in followed.stdout
    assert list(validations(output)) == [9, 12] and read_best(output).step in (9, 12)


def test_what_cannot_be_followed_is_refused(here: Here, inside: Path, tmp_path: Path) -> None:
    for options, said in (
        (["--follow", str(inside)], "scores its checkpoints itself (evaluation.mode inside)"),
        (["--follow", str(inside), "--checkpoint", "a.pt"], "--checkpoint a.pt does not go with --follow"),
        (["--follow", str(inside), "--patience", "0"], "--patience 0; accepted: more than 0 minutes"),
        (["--follow", str(inside / "config.yaml")], "is no folder; accepted: the folder of a run"),
    ):
        done = here(evaluate.main, options)
        assert (done.returncode, done.stderr.count("error: ")) == (2, 1) and said in done.stderr, done.stderr
    late = here(evaluate.main, ["--follow", str(tmp_path / "never"), *SOON, "--patience", "0.005"])
    assert late.returncode == 75 and "no sign of the run" in late.stdout
    assert not (tmp_path / "never").exists()


def test_scores_belong_to_the_content_of_a_checkpoint(tmp_path: Path) -> None:
    first, other = Due(3, 0.5, "a.pt", "k1"), Due(6, 1.0, "b.pt", "k2")
    for due in (other, first):
        leave(tmp_path, due)
    assert waiting(tmp_path) == [first, other]
    settle(tmp_path, first, {"val/AP": 0.5, "val/APs": float("nan")})
    assert waiting(tmp_path) == [other]
    rows = [{"step": 3, "epoch": 0.5, "val/AP": 0.5, "val/APs": None}]
    assert score_rows(tmp_path) == rows == read_metrics(tmp_path / "metrics.jsonl")
    # the training repeats the step with another result
    repeat_after(tmp_path, 2)
    assert read_due(tmp_path) == [] and score_rows(tmp_path) == []
    leave(tmp_path, Due(3, 0.5, "a.pt", "k3"))
    assert len(waiting(tmp_path)) == 1 and score_rows(tmp_path) == []
    # the same again
    leave(tmp_path, first)
    assert score_rows(tmp_path) == rows
    with pytest.raises(FileNotFoundError):
        content_key(tmp_path / "a.pt")


def test_scores_that_cannot_be_read_are_no_reason_to_write_the_list_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server calls a file stale that another host has just replaced; the earlier scores would be lost."""
    first, second = (Due(step, 0.5, f"checkpoints/step_{step:08d}.pt", "aa") for step in (3, 6))
    for due in (first, second):
        leave(tmp_path, due)
    settle(tmp_path, first, {"val/AP": 0.25})
    read, faults = Path.read_bytes, [errno.ESTALE] * 9

    def failing(path: Path) -> bytes:
        if faults and path.parent.name == "deferred":
            raise OSError(faults.pop(), "Stale file handle")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    monkeypatch.setattr("megdet_hpc.log.deferred._STALE_SECONDS", 0.0)
    with pytest.raises(MachineError, match=r"scores\.json: cannot be read \(Stale file handle\)"):
        settle(tmp_path, second, {"val/AP": 0.5})
    faults[:] = [errno.EIO]
    with pytest.raises(MachineError, match=r"due\.json: cannot be read"):
        leave(tmp_path, second)
    faults[:] = [errno.ESTALE]  # once only, as after a rename
    settle(tmp_path, second, {"val/AP": 0.5})
    assert not faults and [row["val/AP"] for row in score_rows(tmp_path)] == [0.25, 0.5]
    (tmp_path / "deferred" / "due.json").write_text("[")
    with pytest.raises(UserError, match=r"due\.json: is damaged"):
        leave(tmp_path, second)


def test_a_checkpoint_is_not_given_up_where_the_file_system_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("megdet_hpc.log.deferred.zipfile.ZipFile", failing)
    due = Due(3, 0.5, "checkpoints/step_00000003.pt", "aa")
    leave(tmp_path, due)
    watch = follower._Watch(tmp_path, 60, lambda state: pytest.fail("read"), lambda: None)
    with pytest.raises(MachineError, match=r"step_00000003\.pt: cannot be read \(Stale file handle\)"):
        watch.next()
    assert waiting(tmp_path) == [due]


WITHOUT_PICTURES = """
import sys
sys.modules["matplotlib"] = None
from megdet_hpc import evaluate, train
train.main(sys.argv[2:])
evaluate.main(["--follow", sys.argv[1], "--interval", "0.1"])
evaluate.main(["--checkpoint", sys.argv[1], "--device", "cpu"])
train.main([*sys.argv[2:], "--output", sys.argv[1] + "-inside", "--evaluation.mode", "inside"])
"""


def test_without_matplotlib_a_run_and_its_scores_come_to_their_end(shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = training(shapes, output, *DEFERRED, "--max_steps", "3", "--evaluation.every_epochs", "1")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PICTURES, str(output), *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("warning: no pictures: matplotlib is not installed\n") == 1
    assert len(score_rows(output)) == 1 and list(validations(tmp_path / "run-inside")) == [3]
    assert not list(tmp_path.rglob("*.png"))
