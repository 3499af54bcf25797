"""The times of Open MPI's collectives, by hand."""

from __future__ import annotations

import pytest

from megdet_hpc.plan.collectives import mpi_allreduce
from megdet_hpc.plan.network import Network

# 1 us and 1 byte/us inside a node, 10 us and 0.1 byte/us between
SLOW = Network("test", 1e-6, 1e6, 10e-6, 1e5)
# latency alone: what is left are the rounds
ROUNDS = Network("test", 1.0, 1e30, 1.0, 1e30)


@pytest.mark.parametrize(
    ("num_bytes", "ranks", "rounds"),
    [
        # measured with links of 5 ms: a round a message, up to sizes that are halved; beyond 64 KiB it asks before
        (8, 2, 1),
        (4095, 2, 1),
        (4096, 2, 2),
        (8191, 2, 2),
        (8192, 2, 1),
        (16384, 2, 2),
        (200_000, 2, 6),
        (2**24, 2, 6),
        (8, 4, 2),
        (8191, 4, 2),
        (8192, 4, 4),
        (2**20, 4, 12),
        (200_000, 4, 2 * (3 + 1)),  # halves of 100 KB ask, quarters of 50 KB do not
        (8, 1, 0),
    ],
)
def test_rounds_between_nodes(num_bytes: int, ranks: int, rounds: int) -> None:
    assert mpi_allreduce(ROUNDS, num_bytes, ranks, ranks) == pytest.approx(rounds)


def test_halves_pass_both_levels() -> None:
    """8 ranks on 2 nodes, 8,192 bytes: halves and quarters inside a node; its four ranks send half a sum between."""
    inside = 2 * (1e-6 + 4096e-6) + 2 * (1e-6 + 2048e-6)
    between = 2 * (10e-6 + 4096 / 1e5)
    assert mpi_allreduce(SLOW, 8192, 8, 2) == pytest.approx(inside + between)


def test_other_numbers_than_powers_of_two() -> None:
    """6 ranks of a node: two give 8,192 bytes away and get them back, four halve them."""
    four = mpi_allreduce(SLOW, 8192, 4, 1)
    assert mpi_allreduce(SLOW, 8192, 6, 1) == pytest.approx(four + 2 * (1e-6 + 8192e-6))


def test_a_rank_of_a_full_node_asks_for_its_part_alone() -> None:
    """8 ranks on 2 nodes, 400 KB: a rank has 100 KB when it meets the other node, and sends 50 KB without asking."""
    only_between = Network("test", 0.0, 1e30, 1.0, 1e30)
    assert mpi_allreduce(only_between, 400_000, 8, 2) == pytest.approx(2)
    assert mpi_allreduce(only_between, 800_000, 8, 2) == pytest.approx(6)
