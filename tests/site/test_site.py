"""The self-test of a site, on two ranks of this machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, mpirun

CHECK = ROOT / "tests" / "site" / "site_check.sh"


def run(*words: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(CHECK), *map(str, words)],
        env={**environment(), "MEGDET_SITE_DEVICE": "cpu", "MEGDET_SITE_SECONDS": "200", **variables},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cwd,
    )


@pytest.mark.parallel
def test_two_ranks_pass(tmp_path: Path) -> None:
    done = run(tmp_path, *mpirun(2))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"site check: passed in \d+ s", lines[-1])
    assert re.search(r"preflight of 2 rank\(s\)", done.stdout) and "checks within tolerance" in done.stdout
    assert re.search(r"loss \d+\.\d+ to \d+\.\d+, \d+\.\d images/s", done.stdout)
    assert os.listdir(tmp_path) == []


def test_a_part_that_fails_is_named(tmp_path: Path) -> None:
    done = run("check", "false", cwd=tmp_path)
    assert done.returncode == 1
    assert "site check: preflight failed with status 1" in done.stderr
    assert re.search(rf"; {re.escape(str(tmp_path))}/check/site_check\.\w+/preflight\.log has all of it", done.stderr)
    assert run(tmp_path).returncode == 2
