"""The table: what is merged, what is not, and in which order."""

from __future__ import annotations

import pytest

from megdet_hpc.doctor.findings import ALL, Finding, Place, merge, summary, table
from megdet_hpc.doctor.software import find_differences
from megdet_hpc.parallel.groups import rank_ranges

PLACES = [Place(f"node{rank // 2:02d}", rank) for rank in range(8)]
FINE = Finding("fine", "data", "/data: 40 images")
BROKEN = Finding("wrong", "data", "/data: no such folder", "mount it")
SLOW = Finding("slow", "write", "3 MB/s", "110 s a checkpoint")


@pytest.mark.parametrize(("ranks", "text"), [([3], "3"), ([5, 0, 1, 2], "0-2,5"), ([0, 2, 4], "0,2,4"), ([1, 1], "1")])
def test_ranges_of_ranks(ranks: list[int], text: str) -> None:
    assert rank_ranges(ranks) == text


def test_every_failing_host_has_its_line_and_the_worst_is_last() -> None:
    found = {2: BROKEN, 3: BROKEN, 5: BROKEN, 6: SLOW}
    lines = merge([(place, [found.get(place.rank, FINE)]) for place in PLACES])
    assert [(line.finding, line.where) for line in lines] == [
        (FINE, "3 hosts, ranks 0-1,4,7"),
        (SLOW, "node03 rank 6"),
        (BROKEN, "node01 ranks 2-3"),
        (BROKEN, "node02 rank 5"),
    ]
    assert summary(lines) == "1 fine, 1 slow, 2 wrong"


def test_what_all_ranks_found_is_one_line_only_where_it_is_fine() -> None:
    assert [line.where for line in merge([(place, [FINE]) for place in PLACES])] == [ALL]
    hosts = [line.where for line in merge([(place, [BROKEN]) for place in PLACES])]
    assert hosts == [f"node{host:02d} ranks {2 * host}-{2 * host + 1}" for host in range(4)]


def test_one_rank_per_host_is_every_host() -> None:
    assert merge([(place, [FINE] if place.rank % 2 == 0 else []) for place in PLACES])[0].where == "every host"


def test_the_table_is_aligned_and_says_what_to_do() -> None:
    text = table(merge([(place, [FINE, SLOW, BROKEN]) for place in PLACES[:1]]))
    assert text.splitlines() == [
        "fine   node00 rank 0  data   /data: 40 images",
        "slow   node00 rank 0  write  3 MB/s",
        "                             costs: 110 s a checkpoint",
        "wrong  node00 rank 0  data   /data: no such folder",
        "                             do: mount it",
    ]


def test_a_host_that_differs_is_named_with_both_values() -> None:
    found = find_differences(
        [(p, {"torch": "2.4" if p.host == "node02" else "2.5", "MPI": "4.1"}) for p in PLACES], "reinstall"
    )
    assert found[0] == Finding("fine", "same everywhere", "MPI 4.1", about=ALL)
    assert found[1:] == [
        Finding("wrong", "differs", "torch is 2.4, most ranks have 2.5", "reinstall", about="node02 ranks 4-5")
    ]


def test_what_some_ranks_lack_differs_whichever_rank_it_is() -> None:
    """Rank 0 or another: the names of all ranks count."""
    for lacking in (0, 3):
        everyone = [(p, {"torch": "2.5"} if p.rank == lacking else {"torch": "2.5", "mpi4py": "4.1"}) for p in PLACES]
        place = f"node{lacking // 2:02d} rank {lacking}"
        assert find_differences(everyone, "reinstall") == [
            Finding("fine", "same everywhere", "torch 2.5", about=ALL),
            Finding("wrong", "differs", "mpi4py is not installed, most ranks have 4.1", "reinstall", about=place),
        ]


def test_a_finding_that_is_not_fine_needs_advice() -> None:
    with pytest.raises(AssertionError, match="data: wrong without advice"):
        Finding("wrong", "data", "gone")
