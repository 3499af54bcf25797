"""Cores, NUMA nodes and GPUs of a host's ranks, from values as Linux gives them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megdet_hpc.doctor import binding, machine
from megdet_hpc.doctor.findings import Place

# Two processors of 8 cores; the second thread of each core has its number plus 16.
NODES = {0: "0-7,16-23", 1: "8-15,24-31"}
HOST = [Place("node00", rank) for rank in range(4)]
GPUS = [1, 1, 0, 0]
GOOD = [(8, 9, 10), (11, 12), (0, 1), (2, 3, 16)]


def found(cores: list[tuple[int, ...]], gpus: list[int | None], nodes: dict[int, str]) -> list[tuple[str, str, str]]:
    places = HOST[: len(cores)]
    return [(f.verdict, f.detail, f.advice) for f in binding.probe_binding(places, cores, gpus, nodes)]


def test_lists_of_cores_in_linux_form() -> None:
    assert binding.parse_cores("0-2,8,10-11\n") == (0, 1, 2, 8, 10, 11)
    assert binding.parse_cores("") == ()


def test_what_sysfs_tells(tmp_path: Path) -> None:
    for node, text in (("node0", "0-7\n"), ("node10", "8-15\n"), ("node2", "\n")):
        (tmp_path / "node" / node).mkdir(parents=True)
        (tmp_path / "node" / node / "cpulist").write_text(text)
    assert binding.numa_nodes(tmp_path / "node") == {0: "0-7", 10: "8-15"}  # node2 has memory alone
    assert binding.numa_nodes(tmp_path / "none") == {}
    for address, node in (("0000:3b:00.0", "1\n"), ("0000:af:00.0", "-1\n")):
        (tmp_path / "pci" / address).mkdir(parents=True)
        (tmp_path / "pci" / address / "numa_node").write_text(node)
    nodes = [binding.gpu_node(name, tmp_path / "pci") for name in ("0000:3B:00.0", "0000:af:00.0", "0000:00:00.0")]
    assert nodes == [1, None, None]


def test_this_host_is_read() -> None:
    """Whatever it is: the cores of its nodes hold those that this process may use."""
    nodes = binding.numa_nodes()
    if not nodes:
        pytest.skip("this Linux tells no NUMA nodes")
    every = {core for text in nodes.values() for core in binding.parse_cores(text)}
    assert os.sched_getaffinity(0) <= every
    place = machine.rank_place(HOST[0], 0, machine.torch.device("cpu"))
    assert place.numa == nodes and place.core_threads == binding.core_threads()


def test_ranks_with_cores_of_their_own_beside_their_gpus_are_fine() -> None:
    assert found(GOOD, list(GPUS), NODES) == [
        ("fine", "4 rank(s) have cores of their own, on the NUMA nodes of their GPUs; 2 NUMA node(s)", "")
    ]


def test_a_rank_on_another_processor_than_its_gpu_gets_the_list_that_binds_it() -> None:
    ((verdict, text, advice),) = found([(0, 1), *GOOD[1:2], (2, 3), (4,)], list(GPUS), NODES)
    assert verdict == "slow"
    assert (
        "node00 rank 0: on another NUMA node than the GPU; the first on cores 0-1 of node 0, its GPU on node 1" in text
    )
    # cores 11 and 12 are all of node 1 that the job has, for its two ranks
    assert "MEGDET_SRUN_OPTIONS=--cpu-bind=mask_cpu:0x800,0x1000,0x3,0xc for srun" in advice
    assert 'MEGDET_LAUNCH_OPTIONS="--cpu-bind list:11:12:0-1:2-3" for PALS' in advice


def test_ranks_that_share_cores() -> None:
    ((verdict, text, advice),) = found([(0, 1), (1, 2), (4,)], [None, None, None], NODES)
    assert (verdict, text) == ("slow", "node00 ranks 0-1 are bound and share some of cores 0-2")
    assert "they wait for each other" in advice and "MEGDET_CORES_PER_RANK" in advice
    every = tuple(range(32))
    ((verdict, text, advice),) = found([every, every], [0, 1], NODES)
    assert (verdict, text) == ("slow", "node00 ranks 0-1 are not bound and share cores 0-31")
    assert "move between NUMA nodes" in advice and "mask_cpu:0xff00ff,0xff00ff00" in advice
    # with one node there is nothing to win by binding
    assert found([(0, 1), (0, 1)], [None, None], {0: "0-1"})[0][0] == "fine"
    assert found([(0, 1)], [None], NODES)[0] == ("fine", "1 rank(s) alone; 2 NUMA node(s)", "")


SIBLINGS = tuple((core, core + 16) for core in range(16))


def test_hardware_threads_of_one_core_stay_together(tmp_path: Path) -> None:
    for core in range(4):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 2},{core % 2 + 2}\n")
    (tmp_path / "cpufreq").mkdir()
    assert binding.core_threads(tmp_path) == ((0, 2), (1, 3))
    assert binding.core_threads(tmp_path / "none") == ()
    one = {0: "0-15,32-47"}
    pairs = [(core, core + 32) for core in range(16)]
    assert binding.proposed_cores([0, 0], one, range(64), pairs) == ["0-7,32-39", "8-15,40-47"]
    assert binding.proposed_cores([0, 0], one, range(16), pairs) == ["0-7", "8-15"]  # a job with one thread a core
    assert binding.proposed_cores([0, 0], {0: "0,32"}, range(64), pairs) == []


def test_ranks_on_threads_of_the_same_cores_share_them() -> None:
    cores = [tuple(range(8)), tuple(range(16, 24))]
    ((verdict, text, advice),) = [
        (f.verdict, f.detail, f.advice) for f in binding.probe_binding(HOST[:2], cores, [0, 0], NODES, SIBLINGS)
    ]
    assert (verdict, text) == (
        "slow",
        "node00 ranks 0-1 are bound to hardware threads of the same cores: 0-7,16-23",
    )
    assert "list:0-3,16-19:4-7,20-23" in advice
    (fine,) = binding.probe_binding(HOST[:2], [(0, 1, 16, 17), (2, 18)], [0, 0], NODES, SIBLINGS)
    assert fine.verdict == "fine"


def test_no_list_where_a_node_has_fewer_cores_than_ranks_or_is_unknown() -> None:
    assert binding.proposed_cores([0, 0], {0: "0-3"}, [2]) == []
    assert binding.proposed_cores([0, None], {0: "0-3"}, range(4)) == []
    assert binding.proposed_cores([0, 0], {0: "0-4"}, range(5)) == ["0-1", "2-3"]
