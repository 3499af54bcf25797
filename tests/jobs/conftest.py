"""Fixtures: a SLURM cluster for the session, and a checkout in a path with a blank."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.jobs import slurm

JOBS = ROOT / "jobs"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    """16 idle nodes; skipped, with the reason, where SLURM cannot run."""
    folder = tmp_path_factory.mktemp("slurm")
    reason = slurm.missing(folder)
    if reason:
        pytest.skip(f"no SLURM here: {reason}")
    with slurm.running(folder) as started:
        yield started


@pytest.fixture(autouse=True)
def pmix(request: pytest.FixtureRequest) -> None:
    """A test with `launcher` srun is skipped, with the reason, where srun cannot start MPI's ranks."""
    if "launcher" in request.fixturenames and request.getfixturevalue("launcher") == "srun" and slurm.no_pmix():
        pytest.skip(slurm.no_pmix())


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The job files in a path with a blank, and an environment whose python does nothing."""
    root = tmp_path / "my checkout"
    (root / "megdet_hpc").mkdir(parents=True)
    (root / "jobs").mkdir()
    (root / "jobs" / "sites").symlink_to(JOBS / "sites")
    for path in JOBS.iterdir():
        if path.is_file():
            copy = root / "jobs" / path.name
            copy.write_bytes(path.read_bytes())
            copy.chmod(path.stat().st_mode)
    for split in ("train", "val"):
        (root / "packed" / split).mkdir(parents=True)
    set_program(root, "exit 0")
    return root


def set_program(checkout: Path, text: str) -> None:
    """Let `python` of the checkout's environment be this shell script; the owner of a run's folder is the real one.

    A program that ends with 0 has met the other ranks and come to its end, as the real ones tell the script.
    """
    program = checkout / ".venv/bin/python"
    program.parent.mkdir(parents=True, exist_ok=True)
    real = f'PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} "$@"'
    owner = f"if [[ ${{2-}} == megdet_hpc.owner ]]; then {real}; fi"
    met = """trap '(($?)) || [[ -z ${MEGDET_LAUNCH_FILE-} ]] || echo finished >"$MEGDET_LAUNCH_FILE"' EXIT"""
    program.write_text(f"#!/bin/bash\n{owner}\n{met}\n{text}\n", encoding="utf-8")
    program.chmod(0o755)


def log_of(job: dict[str, str]) -> str:
    """The output of a SLURM job."""
    return Path(job["StdOut"]).read_text(encoding="utf-8", errors="replace")
