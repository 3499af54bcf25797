"""The short jobs with the real programs on a real SLURM: pack and verify, doctor, bench_scaling, evaluate."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megdet_hpc.engine.checkpoint import checkpoint_files
from megdet_hpc.log import read_metrics
from tests.conftest import ROOT, environment, has_open_mpi, run
from tests.jobs.conftest import log_of
from tests.jobs.slurm import Slurm
from tests.parallel.test_training import SMALL, arguments

pytestmark = pytest.mark.parallel


def submit(cluster: Slurm, folder: Path, script: str, *arguments: str, nodes: int, **settings: str) -> str:
    """Run a job script on nodes x 1 rank to its end; its log."""
    return ended(cluster, begin(cluster, folder, script, *arguments, nodes=nodes, **settings))


def begin(cluster: Slurm, folder: Path, script: str, *arguments: str, nodes: int, **settings: str) -> str:
    """Submit a job script for nodes x 1 rank; the job's id."""
    variables = {key: value for key, value in environment().items() if key.startswith("OMPI_")}
    variables |= {"VENV": str(Path(sys.executable).parent.parent), "MEGDET_ROOT": str(ROOT), "MEGDET_SCRATCH": "/tmp"}
    variables |= {"MEGDET_DATA": str(folder / "packed"), "MEGDET_RUNS": str(folder / "runs"), **settings}
    shape = [f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    return cluster.submit(*shape, f"--output={folder}/log-%j", str(ROOT / "jobs" / script), *arguments, **variables)


def ended(cluster: Slurm, job_id: str, timeout: float = 250) -> str:
    """The log of a job that is waited for."""
    job = cluster.wait(job_id, "COMPLETED", "FAILED", "CANCELLED", timeout=timeout)
    assert job["JobState"] == "COMPLETED", log_of(job)
    return log_of(job)


@pytest.mark.timeout(600)
def test_from_packing_to_the_score(cluster: Slurm, shapes: Path, tmp_path: Path) -> None:
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        source = shapes / "coco" / "annotations" / f"instances_{split}.json"
        (coco / "annotations" / f"instances_{split}2017.json").symlink_to(source)
        (coco / f"{split}2017").symlink_to(shapes / "coco" / split)
    packed = submit(cluster, tmp_path, "pack_coco.sh", "--shard-mib", "0.02", nodes=2, MEGDET_COCO=str(coco))
    assert re.findall(r"verified: (\d+) images", packed) == ["24", "10"], packed

    looked = submit(cluster, tmp_path, "doctor.sh", "--preflight", "--device", "cpu", nodes=2)
    assert "preflight of 2 rank(s)" in looked and len(list(tmp_path.glob("runs/doctor-*/findings.json"))) == 1, looked

    output = tmp_path / "runs" / "scaling"
    short = [*SMALL, "--log_every", "1"]
    benched = submit(
        cluster,
        tmp_path,
        "bench_scaling.sh",
        *short,
        nodes=2,
        MEGDET_OUTPUT=str(output),
        MEGDET_BENCH_STEPS="4",
        MEGDET_BENCH_STRONG_STEPS="4",
        MEGDET_BENCH_NODES="1 2",
    )
    assert checkpoint_files(output / "nodes_1" / "checkpoints") and "efficiency" in benched, benched
    assert "strong scaling:" in benched and (output / "strong_1" / "metrics.jsonl").is_file(), benched

    scored = submit(cluster, tmp_path, "evaluate.sh", nodes=1, MEGDET_OUTPUT=str(output / "nodes_2"))
    assert re.search(r"result: AP=\d\.\d+ AP50=\d\.\d+ images=10", scored), scored


@pytest.mark.timeout(600)
def test_a_follower_submitted_before_the_run_and_requeued(cluster: Slurm, shapes: Path, tmp_path: Path) -> None:
    """It waits on 2 nodes for a run that has not begun, is signalled and requeued, scores the run, and ends with it."""
    output = tmp_path / "run"
    follow = ["follow.sh", "--interval", "0.2"]
    job_id = begin(cluster, tmp_path, *follow, nodes=2, MEGDET_OUTPUT=str(output))
    log = tmp_path / f"log-{job_id}"
    wait_for(lambda: "waits for the run to begin" in log.read_text(), log)
    assert cluster.run("scancel", "--batch", "--signal=USR1", job_id).returncode == 0
    wait_for(lambda: log.read_text().count("waits for the run to begin") == 2, log)
    options = ["--evaluation.mode", "deferred", "--evaluation.every_epochs", "0.5", "--max_steps", "12"]
    trained = run([sys.executable, *arguments(shapes, output, *options)])
    assert trained.returncode == 0, trained.stderr
    said = ended(cluster, job_id)
    assert "the follower, which has all on disk, is not waited for" in said and "requeuing" in said
    assert re.findall(r"step (\d+): validation AP=", said) == ["6", "12"]
    assert re.search(r"result: AP=\d\.\d+ AP50=\d\.\d+ output=", said) and cluster.job(job_id)["Restarts"] == "1"
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl") if "val/AP" in row] == [6, 12]


def wait_for(holds: Callable[[], bool], log: Path) -> None:
    until = time.monotonic() + 150
    while not (log.is_file() and holds()):
        assert time.monotonic() < until, log.read_text() if log.is_file() else "no log"
        time.sleep(0.2)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["srun"])
def test_the_sites_self_test_on_two_nodes(cluster: Slurm, tmp_path: Path, launcher: str) -> None:
    pmi = "pmix" if has_open_mpi() else "pmi2"
    words = f"{ROOT}/tests/site/site_check.sh {tmp_path}/check {launcher} --mpi={pmi} --nodes=2 --ntasks-per-node=1"
    variables = {key: value for key, value in environment().items() if key.startswith(("OMPI_", "OMP_"))}
    variables |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MEGDET_SITE_DEVICE": "cpu"}
    variables |= {"MEGDET_SITE_SECONDS": "240"}
    shape = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    job_id = cluster.submit(*shape, f"--output={tmp_path}/log-%j", "--wrap", words, **variables)
    log = ended(cluster, job_id, timeout=500)
    for part in ("draw", "pack", "preflight", "bn_check", "training"):
        assert f"site check: {part} took" in log, log
    assert "preflight of 2 rank(s)" in log
    assert log.splitlines()[-1].startswith("site check: passed in"), log
