from __future__ import annotations

from pathlib import Path

from megdet_hpc import train
from megdet_hpc.engine.checkpoint import checkpoint_files, read_best
from megdet_hpc.log import read_metrics
from tests.parallel.test_training import arguments


def test_checkpoints_come_by_the_clock_too(shapes: Path, tmp_path: Path) -> None:
    """Every step is later than a microsecond; of three checkpoints the newest two are kept."""
    more = ["--max_steps", "3", "--data.val", "null", "--log_every", "1", "--checkpoints.every_minutes", "1e-8"]
    train.main([*arguments(shapes, tmp_path / "run")[2:], *more])
    assert [file.stem for file in checkpoint_files(tmp_path / "run" / "checkpoints")] == [
        "step_00000002",
        "step_00000003",
    ]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "save_max_s" not in rows[0] and rows[1]["save_max_s"] > 0


def test_a_resumed_run_names_the_best_checkpoint_that_it_finds(shapes: Path, tmp_path: Path) -> None:
    """As after an end between a score and best.json, where checkpoints come by the clock alone."""
    output = tmp_path / "run"
    more = ["--checkpoints.every_minutes", "1e-8", "--checkpoints.every_epochs", "0"]
    more += ["--evaluation.every_epochs", "0.001", "--log_every", "1"]
    train.main([*arguments(shapes, output)[2:], *more, "--max_steps", "1"])
    scored = read_best(output).file
    (output / "best.json").unlink()
    train.main([*arguments(shapes, output)[2:], *more, "--max_steps", "5", "--resume", "auto"])
    rows = {row["step"]: row["val/AP"] for row in read_metrics(output / "metrics.jsonl") if "val/AP" in row}
    assert scored == "checkpoints/step_00000001.pt" and rows[1] == max(rows.values())
    assert read_best(output).file == scored and (output / scored).is_file()
