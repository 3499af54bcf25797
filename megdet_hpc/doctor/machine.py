"""Probes of the hosts and of the ranks on them: cores, memory, limits, GPUs, clocks."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megdet_hpc.data.shard_format import MAX_SHARDS
from megdet_hpc.devices import is_gpu, kind_of
from megdet_hpc.doctor.binding import core_threads, gpu_node, nodes_of, numa_nodes, probe_binding
from megdet_hpc.doctor.findings import ALL, Finding, Place, columns, name_places
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.groups import rank_ranges
from megdet_hpc.parallel.launch import FILL_NODES, idle_nodes

_GIB = 2**30
# A reader holds one open file per shard. Libraries, pipes and sockets of a rank need more.
_OPEN_FILES = MAX_SHARDS + 256
# With less the kernel kills ranks once images are loaded: torch, torchvision and Horovod alone take 0.4 GiB.
_MEMORY_PER_RANK = 1 * _GIB
# Loader workers pass batches on in shared memory. Two images of 800 x 1344 in float32 are 25 MiB.
_SHARED_MEMORY_PER_RANK = 256 * 2**20
_CLOCK_SLOW, _CLOCK_WRONG = 0.5, 5.0
_CLOCK_ROUNDS = 5


@dataclass(frozen=True)
class RankPlace:
    """A row of the rank table."""

    place: Place
    local_rank: int
    device: str
    gpu: str
    """UUID of the GPU; empty on a CPU."""
    cores: tuple[int, ...]
    threads: int
    """Number of torch's threads in this rank."""
    omp: str
    """OMP_NUM_THREADS."""
    host_cores: int
    """All cores of the host, also those of other jobs."""
    gpu_node: int | None = None
    """NUMA node of the GPU; None without one, or where Linux does not tell."""
    numa: dict[int, str] = field(default_factory=dict)
    """The cores of each NUMA node of the host, as text."""
    core_threads: tuple[tuple[int, ...], ...] = ()
    """The numbers of each core of the host that has several hardware threads."""


def rank_place(place: Place, local_rank: int, device: torch.device) -> RankPlace:
    """This rank's row. Not a collective."""
    name, uuid, node = "cpu", "", None
    if is_gpu(device):
        properties = kind_of(device.type).module.get_device_properties(device)
        uuid = str(getattr(properties, "uuid", device.index))
        name = f"{device} {properties.name}"
        node = gpu_node(_pci_address(properties))
    cores = tuple(sorted(os.sched_getaffinity(0)))
    omp = os.environ.get("OMP_NUM_THREADS", "unset")
    threads, host_cores = torch.get_num_threads(), os.cpu_count() or 1
    numa, siblings = numa_nodes(), core_threads()
    return RankPlace(place, local_rank, name, uuid, cores, threads, omp, host_cores, node, numa, siblings)


def _pci_address(properties: Any) -> str:
    """The PCI address of a GPU, as sysfs names it; torch gives its three numbers."""
    numbers = [getattr(properties, f"pci_{part}_id", 0) for part in ("domain", "bus", "device")]
    return "{:04x}:{:02x}:{:02x}.0".format(*numbers)


def rank_table(rows: Sequence[RankPlace]) -> str:
    """The ranks, their hosts, devices and cores as text."""
    body = [
        (
            *(str(r.place.rank), r.place.host, str(r.local_rank), rank_ranges(r.cores)),
            ",".join(map(str, nodes_of(r.cores, r.numa))) or "-",
            *(str(r.threads), r.omp, r.device if r.gpu_node is None else f"{r.device}, NUMA node {r.gpu_node}"),
        )
        for r in rows
    ]
    return "\n".join(
        columns([("rank", "host", "local", "cores", "NUMA", "threads", "OMP_NUM_THREADS", "device"), *body])
    )


def probe_placement(rows: Sequence[RankPlace]) -> list[Finding]:
    """Cores and GPUs of the ranks of one host, given as its rows."""
    found = []
    cores = {core for row in rows for core in row.cores}
    threads = sum(row.threads for row in rows)
    text = f"{len(rows)} rank(s) with {threads} thread(s) on {len(cores)} of {rows[0].host_cores} cores"
    if threads > len(cores):
        costs = "threads wait for a core; set OMP_NUM_THREADS to cores / ranks per host, or ask for more cores"
        found.append(Finding("slow", "cores", text, costs))
    elif len(rows) > 1 and len(cores) == len(rows) < rows[0].host_cores:
        costs = "a rank's loader workers share its one core; give it more: mpirun --bind-to none, srun --cpus-per-task"
        found.append(Finding("slow", "cores", text, costs))
    else:
        found.append(Finding("fine", "cores", text))
    ordered = sorted(rows, key=lambda row: row.local_rank)
    found += probe_binding(
        [row.place for row in ordered],
        [row.cores for row in ordered],
        [row.gpu_node for row in ordered],
        rows[0].numa,
        rows[0].core_threads,
    )
    users: dict[str, list[Place]] = {}
    for row in rows:
        if row.gpu:
            users.setdefault(row.gpu, []).append(row.place)
    for gpu, places in users.items():
        if len(places) > 1:
            do = "start one rank per GPU: --gpus-per-node equal to --ntasks-per-node, or fewer ranks"
            found.append(Finding("wrong", "GPU", f"{name_places(places)} share GPU {gpu}", do))
    if users and all(len(places) == 1 for places in users.values()):
        found.append(Finding("fine", "GPU", f"{len(users)} GPU(s), each with one rank"))
    return found


def probe_nodes(num_hosts: int) -> list[Finding]:
    """Whether all nodes of the job have ranks. Not a collective; rank 0 asks."""
    idle = idle_nodes(num_hosts)
    return [Finding("slow", "nodes", idle, f"the other nodes stand idle; {FILL_NODES}", about=ALL)] if idle else []


def _limit(kind: int) -> int | None:
    """The soft limit; None is unlimited."""
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _size(number: int | None) -> str:
    return "unlimited" if number is None else f"{number / 2**20:.0f} MiB"


def probe_limits() -> list[Finding]:
    """ulimits of this rank. Not a collective."""
    files, locked, stack = (_limit(k) for k in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_STACK))
    found = []
    if files is not None and files < _OPEN_FILES:
        do = f"set ulimit -n {_OPEN_FILES} or more in the job script: a reader keeps up to {MAX_SHARDS} shards open"
        found.append(Finding("wrong", "ulimit -n", f"{files} open files", do))
    else:
        found.append(Finding("fine", "ulimit -n", f"{'unlimited' if files is None else files} open files"))
    infiniband = any(Path("/sys/class/infiniband").glob("*"))
    if infiniband and locked is not None and locked < _GIB:
        costs = "InfiniBand registers less memory or falls back to TCP; set ulimit -l unlimited on the nodes"
        found.append(Finding("slow", "ulimit -l", f"{_size(locked)} of locked memory", costs))
    else:
        found.append(Finding("fine", "ulimit -l", f"{_size(locked)} of locked memory"))
    found.append(Finding("fine", "ulimit -s", f"{_size(stack)} of stack"))
    return found


def free_memory() -> int:
    """Bytes that this host can still give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def probe_memory(ranks_on_host: int) -> list[Finding]:
    """Free memory and shared memory of this host. Not a collective; one rank per host asks."""
    found = []
    available = free_memory()
    text = f"{available / _GIB:.1f} GiB free for {ranks_on_host} rank(s)"
    if available < ranks_on_host * _MEMORY_PER_RANK:
        do = f"start fewer ranks per host, or ask for more memory: at least {_MEMORY_PER_RANK / _GIB:g} GiB a rank"
        found.append(Finding("wrong", "memory", text, do))
    else:
        found.append(Finding("fine", "memory", text))
    shared = os.statvfs("/dev/shm")
    free = shared.f_bavail * shared.f_frsize
    text = f"{free / _GIB:.3g} of {shared.f_blocks * shared.f_frsize / _GIB:.3g} GiB free in /dev/shm"
    if free < ranks_on_host * _SHARED_MEMORY_PER_RANK:
        do = (
            f"the loader workers need {_SHARED_MEMORY_PER_RANK / 2**20:.0f} MiB a rank: remove stale files, bind the "
            "host's /dev/shm into the container (docker --shm-size), or run with data.num_workers 0"
        )
        found.append(Finding("wrong", "shared memory", text, do))
    else:
        found.append(Finding("fine", "shared memory", text))
    return found


def probe_clocks(world: Communicator, place: Place) -> list[Finding]:
    """Difference between the hosts' clocks. Collective of the world; blocks; names doctor.clock.*; found on rank 0.

    Every rank reads its clock as it leaves a barrier. Ranks leave within microseconds to milliseconds, and the result
    includes that.
    """
    readings = []
    for _ in range(_CLOCK_ROUNDS):
        world.barrier(name="doctor.clock.barrier")
        readings.append(time.time())
    everyone = world.allgather_object((place.host, readings), name="doctor.clock.readings")
    if world.rank or len({host for host, _ in everyone}) == 1:
        return []
    skew: dict[str, float] = {}
    for host, values in everyone:
        offset = median(own - first for own, first in zip(values, everyone[0][1], strict=True))
        skew.setdefault(host, offset)
    host, worst = max(skew.items(), key=lambda item: abs(item[1]))
    text = f"at most {abs(worst):.3g} s from {place.host}'s, on {host}"
    if abs(worst) > _CLOCK_WRONG:
        return [Finding("wrong", "clocks", text, f"set {host}'s clock (chrony, NTP)", about=ALL)]
    if abs(worst) > _CLOCK_SLOW:
        return [Finding("slow", "clocks", text, "logs and file times of the hosts cannot be compared", about=ALL)]
    return [Finding("fine", "clocks", text, about=ALL)]
