from __future__ import annotations

import time

import pytest

from tests.conftest import Launch

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("body", ["world", "gradients"])
def test_bodies_on_mpi(launch: Launch, body: str, ranks: int) -> None:
    done = launch(ranks, "-m", f"tests.parallel.{body}")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:-1]) == [f"rank {rank} of {ranks} passed" for rank in range(ranks)]


@pytest.mark.parametrize(
    ("how", "text"),
    [("raise", "RuntimeError: this rank breaks"), ("user", "error: this value is wrong"), ("exit", "MPI_ABORT")],
)
def test_a_failing_rank_ends_the_job(launch: Launch, how: str, text: str) -> None:
    begin = time.monotonic()
    done = launch(3, "-m", "tests.parallel.failing", how, timeout=120)
    assert done.returncode != 0
    assert text in done.stderr
    assert ("Traceback" in done.stderr) == (how == "raise")
    if how != "exit":
        assert "rank 2 of 3 on" in done.stderr
    assert time.monotonic() - begin < 120
