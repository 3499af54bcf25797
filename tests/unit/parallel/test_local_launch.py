"""The words that start ranks here, for each MPI's own launcher and for none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megdet_hpc.parallel.local_launch import error_of_ranks, mpirun_words, passes_usr1, rank_launcher

SAYS = {
    "Open MPI": ("mpirun (Open MPI) 4.1.8", ["mpirun", "--oversubscribe"]),
    "MPICH": ("HYDRA build details:\n    Version: 5.0.2", ["mpiexec.hydra"]),
    "Intel MPI": ("Intel(R) MPI Library for Linux* OS, Version 2021.18", ["mpiexec.hydra"]),
}


def launcher(folder: Path, name: str, says: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("mpi", SAYS)
def test_each_mpi_gets_the_words_that_it_understands(mpi: str, tmp_path: Path) -> None:
    says, (program, *options) = SAYS[mpi]
    path = f"{tmp_path}:/usr/bin:/bin"
    launcher(tmp_path, "mpirun", says)
    if mpi != "Open MPI":
        launcher(tmp_path, "mpiexec.hydra", says)
    assert mpirun_words(path) == [str(tmp_path / program), *options]
    assert rank_launcher(3, path) == [str(tmp_path / program), *options, "-np", "3"]
    assert rank_launcher(0, path) == [] and passes_usr1(rank_launcher(3, path))


def test_torchrun_starts_them_where_there_is_no_mpi(tmp_path: Path) -> None:
    words = rank_launcher(2, str(tmp_path))
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"] and words[-2:] == ["--nproc-per-node", "2"]
    assert "--no-python" in words and not passes_usr1(words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # a notice between lines of dashes begins with the cause
        ("x\n-----\nRun as root.\n\nThat is bad, since it\nharms.\n\nYou can go on by A\nand B.\n-----\n",
         "Run as root. | That is bad, since it | harms."),
        ("-----\nfirst\n-----\n-----\nsecond\n-----\n", "second"),
        ("a\nb\nc\nd\n", "b | c | d"),
        ("ValueError: 3\n-----\nPrimary job terminated\n-----\n", "ValueError: 3"),
        ("", ""),
        ("-----\n", ""),
    ],
)  # fmt: skip
def test_the_error_of_ranks_is_what_says_the_cause(text: str, said: str) -> None:
    assert error_of_ranks(text) == said
