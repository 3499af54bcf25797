"""Scoring and saving, however long, are no hang; a rank that stops meanwhile is one. Real ranks over real MPI."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Launch

pytestmark = pytest.mark.parallel


def test_work_longer_than_the_limit_is_no_hang(launch: Launch, tmp_path: Path) -> None:
    done = launch(2, "-m", "tests.parallel.working_alone", str(tmp_path / "watchdog"), "long")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank}: scored, 2 ranks went on" for rank in (0, 1)]
    assert "watchdog" not in done.stderr


def test_a_rank_that_stops_while_it_works_alone_ends_the_job(launch: Launch, tmp_path: Path) -> None:
    done = launch(2, "-m", "tests.parallel.working_alone", str(tmp_path / "watchdog"), "frozen")
    assert done.returncode != 0
    assert "rank(s) 1 wait after step 4, in broadcast_object 'metrics' over mpi" in done.stderr
    assert "does not answer: stopped, or its host or shared folder is gone" in done.stderr


def test_a_hang_after_the_work_is_seen(launch: Launch, tmp_path: Path) -> None:
    done = launch(2, "-m", "tests.parallel.working_alone", str(tmp_path / "watchdog"), "lost")
    assert done.returncode != 0
    assert "did not enter allreduce_sum_ 'layer3.bn' over mpi" in done.stderr
