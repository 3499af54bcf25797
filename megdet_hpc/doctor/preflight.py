"""Checks on every node before a job trains: data are readable, folders writable, collectives answered."""

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

_HASH_DIGITS = 12


def guarded(probe: str, advice: str, body: Callable[[], list[Finding]]) -> list[Finding]:
    """A probe's findings, or one about its error. A rank that raised the error would leave the others waiting."""
    try:
        return body()
    except (OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        return [Finding("wrong", probe, text or type(error).__name__, advice)]


def find_device(runtime: Runtime, choice: str) -> tuple[torch.device | None, list[Finding]]:
    """This rank's device, after a trial. Not a collective.

    Returns:
        The device, or None if there is none of the kind asked for, and the findings.
    """
    device = None

    def look() -> list[Finding]:
        nonlocal device
        candidate = runtime.device(choice)
        torch.ones(1, device=candidate).add_(1).cpu()
        device = candidate
        return [Finding("fine", "device", f"{device.type}, asked for {choice}")]

    advice = "check with nvidia-smi on this host, ask the scheduler for one GPU per rank, or pass --device cpu"
    found = guarded("device", advice, look)
    return device, found


def probe_data(folder: Path, rank: int, size: int) -> tuple[str, list[Finding]]:
    """Open a pack as training does (every shard is there in its size) and read one image. Not a collective.

    Returns:
        Shortened SHA-256 of the manifest, empty if the pack cannot be used, and the findings.
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


def chosen_transports(names: Sequence[str] | None, runtime: Runtime, device: torch.device) -> list[str]:
    """The transports to try; auto becomes the one that norm.transport auto uses, None all that the job can start."""
    if names is None:
        return list(runtime.transports)
    return list(dict.fromkeys(runtime.resolve(name, device.type) if name == "auto" else name for name in names))


def probe_transports(
    runtime: Runtime, transports: Sequence[str], device: torch.device, guard: StageGuard
) -> list[Finding]:
    """Sum the ranks' numbers over each transport. Collective of the world; blocks; names doctor.answer.*.

    Returns:
        The same findings on every rank, except for a wrong sum: only the rank that received it reports it.
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
