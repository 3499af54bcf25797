"""What a PyTorch user types first. Training works without MPI; what needs MPI is refused in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep import pack_coco, verify_pack
from megdet_hpc.engine.checkpoint import load_checkpoint
from megdet_hpc.parallel import launch
from tests.conftest import ROOT, environment, mpirun, run
from tests.parallel.test_training import arguments, newest

SAID = "error: torchrun started 2 ranks without MPI, over which {} shares its work out; run one process with --workers"


HIDDEN = """import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("horovod", "mpi4py"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Hidden())
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def alone_with_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which Horovod and mpi4py cannot be imported."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDDEN)
    return {**environment(), "PYTHONPATH": os.pathsep.join([str(tmp_path / "hide"), str(ROOT)])}


def by(environ: dict[str, str], words: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout)


def test_ranks_without_mpi_and_horovod_train_like_one_process(alone_with_torch: dict[str, str], shapes: Path) -> None:
    hidden = by(alone_with_torch, [sys.executable, "-c", "import mpi4py"])
    assert "No module named 'mpi4py'" in hidden.stderr
    done = by(alone_with_torch, [*TORCHRUN, "-m", "tests.parallel.equivalence", str(shapes / "train")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks, 20 steps: losses differ by" in done.stdout


def test_such_a_run_is_resumed_with_the_weights_of_a_whole_one(
    alone_with_torch: dict[str, str], shapes: Path, tmp_path: Path
) -> None:
    states = []
    for parts in ([["--max_steps", "4"]], [["--max_steps", "2"], ["--max_steps", "4", "--resume", "auto"]]):
        output = tmp_path / f"{len(parts)}"
        for further in parts:
            further = ["--data.val", "null", "--solver.agvm", "true", "--norm.size", "2", *further]
            done = by(alone_with_torch, [*TORCHRUN, *arguments(shapes, output, *further)])
            assert done.returncode == 0, done.stderr
            assert "torch.distributed without MPI, started by torchrun" in done.stdout
        states.append(load_checkpoint(newest(output))["model"])
    # a checkpoint holds the mean of the groups' running statistics, with which all groups go on
    weights = {key: value for key, value in states[0].items() if "running" not in key}
    assert len(weights) > 50 and all(torch.equal(value, states[1][key]) for key, value in weights.items())


def test_a_killed_rank_ends_the_job(alone_with_torch: dict[str, str], shapes: Path, tmp_path: Path) -> None:
    further = ["--data.val", "null", "--solver.epochs", "10000", "--watchdog_minutes", "0"]
    words = [*TORCHRUN, *arguments(shapes, tmp_path / "run", *further)]
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen(words, cwd=ROOT, env=alone_with_torch, stdout=said, stderr=said)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        end = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert job.poll() is None and time.monotonic() < end, (tmp_path / "said").read_text()
            time.sleep(0.2)
        ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        assert job.wait(60) != 0
    finally:
        job.terminate()
        job.wait(60)


@pytest.mark.parametrize(("key", "value"), [("solver.gradients", "mpi"), ("norm.transport", "mpi")])
def test_what_needs_mpi_is_refused(shapes: Path, tmp_path: Path, key: str, value: str) -> None:
    done = run([*TORCHRUN, *arguments(shapes, tmp_path / "run", f"--{key}", value)])
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    assert f"error: {key} is 'mpi', " in done.stderr and "accepted here: auto, torch" in done.stderr
    assert "megdet_hpc/train.py" not in done.stderr


@pytest.fixture
def by_torchrun(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, rank: str) -> list[str]:
    """The command of a tool; the environment of this process is that of a rank of torchrun's."""
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    coco = ["--annotations", str(shapes / "coco/annotations/instances_val.json"), "--images", str(shapes / "coco/val")]
    return {
        "pack_coco": ["data_prep/pack_coco.py", *coco, "--output", str(tmp_path / "output")],
        "verify_pack": ["data_prep/verify_pack.py", str(shapes / "val")],
    }[tool]


@pytest.mark.parametrize(("tool", "rank"), [("pack_coco", "0"), ("verify_pack", "0"), ("verify_pack", "1")])
def test_so_are_the_tools_that_share_work_over_mpi(
    by_torchrun: list[str], tmp_path: Path, tool: str, rank: str
) -> None:
    begin = time.monotonic()
    done = run([sys.executable, *by_torchrun])
    assert done.returncode == 2 and not (tmp_path / "output").exists()
    assert done.stderr.count("\n") == (1 if rank == "0" else 0)
    assert SAID.format(tool) in done.stderr or rank == "1"
    # its launcher ends all ranks with the first that leaves, so the others give it the time to speak
    assert rank == "0" or time.monotonic() - begin > launch._OTHERS_WAIT_SECONDS


def test_doctor_and_bench_run_without_mpi_and_horovod(alone_with_torch: dict[str, str]) -> None:
    small = ["--backbone", "resnet18", "--images", "1", "--image-size", "64", "--repeats", "2", "--warmup", "1"]
    words = [*TORCHRUN, "-m", "megdet_hpc.bench", "cgbn", *small, "--device", "cpu"]
    done = by(alone_with_torch, words)
    assert done.returncode == 0 and "CGBN torch two_stage" in done.stdout, done.stdout + done.stderr
    words = [*TORCHRUN, "-m", "megdet_hpc.doctor", "--device", "cpu", "--overlap-rounds", "4"]
    done = by(alone_with_torch, words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started by torchrun; rank 0 of 2, local rank 0 of 2 (RANK=0, WORLD_SIZE=2, LOCAL_RANK=0" in done.stdout
    assert "torch answered on 2 ranks, device cpu" in done.stdout
    assert "4 backward passes with torch.distributed's gradients at once" in done.stdout
    assert "norm.transport mpi and solver.gradients mpi are refused" in " ".join(done.stdout.split())


def test_ranks_of_mpirun_meet_without_mpi4py(alone_with_torch: dict[str, str], tmp_path: Path) -> None:
    """As at a site whose PyTorch has no mpi4py: the launcher's variables tell the ranks their places."""
    words = [*mpirun(2), sys.executable, "-m", "megdet_hpc.bn_check", "--device", "cpu"]
    done = by(alone_with_torch, words)
    assert done.returncode == 0 and "2 ranks, transport torch" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("rank", ["1"])
@pytest.mark.parametrize(("tool", "main"), [("pack_coco", pack_coco.main), ("verify_pack", verify_pack.main)])
def test_the_other_ranks_of_the_packs_tools_say_nothing(
    by_torchrun: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int],
) -> None:
    """They wait as bn_check does, here for a moment."""
    waited: list[float] = []
    monkeypatch.setattr(launch.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(by_torchrun[1:]))
    assert ended.value.code == 2 and not (tmp_path / "output").exists()
    assert capfd.readouterr() == ("", "") and waited == [launch._OTHERS_WAIT_SECONDS]
