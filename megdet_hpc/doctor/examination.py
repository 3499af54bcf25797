"""The order of the probes on every rank, and the gathering of their findings."""

from __future__ import annotations

import argparse
import functools
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megdet_hpc.data.pack_checks import check_manifest
from megdet_hpc.data.shard_format import read_manifest
from megdet_hpc.devices import found_type, kind_of
from megdet_hpc.doctor import filesystem, machine, nccl_log, network, overlap, preflight, software
from megdet_hpc.doctor.findings import ALL, Finding, Line, Place, merge
from megdet_hpc.doctor.machine import RankPlace
from megdet_hpc.doctor.run_start import probe_training
from megdet_hpc.doctor.stage_guard import StageGuard
from megdet_hpc.parallel.runtime import Runtime


@dataclass(frozen=True)
class _Rank:
    """What a rank found without the others."""

    row: RankPlace
    versions: dict[str, str]
    manifests: list[tuple[str, str]]
    """Each data folder's name on this rank and its manifest's hash; the hash is empty if the pack cannot be used."""
    findings: list[Finding]

    @property
    def place(self) -> Place:
        return self.row.place


def _folders(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    for use in ("output", "scratch"):
        if getattr(options, use):
            yield use, Path(getattr(options, use))


def _probe_rank(options: argparse.Namespace, runtime: Runtime, guard: StageGuard) -> _Rank:
    """The probes that send nothing. Not a collective."""
    world = runtime.world
    guard.local("versions and device")
    libraries, _ = software.load_libraries()
    device, found = preflight.find_device(runtime, options.device)
    row = machine.rank_place(Place(socket.gethostname(), world.rank), runtime.local_rank, device or torch.device("cpu"))
    if world.rank == 0:
        found += machine.probe_nodes(runtime.num_hosts)
    manifests = []
    for folder in options.data:
        guard.local(f"data folder {folder}: manifest, shards, one image")
        manifest, findings = preflight.probe_data(Path(folder), world.rank, world.size)
        manifests.append((folder, manifest))
        found += findings
    if options.training and world.rank == 0:
        guard.local("the training's options and its backbone's weights")
        advice = "give the training folders that this user can read on this host"
        found += preflight.guarded("training", advice, lambda: probe_training(options.training, world.size))
    for use, folder in _folders(options):
        guard.local(f"{use} folder {folder}: writing 1 MiB")
        found.append(filesystem.probe_writable(use, folder))
    # a host whose GPUs are gone takes part in a job for GPUs all the same
    wanted = options.device if options.device != "auto" else device.type if device else "cpu"
    if options.preflight:
        found += software.probe_gradients(wanted)
    else:
        guard.local("libraries and limits")
        found += software.probe_software(device or torch.device("cpu"), wanted)
        found += machine.probe_limits()
    versions = {**software.versions(libraries), "device": device.type if device else "none"}
    return _Rank(row, versions, manifests, found)


def _probe_host(options: argparse.Namespace, runtime: Runtime, num_hosts: int, own: _Rank, guard: StageGuard) -> None:
    """Run the probes that one rank per host makes, and add to its findings. Not a collective."""
    if options.preflight or runtime.local_rank:
        return
    found, advice = own.findings, "make sure that the folder exists and can be read on this host"
    guard.local("memory and network interfaces")
    found += preflight.guarded("memory", "mount /proc and /dev/shm", lambda: machine.probe_memory(runtime.local_size))
    found += preflight.guarded("interfaces", "mount /sys", lambda: network.probe_interfaces(num_hosts))
    for folder in map(Path, options.data):
        guard.local(f"data folder {folder}: reading speed")
        found += _probe_type("data", folder, advice)
        found += preflight.guarded("data read", advice, functools.partial(_probe_pack, folder))
    for use, folder in _folders(options):
        guard.local(f"{use} folder {folder}: writing speed")
        found += _probe_type(use, folder, advice)
        found += preflight.guarded(f"{use} write", advice, functools.partial(filesystem.probe_writing, use, folder))


def _probe_type(use: str, folder: Path, advice: str) -> list[Finding]:
    return preflight.guarded(f"{use} file system", advice, lambda: [filesystem.probe_type(use, folder)])


def _probe_pack(folder: Path) -> list[Finding]:
    manifest = read_manifest(folder)
    check_manifest(folder, manifest)
    shards = manifest["shards"]
    largest = folder / max(shards, key=lambda shard: shard["bytes"])["file"]
    found = filesystem.probe_reading("data", largest, sum(shard["bytes"] for shard in shards))
    return [*found, filesystem.probe_locks("data", folder, largest, write=False)]


def _compare(everyone: Sequence[_Rank]) -> list[Finding]:
    """Versions and manifests over the ranks."""
    advice = "install the same on every host, or start the job from one shared environment; same --device on all"
    found = software.find_differences([(r.place, r.versions) for r in everyone], advice)
    for number, (folder, _) in enumerate(everyone[0].manifests):
        name = f"manifest of {folder}"
        # ranks may name the folder differently; a rank that cannot use the pack has its own finding
        hashes = [(r.place, r.manifests[number][1]) for r in everyone if number < len(r.manifests)]
        readable = [(place, {name: manifest}) for place, manifest in hashes if manifest]
        if len(readable) > 1:
            found += software.find_differences(
                readable, f"copy {folder} again to the host that differs: its pack is another one"
            )
    return found


def common_device(rows: Sequence[RankPlace]) -> torch.device:
    """One kind of device for all ranks; with two kinds they would send one message by different libraries."""
    if all(row.gpu for row in rows):
        kind = kind_of(found_type())
        return torch.device(kind.type, kind.module.current_device())
    return torch.device("cpu")


def examine_overlap(
    options: argparse.Namespace,
    rows: Sequence[RankPlace],
    lines: Sequence[Line],
    runtime: Runtime,
    guard: StageGuard,
) -> list[Line]:
    """The probe that may hang, run after all others have reported. Collective of the world; blocks.

    Args:
        rows, lines: result of `examine`. Transports with a wrong finding there are left out.
    """
    device = common_device(rows)
    wrong = {line.finding.probe for line in lines if line.finding.verdict == "wrong"}
    chosen = preflight.chosen_transports(options.transports, runtime, device)
    transports = [name for name in chosen if f"transport {name}" not in wrong]
    found = overlap.probe_overlap(runtime, transports, device, options.overlap_rounds, guard)
    return [Line(finding, finding.about) for finding in found]


def examine(
    options: argparse.Namespace, runtime: Runtime, guard: StageGuard, log: Path | None = None
) -> tuple[list[RankPlace], list[Line]]:
    """All probes. Collective of the world; blocks; names doctor.*.

    Args:
        options: options that `__main__.parser` reads.
        log: folder of this process's log of NCCL, which is removed.

    Returns:
        Every rank's place, and the findings with the worst last; both are the same on every rank.
    """
    world = runtime.world
    own = _probe_rank(options, runtime, guard)
    guard.collective("allgather of objects, doctor.hosts")
    hosts = world.allgather_object(own.place.host, name="doctor.hosts")
    _probe_host(options, runtime, len(set(hosts)), own, guard)
    guard.collective("allgather of objects, doctor.findings")
    everyone: list[_Rank] = world.allgather_object(own, name="doctor.findings")
    rows = [r.row for r in everyone]

    device = common_device(rows)
    transports = preflight.chosen_transports(options.transports, runtime, device)
    shared = preflight.probe_transports(runtime, transports, device, guard)
    if not options.preflight:
        guard.collective("clocks, doctor.clock")
        shared += machine.probe_clocks(world, own.place)
        share = machine.free_memory() // runtime.local_size
        # all ranks must make the same calls: a refusal is known to every rank, a wrong sum perhaps to one only
        refused = {finding.probe for finding in shared if finding.about == ALL}
        usable = [name for name in transports if f"transport {name}" not in refused]
        shared += network.probe_collectives(runtime, usable, device, share, guard)
        text = nccl_log.read_log(log) if device.type != "cpu" or log else ""
        shared += nccl_log.probe_network(text, len(set(hosts)), nccl_log.fast_devices(), os.environ.get("NCCL_NET", ""))
    guard.collective("allgather of objects, doctor.shared")
    together = world.allgather_object(shared, name="doctor.shared")

    for host in dict.fromkeys(hosts):
        members = [r for r in everyone if r.place.host == host]
        placement = machine.probe_placement([r.row for r in members])
        for member in members:
            member.findings.extend(placement)
    first = everyone[0]
    first.findings.extend(_compare(everyone))
    found = [(r.place, [*r.findings, *more]) for r, more in zip(everyone, together, strict=True)]
    return rows, merge(found)
