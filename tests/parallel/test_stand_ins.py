"""Launchers that cannot run here: 2 ranks trained under the words of the job scripts, by stand-ins."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megdet_hpc import train
from megdet_hpc.config import DETECTORS
from megdet_hpc.models.factory import BUILDERS
from tests import toy
from tests.cases.test_torchrun import alone_with_torch, by
from tests.conftest import ROOT, environment
from tests.parallel.test_toy import IMAGES, arguments, weights

pytestmark = pytest.mark.parallel

__all__ = ["alone_with_torch"]

PROGRAMS = {"pals": "mpiexec", "flux": "flux", "jsrun": "jsrun"}
NAMES = {"pals": "mpiexec (PALS)", "flux": "flux run", "jsrun": "jsrun"}
# jobs/launchers.sh with what jobs/common.sh sets before it
WORDS = """jobs_folder=$1 scheduler=none MEGDET_LAUNCHER=$2 MEGDET_CORES_PER_RANK=0 python=()
fail() { echo "$*" >&2; exit 2; }
source "$1/launchers.sh"
set_launch 2 2
printf '%s\\n' "${launch[@]}"
"""


@pytest.fixture(scope="module")
def by_one_process(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Tensor]]:
    """The weights of one process with all images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DETECTORS, "toy", toy.ToyConfig)
        patch.setitem(BUILDERS, "toy", toy.build)
        output = tmp_path_factory.mktemp("one") / "run"
        train.main(arguments(shapes, output, IMAGES, "--data.val", "null"))
        yield weights(output)


@pytest.mark.parametrize("launcher", PROGRAMS)
def test_its_ranks_train_like_one_process(
    alone_with_torch: dict[str, str],
    by_one_process: dict[str, Tensor],
    shapes: Path,
    tmp_path: Path,
    launcher: str,
) -> None:
    command = ["bash", "-c", WORDS, "words", str(ROOT / "jobs"), launcher]
    shown = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    words = shown.stdout.splitlines()
    assert words[0] == PROGRAMS[launcher]
    program = tmp_path / "bin" / words[0]
    program.parent.mkdir()
    python = shlex.quote(sys.executable)
    program.write_text(f'#!/bin/sh\nexec {python} {ROOT}/tests/parallel/stand_in.py {words[0]} "$@"\n')
    program.chmod(0o755)
    environ = {**alone_with_torch, "PATH": os.pathsep.join([str(program.parent), alone_with_torch["PATH"]])}
    training = ["-m", "tests.toy", *arguments(shapes, tmp_path / "run", IMAGES // 2, "--data.val", "null")]
    done = by(environ, [str(program), *words[1:], sys.executable, *training])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch.distributed without MPI, started by {NAMES[launcher]}; rank 0 of 2, local rank 0" in done.stdout
    # float32 sums over the images in another order; one update alone moves weights by more than 1e-3
    torch.testing.assert_close(weights(tmp_path / "run"), by_one_process, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("launcher", PROGRAMS)
def test_a_rank_that_fails_ends_the_others(alone_with_torch: dict[str, str], launcher: str) -> None:
    """As the real launchers do; without it the stand-ins would hide a hang."""
    number = {"mpiexec": "-n", "flux": "--ntasks", "jsrun": "--tasks_per_rs"}[PROGRAMS[launcher]]
    verb = ["run"] if launcher == "flux" else []
    words = [sys.executable, "tests/parallel/stand_in.py", PROGRAMS[launcher], *verb, number, "2"]
    done = by(alone_with_torch, [*words, sys.executable, "-m", "tests.parallel.failing", "user"])
    # on a busy host the other rank, which loses its peer, may end as soon
    assert done.returncode in (1, 2) and "error: this value is wrong" in done.stderr, done.stderr
