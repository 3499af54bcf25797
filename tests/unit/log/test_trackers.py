"""Trackers: what their own readers find, over two starts of a run, and that one that fails is a warning."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megdet_hpc.files import write_json
from megdet_hpc.log import MetricsLog, read_metrics
from megdet_hpc.log import trackers as module
from megdet_hpc.log.libraries import mlflow_key
from megdet_hpc.log.trackers import Trackers
from tests.conftest import ROOT, Launch, environment
from tests.parallel.test_training import arguments


def wait_for(holds: Any, seconds: float = 60.0) -> Any:
    """What a call returns, once that is true."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)
    return value


def seen(folder: Path, name: str) -> dict[str, int]:
    """The last step of each metric that a follower has handed over."""
    note = folder / "trackers" / f"{name}.json"
    return dict(json.loads(note.read_bytes())["steps"]) if note.is_file() else {}


def two_starts(folder: Path, name: str) -> None:
    """A run that is cut after step 4 behind its checkpoint of step 3, and goes on to step 6."""
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 7\nnorm: {size: 16, kind: cgbn}\n")
    first = MetricsLog(folder, 0, trackers=[name])
    for step in (1, 2, 3, 4):
        first.write(step, {"loss": 1 / step, "val/AP": 0.1 * step, "val/AP/a (b)": float("nan")})
    first.close("stopped")
    again = MetricsLog(folder, 3, trackers=[name])
    for step in (4, 5, 6):
        again.write(step, {"loss": 2.0, "val/AP/a (b)": 0.5})
    again.close()


def test_mlflow_reads_one_run_of_two_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking = pytest.importorskip("mlflow.tracking")
    two_starts(tmp_path / "run", "mlflow")
    client = tracking.MlflowClient((tmp_path / "run" / "mlflow").as_uri())
    assert capfd.readouterr().err == ""
    experiment = client.get_experiment_by_name("megdet_hpc")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {"seed": "7", "norm.size": "16", "norm.kind": "cgbn"}

    def history(key: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]

    # step 4 was made twice; the tracker has its first numbers, and has them once
    assert history("loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (5, 2.0), (6, 2.0)]
    assert history("val/AP") == [(step, pytest.approx(0.1 * step)) for step in (1, 2, 3, 4)]
    assert history(mlflow_key("val/AP/a (b)")) == [(4, 0.5), (5, 0.5), (6, 0.5)]


def test_wandb_writes_offline_and_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    two_starts(tmp_path / "run", "wandb")
    assert capfd.readouterr().err == ""
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    names = [re.fullmatch(r"offline-run-\d+_\d+-(\w+)", folder.name) for folder in folders]
    assert len(names) == 2 and names[0] and names[1] and names[0][1] == names[1][1]
    for folder in folders:
        assert (folder / f"run-{names[0][1]}.wandb").stat().st_size > 500
    assert seen(tmp_path / "run", "wandb") == {"loss": 6, "val/AP": 4, "val/AP/a (b)": 6}


def test_a_library_that_is_missing_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trackers = Trackers(["no_such_library", "tensorboard"], tmp_path, 0)
    trackers.write(1, {"loss": 1.0})
    trackers.close("finished")
    said = capfd.readouterr().err
    assert (
        "warning: tracker no_such_library: no_such_library is not installed; pip install '.[no_such_library]'" in said
    )
    assert said.count("\n") == 1
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_tensorboard_that_cannot_write_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 1.0})
    log.close()
    assert capfd.readouterr().err.startswith("warning: tracker tensorboard: ")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_a_tracker_that_fails_in_the_middle_leaves_the_training_alone(
    launch: Launch, shapes: Path, tmp_path: Path
) -> None:
    """The store becomes a file while the run writes."""
    pytest.importorskip("mlflow")
    output, log = tmp_path / "run", tmp_path / "log"
    command = arguments(shapes, output, "--log.trackers", "[mlflow]", "--data.val", "null", "--solver.epochs", "400")
    with open(log, "wb") as said:
        run = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(), stdout=said, stderr=said)
    try:
        wait_for(lambda: seen(output, "mlflow").get("loss", 0))
        for part in (output / "mlflow").iterdir():
            part.rename(tmp_path / part.name)
        wait_for(lambda: "warning: tracker mlflow: " in log.read_text())
        before = read_metrics(output / "metrics.jsonl")[-1]["step"]
        wait_for(lambda: read_metrics(output / "metrics.jsonl")[-1]["step"] > before)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 75
    finally:
        run.kill()
    text = log.read_text()
    assert re.search(
        r"warning: tracker mlflow: \w+: .*the run goes on without it, and metrics\.jsonl has every row", text
    )
    assert text.count("warning: tracker") == 1 and "Traceback" not in text
    assert not (output / "tensorboard").exists()
    steps = [row["step"] for row in read_metrics(output / "metrics.jsonl")]
    assert steps[:-1] == list(range(2, 2 * len(steps), 2)) and steps[-1] > steps[-2]


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_network_that_does_not_answer_delays_only_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr(module, "_LEAVE_SECONDS", 2.0)
    with silent_server() as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        log = MetricsLog(tmp_path, 0, trackers=["mlflow"])
        begin = time.monotonic()
        for step in range(1, 100):
            log.write(step, {"loss": 1.0})
        assert time.monotonic() - begin < 1
        log.close()
        assert time.monotonic() - begin < 4
    assert "warning: tracker mlflow: it had not ended 2 s after the run, and was stopped" in capfd.readouterr().err


def test_a_follower_ends_with_a_training_that_is_killed(tmp_path: Path) -> None:
    """Nothing says how the run ended; the rows until then are brought out."""
    pytest.importorskip("mlflow")
    write_json(tmp_path / "trackers" / "mlflow.json", {"run": None, "steps": {"loss": 1}})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n{"step": 2, "loss": 8}\n{"step": 3, "lo')
    command = [sys.executable, "-m", "megdet_hpc.log.follow", "mlflow", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0
    assert seen(tmp_path, "mlflow") == {"loss": 2}
    (meta,) = (tmp_path / "mlflow").glob("*/*/meta.yaml")
    assert "status: 4\n" in meta.read_text()  # FAILED
