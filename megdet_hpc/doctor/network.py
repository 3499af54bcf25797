"""Probes of the network: interfaces, and the speed of collectives at the sizes of a training run."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch

from megdet_hpc.devices import wait_for
from megdet_hpc.doctor.findings import ALL, Finding
from megdet_hpc.doctor.stage_guard import StageGuard
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import HOROVOD, Runtime

# Bytes of CGBN's messages: C sums and a count in float64, for the 64, 256 and 2048 channels of ResNet-50.
CGBN_BYTES = (65 * 8, 257 * 8, 2049 * 8)
# Bytes of gradients: part of a fusion buffer, and all of a ResNet-50 detector with FPN (about 40 million float32).
GRADIENT_BYTES = (25 * 10**6, 160 * 10**6)
# ResNet-50 has 53 layers and its FPN 8. Each sends two messages forward and one backward (docs/cgbn.md).
CGBN_MESSAGES = 3 * (53 + 8)
_SLOW_MESSAGE = 200e-6
_SLOW_GRADIENTS = 1.0
# Share of the free memory that all ranks' copies of a message may take.
_MEMORY_SHARE = 0.25
# What a runtime calls its carrier of gradients, by transport.
_CARRIERS = {"mpi": "mpi4py", "horovod": HOROVOD, "torch": "torch.distributed"}
_INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def interfaces(root: Path = Path("/sys/class/net")) -> dict[str, str]:
    """State and speed of each network interface by name."""
    found = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.is_dir():
            speed = _read(path / "speed")
            known = speed.isdigit() and speed != "0"
            found[path.name] = _read(path / "operstate") + (f" {int(speed) / 1000:g} Gbit/s" if known else "")
    return found


def probe_interfaces(
    num_hosts: int,
    environ: Mapping[str, str] = os.environ,
    net: Path = Path("/sys/class/net"),
    infiniband: Path = Path("/sys/class/infiniband"),
) -> list[Finding]:
    """This host's interfaces, and those that the environment names. Not a collective; one rank per host asks."""
    found = []
    known = interfaces(net)
    outward = [name for name, state in known.items() if name != "lo" and not state.startswith("down")]
    text = ", ".join(f"{name} {state}" for name, state in known.items()) or "none listed"
    if num_hosts > 1 and not outward:
        found.append(Finding("wrong", "interfaces", text, "no interface but loopback is up; repair the host's network"))
    else:
        found.append(Finding("fine", "interfaces", text))
    for variable in _INTERFACE_VARIABLES:
        value = environ.get(variable, "")
        if missing := _missing_names(value, known, forms=variable.startswith("NCCL_")):
            do = f"set {variable} to one of: {', '.join(known)}"
            found.append(Finding("wrong", variable, f"{value!r}, but this host has no {', '.join(missing)}", do))
    for port in sorted(infiniband.glob("*/ports/*")):
        state, rate = _read(port / "state"), _read(port / "rate")
        name = f"{port.parent.parent.name} port {port.name}"
        if "ACTIVE" in state:
            found.append(Finding("fine", "InfiniBand", f"{name}: {rate}"))
        else:
            costs = "traffic takes the other ports or TCP; have the cable and the subnet manager checked"
            found.append(Finding("slow", "InfiniBand", f"{name}: {state or 'state unknown'}", costs))
    return found


def _missing_names(value: str, known: Collection[str], *, forms: bool) -> list[str]:
    """The names in a variable that fit no interface.

    Args:
        value: names, separated by commas.
        known: this host's interfaces.
        forms: whether it has NCCL's forms: ^NAME excludes, =NAME is the exact name, NAME alone is a prefix. Gloo and
            Horovod take the exact name.
    """
    if forms and value.startswith("^"):
        return []
    exact = not forms or value.startswith("=")
    names = [name for name in (value.removeprefix("=") if forms else value).split(",") if name]
    if exact:
        return [name for name in names if name.split(":")[0] not in known]
    return [name for name in names if not any(other.startswith(name.split(":")[0]) for other in known)]


def _seconds(comm: Communicator, world: Communicator, tensor: torch.Tensor, rounds: int, messages: int) -> float:
    """Median over rounds of the time of one message on this rank. Collective of the world; blocks."""
    times = []
    for _ in range(rounds):
        world.barrier(name="doctor.speed.start")
        begin = time.perf_counter()
        for _ in range(messages):
            comm.allreduce_sum_(tensor, name="doctor.speed")
        wait_for(tensor.device)
        times.append((time.perf_counter() - begin) / messages)
    return median(times[1:])


def _judge(transport: str, size: int, seconds: float, *, carries: bool) -> Finding:
    """The finding for one transport and message size [bytes]; `carries`: whether the job's gradients go over it."""
    probe = f"allreduce, {transport}"
    if size in CGBN_BYTES:
        text = f"{size / 1024:.1f} KB in {seconds * 1e6:.0f} microseconds"
        if transport == "horovod":
            # Horovod's cycle is long on purpose (parallel/horovod.py); by default only gradients use it
            return Finding("fine", probe, f"{text}, waiting for Horovod's cycle", about=ALL)
        if seconds > _SLOW_MESSAGE:
            costs = f"CGBN of a ResNet-50 with FPN sends {CGBN_MESSAGES} a step: {CGBN_MESSAGES * seconds * 1e3:.0f} ms"
            if transport != "mpi":
                costs += "; compare norm.transport mpi"
            return Finding("slow", probe, text, costs, about=ALL)
        return Finding("fine", probe, text, about=ALL)
    rate = size / seconds / 1e9
    text = f"{size / 1e6:.0f} MB in {seconds * 1e3:.0f} ms, {rate:.2g} GB/s"
    if rate < _SLOW_GRADIENTS and carries:
        whole = GRADIENT_BYTES[-1]
        costs = (
            f"a detector's gradients ({whole / 1e6:.0f} MB) take {whole / rate / 1e9:.2g} s an update; the "
            "backward pass may hide a part; check that the fast network is used, or raise accumulation"
        )
        return Finding("slow", probe, text, costs, about=ALL)
    return Finding("fine", probe, text, about=ALL)


def probe_collectives(
    runtime: Runtime, transports: Sequence[str], device: torch.device, free_bytes: int, guard: StageGuard
) -> list[Finding]:
    """Time allreduces over each transport. Collective of the world; blocks; names doctor.speed.*; found on rank 0.

    Args:
        transports: some of mpi, horovod, torch.
        free_bytes: memory of this host, divided by its ranks.
    """
    world = runtime.world
    if world.size == 1:
        return []
    guard.collective("allgather of objects, doctor.speed.memory")
    room = min(world.allgather_object(free_bytes, name="doctor.speed.memory")) * _MEMORY_SHARE
    found = []
    for transport in transports:
        guard.collective(f"start of transport {transport}")
        try:
            comm = runtime.communicator(transport, device)
        except UserError as error:
            found.append(refused(transport, error))
            continue
        for size in (*CGBN_BYTES, *GRADIENT_BYTES):
            # beside the tensor, Horovod and MPI without CUDA hold a copy each
            if size * 3 > room:
                continue
            guard.collective(f"allreduce of {size} bytes over {transport}, doctor.speed")
            small = size in CGBN_BYTES
            tensor = torch.zeros(size // 8 if small else size // 4, device=device)
            tensor = tensor.double() if small else tensor
            messages = 1 if not small or transport == "horovod" else 20
            seconds = _seconds(comm, world, tensor, 11 if small else 3, messages)
            slowest = max(world.allgather_object(seconds, name="doctor.speed.seconds"))
            found.append(_judge(transport, size, slowest, carries=_CARRIERS[transport] == runtime.carrier))
    return found if world.rank == 0 else []


def refused(transport: str, error: UserError) -> Finding:
    """The finding for a transport that starts on no rank."""
    do = "correct what it says, or leave the transport out of --transports if the job does not use it"
    return Finding("wrong", f"transport {transport}", str(error), do, about=ALL)
