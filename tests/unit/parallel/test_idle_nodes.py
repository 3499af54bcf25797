"""Whether ranks are on all nodes of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from megdet_hpc.parallel.launch import idle_nodes
from megdet_hpc.parallel.start import started
from tests.unit.parallel.test_runtime import LAUNCHER_VARIABLES


def test_a_node_without_ranks_is_told(tmp_path: Path) -> None:
    nodefile = tmp_path / "nodefile"
    nodefile.write_text("a\na\nb\nb\n", encoding="utf-8")
    for environ in ({"PBS_NODEFILE": str(nodefile)}, {"SLURM_JOB_NUM_NODES": "2"}):
        assert idle_nodes(1, environ) == "2 nodes in the job, ranks on 1 of them"
        assert idle_nodes(2, environ) == ""
    for environ in ({}, {"PBS_NODEFILE": str(tmp_path / "gone")}, {"SLURM_JOB_NUM_NODES": "some"}):
        assert idle_nodes(1, environ) == ""


def test_the_first_rank_says_so_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for variable in LAUNCHER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    with started():
        pass
    assert "warning: 2 nodes in the job, ranks on 1 of them; horovodrun" in capfd.readouterr().err
