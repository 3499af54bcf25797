"""What a PyTorch user types first: refused in one line, before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import run
from tests.parallel.test_training import arguments

SAID = "error: WORLD_SIZE=2 and RANK=0 are set by torchrun, which does not start MPI; use horovodrun -np 2 or mpirun"


def test_training_by_torchrun_is_refused_and_writes_nothing(shapes: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = run([*launcher, *arguments(shapes, tmp_path / "run")])
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    ours = [line for line in done.stderr.splitlines() if line.startswith("megdet_hpc: ")]
    assert len(ours) == 1 and ours[0].startswith(f"megdet_hpc: {SAID}")
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("tool", ["pack_coco", "verify_pack", "bn_check"])
def test_so_are_the_tools_that_share_work_over_ranks(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, rank: str
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "output"
    coco = ["--annotations", str(shapes / "coco/annotations/instances_val.json"), "--images", str(shapes / "coco/val")]
    command = {
        "pack_coco": ["data_prep/pack_coco.py", *coco, "--output", str(output)],
        "verify_pack": ["data_prep/verify_pack.py", str(shapes / "val")],
        "bn_check": ["-m", "megdet_hpc.bn_check", "--device", "cpu"],
    }[tool]
    done = run([sys.executable, *command])
    assert done.returncode == 2 and not output.exists()
    assert done.stderr.count("\n") == (1 if rank == "0" else 0)
    assert SAID in done.stderr or rank == "1"
