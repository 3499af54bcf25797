"""The rank that all wait for is named, though all ranks end their steps together. Real ranks over real MPI."""

from __future__ import annotations

import pytest

from tests.conftest import Launch

pytestmark = pytest.mark.parallel


def test_the_slowest_rank_is_the_one_with_most_work_of_its_own(launch: Launch) -> None:
    done = launch(3, "-m", "tests.parallel.slow_rank")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1
    rank, most, mean, step = map(float, lines[0].split())
    assert rank == 1
    assert 0.3 <= most <= step and mean < 0.8 * most
