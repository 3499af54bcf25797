from __future__ import annotations

from pathlib import Path

import pytest

from megdet_hpc.doctor.__main__ import _gradients, parser


def carrier(*words: str) -> str:
    return _gradients(parser().parse_args(["--", *words]))


def test_the_carrier_is_that_of_the_training_wherever_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The preflight of a job without a working Horovod must not start it."""
    (tmp_path / "mine.yaml").write_text("solver: {gradients: torch}\n")
    assert carrier("--config", str(tmp_path / "mine.yaml")) == "torch"
    assert carrier("--config", str(tmp_path / "mine.yaml"), "--solver.gradients", "mpi") == "mpi"
    assert carrier("--solver.gradients=mpi") == "mpi"
    assert carrier("--seed", "1") == "auto" == carrier()
    assert _gradients(parser().parse_args(["--gradients", "mpi", "--", "--solver.gradients=torch"])) == "mpi"
    assert carrier("--no.such.key", "1") == "auto" and capsys.readouterr() == ("", "")
