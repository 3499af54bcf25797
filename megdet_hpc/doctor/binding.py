"""Probe of the cores and GPUs to which the ranks of a host are bound, and the lists that would bind them better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megdet_hpc.doctor.findings import Finding, Place, name_places
from megdet_hpc.parallel.groups import rank_ranges

_NODES = Path("/sys/devices/system/node")
_PCI = Path("/sys/bus/pci/devices")
_CPU = Path("/sys/devices/system/cpu")
_PROBE = "binding"


def parse_cores(text: str) -> tuple[int, ...]:
    """The numbers of a list in Linux' form, such as `0-3,8`."""
    cores: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.strip().isdigit():
            cores += range(int(first), int(last or first) + 1)
    return tuple(cores)


def numa_nodes(root: Path = _NODES) -> dict[int, str]:
    """The cores of each NUMA node of this host that has some, as text; empty where Linux does not tell."""
    found = {}
    for folder in sorted(root.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        try:
            text = (folder / "cpulist").read_text().strip()
        except OSError:
            continue
        if text:
            found[int(folder.name[4:])] = text
    return found


def core_threads(root: Path = _CPU) -> tuple[tuple[int, ...], ...]:
    """The numbers of each core that has several hardware threads; empty where none has, or Linux does not tell."""
    found = set()
    for file in root.glob("cpu[0-9]*/topology/thread_siblings_list"):
        with suppress(OSError):
            found.add(parse_cores(file.read_text()))
    return tuple(sorted(threads for threads in found if len(threads) > 1))


def _first_threads(threads: Sequence[tuple[int, ...]]) -> dict[int, int]:
    """The first thread of each thread's core."""
    return {number: row[0] for row in threads for number in row}


def _whole_cores(numbers: Sequence[int], threads: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Numbers grouped by the core whose threads they are, in the order of each core's first."""
    first = _first_threads(threads)
    groups: dict[int, list[int]] = {}
    for number in numbers:
        groups.setdefault(first.get(number, number), []).append(number)
    return list(groups.values())


def gpu_node(address: str, root: Path = _PCI) -> int | None:
    """The NUMA node of a PCI device, by its address such as `0000:3b:00.0`; None where Linux does not tell."""
    try:
        node = int((root / address.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1: the firmware tells none, as on hosts of one node


def nodes_of(cores: Sequence[int], nodes: Mapping[int, str]) -> tuple[int, ...]:
    """The NUMA nodes on which some of the cores lie."""
    return tuple(node for node, text in nodes.items() if set(cores) & set(parse_cores(text)))


def proposed_cores(
    gpu_nodes: Sequence[int | None],
    nodes: Mapping[int, str],
    allowed: Sequence[int],
    threads: Sequence[tuple[int, ...]] = (),
) -> list[str]:
    """A list of cores for each rank of a host: an equal share of those of its GPU's NUMA node.

    Args:
        gpu_nodes: NUMA node of each rank's GPU, in the order of the local ranks; None: unknown.
        nodes: cores of each NUMA node.
        allowed: cores that the job has on the host. The others belong to other jobs, or to the system.
        threads: numbers of each core with several hardware threads; all of them go to one rank.

    Returns:
        One text such as `0-7` a rank; empty if a rank's node is unknown, or a node has fewer cores than ranks.
    """
    lists = []
    for index, node in enumerate(gpu_nodes):
        if node is None or node not in nodes:
            return []
        cores = _whole_cores([core for core in parse_cores(nodes[node]) if core in set(allowed)], threads)
        mates = [other for other, theirs in enumerate(gpu_nodes) if theirs == node]
        share = len(cores) // len(mates)
        if not share:
            return []
        place = mates.index(index)
        lists.append(rank_ranges(number for core in cores[place * share : (place + 1) * share] for number in core))
    return lists


def binding_options(lists: Sequence[str]) -> str:
    """The settings of jobs/env.sh that bind each local rank to its list."""
    masks = ",".join(hex(sum(1 << core for core in parse_cores(text))) for text in lists)
    return (
        f"MEGDET_SRUN_OPTIONS=--cpu-bind=mask_cpu:{masks} for srun, "
        f'MEGDET_LAUNCH_OPTIONS="--cpu-bind list:{":".join(lists)}" for PALS'
    )


def probe_binding(
    places: Sequence[Place],
    cores: Sequence[tuple[int, ...]],
    gpu_nodes: Sequence[int | None],
    nodes: Mapping[int, str],
    threads: Sequence[tuple[int, ...]] = (),
) -> list[Finding]:
    """Whether the ranks of one host share cores, or lie on another NUMA node than their GPUs.

    Args:
        places: the ranks of the host, in the order of their local ranks.
        cores: cores that each rank may use.
        gpu_nodes: NUMA node of each rank's GPU; None: no GPU, or unknown.
        nodes: cores of each NUMA node of the host.
        threads: numbers of each core of the host with several hardware threads.
    """
    found = []
    lists = proposed_cores(gpu_nodes, nodes, sorted({core for row in cores for core in row}), threads)
    bind = binding_options(lists) if lists else "srun --cpu-bind, mpirun by MEGDET_CORES_PER_RANK"
    own = [nodes_of(row, nodes) for row in cores]
    far = [index for index, node in enumerate(gpu_nodes) if nodes and node is not None and node not in own[index]]
    if far:
        node = gpu_nodes[far[0]]
        text = (
            f"{name_places([places[index] for index in far])}: on another NUMA node than the GPU; the first on cores "
            f"{rank_ranges(cores[far[0]])} of node {_numbers(own[far[0]])}, its GPU on node {node}"
        )
        found.append(Finding("slow", _PROBE, text, f"images and messages cross between processors; bind: {bind}"))
    unbound = len(places) > 1 and len(set(cores)) == 1
    first = _first_threads(threads)
    physical = [{first.get(number, number) for number in row} for row in cores]
    sharing = [i for i, row in enumerate(physical) if any(row & o for j, o in enumerate(physical) if j != i)]
    if sharing and not (unbound and len(nodes) < 2):
        who, shared = [places[index] for index in sharing], sorted({core for index in sharing for core in cores[index]})
        how = "are not bound and share cores" if unbound else "are bound and share some of cores"
        if len(shared) == sum(len(cores[index]) for index in sharing):
            how = "are bound to hardware threads of the same cores:"
        costs = "ranks and loader workers move between NUMA nodes" if unbound else "they wait for each other"
        text = f"{name_places(who)} {how} {rank_ranges(shared)}"
        found.append(Finding("slow", _PROBE, text, f"{costs}; bind: {bind}"))
    if not found:
        how = "share the host's cores" if sharing else "have cores of their own" if len(places) > 1 else "alone"
        near = ", on the NUMA nodes of their GPUs" if any(node is not None for node in gpu_nodes) else ""
        found.append(
            Finding("fine", _PROBE, f"{len(places)} rank(s) {how}{near}; {len(nodes) or 'unknown'} NUMA node(s)")
        )
    return found


def _numbers(nodes: Sequence[int]) -> str:
    return ", ".join(map(str, nodes)) or "unknown"
