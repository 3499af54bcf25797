"""What must hold on every node before a job trains: data readable, folders writable, collectives answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.shard_format import manifest_hash
from megdet_hpc.doctor.findings import Finding
from megdet_hpc.doctor.network import refused
from megdet_hpc.doctor.stage_guard import StageGuard
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.transports import resolve_transport

_HASH_DIGITS = 12


def guarded(probe: str, advice: str, body: Callable[[], list[Finding]]) -> list[Finding]:
    """A probe's findings, or what stopped it: a rank that raised alone would leave the others waiting."""
    try:
        return body()
    except (OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        return [Finding("wrong", probe, text or type(error).__name__, advice)]


def find_device(runtime: Runtime, choice: str) -> tuple[torch.device | None, list[Finding]]:
    """This rank's device, tried out. Not a collective.

    Returns:
        The device, None if there is none of the kind asked for; and what was found.
    """
    device = None

    def look() -> list[Finding]:
        nonlocal device
        candidate = runtime.device(choice)
        torch.ones(1, device=candidate).add_(1).cpu()
        device = candidate
        return [Finding("fine", "device", f"{device.type}, asked for {choice}")]

    advice = "have nvidia-smi run on this host, ask the scheduler for one GPU per rank, or pass --device cpu"
    found = guarded("device", advice, look)
    return device, found


def probe_data(folder: Path, rank: int, size: int) -> tuple[str, list[Finding]]:
    """Open a pack as training does (every shard's presence and size) and read one image of this rank's. Local.

    Returns:
        SHA-256 of the manifest, shortened, empty where it cannot be used; and what was found.
    """
    manifest = ""

    def look() -> list[Finding]:
        nonlocal manifest
        pack = PackedCoco(folder)
        if len(pack):
            pack.read_image_bytes(rank * len(pack) // size)
        pack.close()
        manifest = manifest_hash(folder)[:_HASH_DIGITS]
        text = f"{folder}: {len(pack)} images in {len(pack.shard_paths)} shard(s); one read per rank, CRC-32 right"
        return [Finding("fine", "data", text)]

    advice = f"make {folder} the whole pack on this host: mount it, copy it again, or correct --data"
    found = guarded("data", advice, look)
    return manifest, found


def chosen_transports(names: Sequence[str], device: torch.device) -> list[str]:
    """The transports to try, with auto replaced by what a job takes on this device for norm.transport auto."""
    return list(dict.fromkeys(resolve_transport(name, device.type) for name in names))


def probe_transports(
    runtime: Runtime, transports: Sequence[str], device: torch.device, guard: StageGuard
) -> list[Finding]:
    """Have each transport add up the ranks' numbers. Collective of the world; blocks; names doctor.answer.*.

    Returns:
        The same findings on every rank, but for a wrong sum, which only the rank that received it reports.
    """
    world, found = runtime.world, []
    if world.size == 1:
        return [Finding("fine", "collectives", "one rank sends nothing; start several with mpirun or srun")]
    expected = world.size * (world.size - 1) // 2
    answered = []
    for transport in transports:
        guard.collective(f"first allreduce over transport {transport}, doctor.answer.{transport}")
        try:
            comm = runtime.communicator(transport, device)
        except UserError as error:
            found.append(refused(transport, error))
            continue
        total = torch.full((4,), float(world.rank), device=device)
        comm.allreduce_sum_(total, name=f"doctor.answer.{transport}")
        if total.tolist() == [expected] * 4:
            answered.append(transport)
        else:
            text = f"the sum of the ranks' numbers was {total.tolist()}, expected {expected} four times"
            do = "do not train: this host's network or GPU changes data; have it checked"
            found.append(Finding("wrong", f"transport {transport}", text, do))
    if answered:
        text = f"{', '.join(answered)} answered on {world.size} ranks, device {device.type}"
        found.append(Finding("fine", "collectives", text))
    return found
