"""Parts of the page that no real run shows at will."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megdet_hpc.owner import Mark
from megdet_hpc.record.journal import Now, Start
from megdet_hpc.record.run_record import RunRecord, duration, read_run
from megdet_hpc.watch import facts
from megdet_hpc.watch.page import page
from tests.conftest import ROOT, environment


def test_the_slowest_rank_by_host(tmp_path: Path) -> None:
    start = {"event": "start", "time": 0.0, "hosts": ["n1", "n1", "n2"], "ranks": 3}
    (tmp_path / "starts.jsonl").write_text(json.dumps(start) + "\n")
    own = {"own_mean_s": 0.5, "own_max_s": 1.25}
    rows = [{"step": step, "loss": 1.0, "slowest_rank": step % 3, **own} for step in (1, 2, 4, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = facts.slowest_text(read_run(tmp_path))
    assert text == "rank 2 on n2: 1.2 s of own work a step, 0.50 s on average; the slowest in 2 of the last 4 rows"


def underway(step: int, **config: object) -> RunRecord:
    """A run of 1,600 updates, 100 an epoch, in its third evaluation, which has taken 3 s; each one before took 10 s."""
    start = Start(time=0.0, last_step=1600, steps_per_epoch=100)
    now = Now(103.0, "evaluating", step, 100.0, seconds={"evaluating": 23.0}, times={"evaluating": 3})
    rows = [{"step": step, "loss": 1.0, "epoch": step / 100, "step_max_s": 0.5}]
    every = {"checkpoints.every_epochs": 0, "solver.epochs": 12}
    return RunRecord(Path(), every | config, rows, [], [], [start], now, holder=Mark("", ""), alive=True)


@pytest.mark.parametrize(
    ("keys", "evaluations"),
    [
        ({"evaluation.times": 8, "evaluation.every_epochs": 1.0}, 3),  # after 1,200, 1,400 and 1,600 updates
        ({"evaluation.times": None, "evaluation.every_epochs": 2.0}, 3),
        ({"evaluation.times": None, "evaluation.every_epochs": 0}, 1),
    ],
)
def test_the_time_of_the_evaluations_that_are_left(keys: dict[str, object], evaluations: int) -> None:
    left = facts.remaining(underway(1000, **keys))
    assert left is not None and (left.steps, left.evaluations) == (300.0, 10.0 * evaluations)


def test_the_last_epoch_is_that_of_the_last_update() -> None:
    assert facts.progress_text(underway(1000)).startswith("step 1000 of 1600 (62 %), epoch 10.00 of 16; about ")


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("coco", "0.200 (AP50 0.500) at step 20; best 0.300 at step 10"),
        ("voc12", "0.700 (AP 0.200, AP50 0.500) at step 20"),
        ("voc07", "not measured (AP 0.200, AP50 0.500) at step 20"),
    ],
)
def test_the_score_is_that_of_the_runs_own_metric(tmp_path: Path, metric: str, text: str) -> None:
    (tmp_path / "config.yaml").write_text(f"evaluation: {{metric: {metric}}}\n")
    rows = [
        {"step": 10 * n, "val/AP": ap, "val/AP50": 0.5, "val/AP50_voc12": voc}
        for n, ap, voc in [(1, 0.3, 0.6), (2, 0.2, 0.7)]
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = read_run(tmp_path)
    assert record.score_name == {"coco": "AP", "voc07": "AP50_voc07", "voc12": "AP50_voc12"}[metric]
    assert facts.score_text(record) == text


def test_the_scores_of_averaged_weights_count_where_there_are_any(tmp_path: Path) -> None:
    """They choose the best checkpoint, and when an AP was reached."""
    (tmp_path / "config.yaml").write_text("solver: {ema_decay: 0.9}\n")
    rows = [
        {"step": 10, "val/AP": 0.6, "val/AP50": 0.7, "val/ema_AP": 0.1, "val/ema_AP50": 0.2},
        {"step": 20, "val/AP": 0.5, "val/AP50": 0.6, "val/ema_AP": 0.3, "val/ema_AP50": 0.4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = read_run(tmp_path)
    assert facts.score_text(record) == "0.300 (AP50 0.400) at step 20, averaged weights"
    first = record.first_at(0.3)
    assert first and first.step == 20


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.6, "10 s"), (60, "1 min 00 s"), (3725, "1 h 02 min"), (90061, "1 d 01 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sparks() -> None:
    assert facts.spark([1.0], 8) == ""
    assert facts.spark([0, 1, 2, 7], 8) == "▁▂▃█"
    assert facts.spark([5, 5, 5], 8) == "▁▁▁"
    assert facts.spark(list(range(100)), 4) == "▁▃▅█"


def test_a_name_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "x[" / "y]"
    (run / "job").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\n")
    (run / "job" / "attempts").write_text("10 2 [/red]\n")
    rows = [{"step": 1, "loss": 1.0, "loss_[/b]": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = Console(width=200, file=StringIO())
    console.print(page(read_run(run), unicode=False))
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert "x[/y]" in shown and "attempt 2 from step 10, job [/red]" in shown and "[/b]" in shown


def test_without_rich_it_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    code = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'rich' else find(name, *a); "
        "from megdet_hpc.watch.__main__ import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "pip install '.[watch]'" in done.stderr and done.stderr.count("\n") == 1


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    """A login node answers at once."""
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    code = (
        "import sys; from megdet_hpc.watch.__main__ import main; main([sys.argv[1], '--once']); "
        "print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_run_beyond_its_last_step_has_no_share_above_one() -> None:
    assert facts.progress_text(underway(1700)) == "step 1700, beyond the last one, 1600, epoch 17.00"
