"""The short jobs with the real programs on a real SLURM: pack and verify, doctor, bench_scaling, evaluate."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megdet_hpc.engine.checkpoint import checkpoint_files
from tests.conftest import ROOT, environment
from tests.jobs.conftest import log_of
from tests.jobs.slurm import Slurm
from tests.parallel.test_training import SMALL

pytestmark = pytest.mark.parallel


def submit(cluster: Slurm, folder: Path, script: str, *arguments: str, nodes: int, **settings: str) -> str:
    """Run a job script on nodes x 1 rank to its end; its log."""
    variables = {key: value for key, value in environment().items() if key.startswith("OMPI_")}
    variables |= {"VENV": str(Path(sys.executable).parent.parent), "MEGDET_ROOT": str(ROOT), "MEGDET_SCRATCH": "/tmp"}
    variables |= {"MEGDET_DATA": str(folder / "packed"), "MEGDET_RUNS": str(folder / "runs"), **settings}
    shape = [f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    job_id = cluster.submit(*shape, f"--output={folder}/log-%j", str(ROOT / "jobs" / script), *arguments, **variables)
    job = cluster.wait(job_id, "COMPLETED", "FAILED", "CANCELLED", timeout=250)
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
        MEGDET_BENCH_NODES="1 2",
    )
    assert checkpoint_files(output / "nodes_1" / "checkpoints") and "efficiency" in benched, benched

    scored = submit(cluster, tmp_path, "evaluate.sh", nodes=1, MEGDET_OUTPUT=str(output / "nodes_2"))
    assert re.search(r"result: AP=\d\.\d+ AP50=\d\.\d+ images=10", scored), scored
