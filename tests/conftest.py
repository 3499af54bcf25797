"""Fixtures: generated data packed once per session, and the way ranks are started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"

Launch = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """One thread per rank, this interpreter's tools first, and ranks that yield the core while they wait."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }


def run(command: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository root with its output captured."""
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def launch() -> Launch:
    """launch(ranks, "-m", "module", ...) runs Python under mpirun; 0 ranks run it plainly."""
    if not shutil.which("mpirun", path=environment()["PATH"]):
        pytest.skip("no mpirun; tools/setup_env.sh installs one")

    def start(ranks: int, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        launcher = ["mpirun", "--oversubscribe", "-np", str(ranks)] if ranks else []
        return run([*launcher, sys.executable, *arguments], timeout)

    return start


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small generated set: COCO files in `coco/`, packs in `train/` and `val/`."""
    folder = tmp_path_factory.mktemp("shapes")
    make = [sys.executable, "data_prep/make_shapes.py", "--output", str(folder / "coco")]
    made = run([*make, "--train", "24", "--val", "10"])
    assert made.returncode == 0, made.stderr
    for split in ("train", "val"):
        annotations = folder / "coco" / "annotations" / f"instances_{split}.json"
        images = folder / "coco" / split
        pack = [sys.executable, "data_prep/pack_coco.py", "--annotations", str(annotations)]
        packed = run([*pack, "--images", str(images), "--output", str(folder / split)])
        assert packed.returncode == 0, packed.stderr
    return folder
