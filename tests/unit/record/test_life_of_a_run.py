"""A real run as its files show it: before its first row, while it writes, killed, resumed, finished."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megdet_hpc import owner
from megdet_hpc.record.run_record import RunRecord, read_run
from megdet_hpc.watch.facts import remaining
from tests.conftest import ROOT, environment, run
from tests.parallel.test_training import arguments


def wait_for(holds: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    """What a call returns, once that is true. The process must not end before."""
    end = time.monotonic() + 90
    while not (value := holds()):
        assert process.poll() is None and time.monotonic() < end, "it did not come so far"
        time.sleep(0.05)
    return value


def watched(output: Path) -> str:
    done = run([sys.executable, "-m", "megdet_hpc", "watch", str(output), "--once"])
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith("╭─ ")
    return " ".join(done.stdout.replace("│", " ").split())


def test_a_run_from_its_beginning_to_its_end(shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, *arguments(shapes, output, "--evaluation.every_epochs", "0.5", "--resume", "auto")]

    # before its first row
    held = owner.take(output)
    page = watched(output)
    assert f"starting on {held.mark.host}" in page and "no row yet" in page and "nothing is known" in page
    held.release()

    first = subprocess.Popen(
        [*command, "--checkpoints.every_epochs", "0.25", "--solver.epochs", "40"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:

        def scored() -> RunRecord | None:
            record = read_run(output) if output.is_dir() and (output / "config.yaml").is_file() else None
            return record if record and record.scores else None

        record = wait_for(scored, first)
        assert record.state()[0] in ("training", "evaluating", "saving") and record.alive
        assert record.global_batch == 2 and record.steps_per_epoch == 12 and record.last_step == 480
        left = remaining(record)
        assert left is not None and left.steps > 0 and left.total >= left.steps + left.evaluations
        page = watched(output)
        assert "of 480 (" in page and "left, until" in page and "images an update" in page
        assert "one rank" in page and "a step may take 15 min 00 s" in page
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    record = read_run(output)
    assert record.state()[0] == "died" and record.alive is False
    assert "died: without a last word after step" in watched(output)
    time.sleep(2.1)  # starts and holders are told apart by seconds, and hosts' clocks may differ by one
    held = owner.take(output)
    assert f"starting on {held.mark.host}" in watched(output)
    held.release()

    again = run([*command, "--max_steps", str(record.step + 4)])
    assert again.returncode == 0, again.stderr
    record = read_run(output)
    assert (record.state(), record.step) == (("finished", ""), record.last_step)
    page = watched(output)
    assert "(100 %)" in page and "left" not in page and "nothing: the run has ended" in page
    starts = record.starts
    assert [start.ranks for start in starts] == [1, 1] and starts[1].step > 0
    assert (starts[0].end, starts[1].end, starts[1].end_step) == ("", "finished", record.step)
    assert "died without a last word" in page
    assert record.now is not None and record.now.times["evaluating"] >= 1 and record.now.seconds["training"] > 0


def test_the_files_of_an_older_run(tmp_path: Path) -> None:
    """Version 0.1.0 wrote neither starts.jsonl nor now.json. What its rows tell is known all the same."""
    (tmp_path / "config.yaml").write_text("log_every: 10\nmax_steps: null\nsolver: {epochs: 2.0}\n")
    rows = [{"step": 10, "epoch": 0.5, "loss": 2.0, "images_per_s": 8.0, "step_max_s": 2.0}]
    rows += [{"step": 20, "epoch": 1.0, "loss": 1.5, "images_per_s": 16.0, "step_max_s": 1.0}]
    rows += [{"step": 20, "epoch": 1.0, "val/AP": 0.25, "val/AP50": -1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "lo')
    record = read_run(tmp_path)
    assert (record.global_batch, record.steps_per_epoch, record.last_step, record.step) == (16, 20, 40, 20)
    assert [(at.images, round(3600 * at.hours)) for at in record.positions] == [(160, 20), (320, 30)]
    assert (record.scores[0].AP, record.scores[0].AP50, record.scores[0].images) == (0.25, None, 320)
    assert record.state() == ("ended", "its files do not say how")
    page = watched(tmp_path)
    assert "step 20 of 40 (50 %), epoch 1.00 of 2" in page and "0.250 at step 20" in page


def test_a_run_on_another_host(tmp_path: Path) -> None:
    """Its process cannot be seen, so the time since its last word counts."""
    held = owner.take(tmp_path)
    try:
        mark = tmp_path / "owner" / "holder.json"
        mark.write_text(json.dumps({**json.loads(mark.read_text()), "machine": "another", "host": "node7"}))
        start = {"event": "start", "time": time.time() - 9, "host": "node7", "hosts": ["node7"], "ranks": 1}
        (tmp_path / "starts.jsonl").write_text(json.dumps(start) + "\n")
        for ago, word in ((3, "training"), (600, "silent")):
            now = {"time": time.time() - ago, "phase": "training", "step": 3, "moved": time.time() - ago - 1}
            (tmp_path / "now.json").write_text(json.dumps(now))
            assert read_run(tmp_path).state()[0] == word
        assert "no sign for 10 min" in read_run(tmp_path).state()[1]
    finally:
        held.release()


def test_what_the_watchdog_found(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    start = {"event": "start", "time": time.time() - 60, "host": "node1", "hosts": ["node1", "node2"], "ranks": 2}
    (tmp_path / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (tmp_path / "watchdog").mkdir()
    for rank, collective in ((0, "allreduce_sum_ 'losses' over mpi"), (1, "")):
        report = {"rank": rank, "host": f"node{rank + 1}", "step": 7, "collective": collective, "place": "loader.py:9"}
        (tmp_path / "watchdog" / f"rank_{rank:05d}.json").write_text(json.dumps(report))
    text = watched(tmp_path)
    assert "the watchdog found a hang" in text
    assert "rank 0 on node1, after step 7: waits in allreduce_sum_ 'losses' over mpi" in text
    assert "rank 1 on node2, after step 7: is at loader.py:9" in text


def test_what_is_no_run_or_no_option_is_one_line(shapes: Path, tmp_path: Path) -> None:
    for options, said in (
        ([str(shapes)], "is no run's folder: it has none of config.yaml"),
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([str(shapes), "--interval", "0"], "--interval 0; accepted: 0.2 to 3600 seconds"),
    ):
        done = run([sys.executable, "-m", "megdet_hpc", "watch", *options])
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("megdet watch: error: ") and said in done.stderr
        assert done.stderr.count("\n") == 1
