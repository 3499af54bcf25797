"""Two starts into one folder: the second is refused while the first lives, and a displaced one writes no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megdet_hpc import owner
from megdet_hpc.engine.checkpoint import checkpoint_files, load_checkpoint
from megdet_hpc.log import read_metrics
from tests.conftest import ROOT, Launch, environment
from tests.parallel.test_endings import LONG, end, start, wait_for_step
from tests.parallel.test_training import arguments

pytestmark = pytest.mark.parallel


def contents(folder: Path) -> dict[str, bytes]:
    """What a run writes, but for the marks of owners."""
    files = [
        file for file in folder.rglob("*") if file.is_file() and file.parent.name != "owner" and file.name[0] != "."
    ]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_of_two_starts_one_is_refused_and_the_other_alone_fills_the_folder(
    shapes: Path, tmp_path: Path, resume: str
) -> None:
    output = tmp_path / "run"
    runs = []
    for seed in ("1", "2"):
        command = arguments(
            shapes, output, "--max_steps", "6", "--data.val", "null", "--resume", resume, "--seed", seed
        )
        with open(tmp_path / seed, "wb") as log:
            started = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(), stdout=log, stderr=log)
        runs.append(started)
    statuses = [run.wait(timeout=180) for run in runs]
    assert sorted(statuses) == [0, 2]
    refused = (tmp_path / str(1 + statuses.index(2))).read_text().splitlines()
    assert len(refused) == 1 and f"error: output {output} is held by process" in refused[0]
    assert f"{runs[statuses.index(0)].pid} on " in refused[0] and "is alive" in refused[0]
    seed = 1 + statuses.index(0)
    assert f"seed: {seed}\n" in (output / "config.yaml").read_text()
    assert load_checkpoint(checkpoint_files(output / "checkpoints")[-1])["config"]["seed"] == seed
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl")] == [2, 4, 6]


def test_a_job_that_was_started_again_displaces_its_ranks_that_still_write(
    launch: Launch, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    monkeypatch.setenv("PBS_JOBID", "12.server")
    monkeypatch.setenv("MEGDET_RUN_COUNT", "1")
    old = start(2, output, log, *arguments(shapes, output, *LONG, "--checkpoints.every_epochs", "0.4"))
    wait_for_step(old, output, 3)
    new = owner.take(output, {"PBS_JOBID": "12.server", "MEGDET_RUN_COUNT": "2"})
    before = contents(output)
    assert end(old) == owner.EXIT_DISPLACED
    said = log.read_text()
    assert f"error: {output} was taken over by PBS job 12.server, process" in said and "Traceback" not in said
    assert contents(output) == before
    # the mark of what was killed is no obstacle, and its half-written files need no hand
    (output / "checkpoints").mkdir(exist_ok=True)  # on a busy host it is displaced before its first one
    (output / "checkpoints" / ".step_00000099.pt.77.tmp").touch()
    new.release()
    done = launch(2, *arguments(shapes, output, "--max_steps", "12", "--resume", "auto", "--data.val", "null"))
    assert done.returncode == 0, done.stderr
    steps = [row["step"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    assert not list((output / "checkpoints").glob(".*"))
    assert (output / "config.yaml").read_text().count("resume: never") == 1
    assert "resume: auto" in next(iter(output.glob("config-*.yaml"))).read_text()
