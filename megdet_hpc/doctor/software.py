"""Versions and build flags, and whether all ranks have the same."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence

import h5py
import torch
import torchvision

import megdet_hpc
from megdet_hpc.doctor.findings import ALL, Finding, Place, name_places
from megdet_hpc.parallel.libraries import LibraryError, ParallelLibraries, parallel_libraries
from megdet_hpc.parallel.transports import GPU_BUILD_REMEDY, gpu_build_fault
from megdet_hpc.versions import source_hash


def versions(libraries: ParallelLibraries | None) -> dict[str, str]:
    """What must be equal on all ranks, by name."""
    found = {
        "megdet_hpc": f"{megdet_hpc.__version__}, source {source_hash()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "h5py": h5py.__version__,
    }
    if libraries:
        found |= {"mpi4py": libraries.mpi4py, "MPI": libraries.mpi, "Horovod": libraries.horovod}
    return found


def find_differences(everyone: Sequence[tuple[Place, Mapping[str, str]]], advice: str) -> list[Finding]:
    """One finding for what is equal everywhere, and one for each host that differs from most (or the lower ranks).

    Args:
        everyone: every rank's place and values by name; all have the same names.
        advice: what a host that differs should do.
    """
    found, equal = [], []
    for name in everyone[0][1]:
        usual = Counter(values[name] for _, values in everyone).most_common(1)[0][0]
        different: dict[tuple[str, str], list[Place]] = {}
        for place, values in everyone:
            if values[name] != usual:
                different.setdefault((place.host, values[name]), []).append(place)
        if not different:
            equal.append(f"{name} {usual}")
        for (_, value), places in different.items():
            text = f"{name} is {value}, most ranks have {usual}"
            found.append(Finding("wrong", "differs", text, advice, about=name_places(places)))
    if equal:
        probe = "same everywhere" if len(everyone) > 1 else "versions"
        found.insert(0, Finding("fine", probe, ", ".join(equal), about=ALL))
    return found


def load_libraries() -> tuple[ParallelLibraries | None, Finding | None]:
    """The parallel libraries, or why they cannot be loaded: slow where they are not installed, wrong where broken."""
    try:
        return parallel_libraries(), None
    except LibraryError as error:
        do = "tools/setup_env.sh (make setup) builds Horovod and mpi4py for this MPI"
        probe, text = "Horovod and MPI", f"not loaded: {error}"
        if error.missing:
            return None, Finding("slow", probe, text, f"one process only; {do}")
        return None, Finding("wrong", probe, text, f"{do}; no rank can start")


def probe_software(device: torch.device, wanted: str) -> list[Finding]:
    """Build flags of this rank's libraries. Not a collective.

    Args:
        device: this rank's.
        wanted: cpu or cuda, the job's; a host may lack it.
    """
    libraries, missing = load_libraries()
    further = _parallel(libraries, wanted) if libraries else [missing] if missing else []
    return [_cuda(device), *further]


def judge_gradients(built: tuple[str, ...], device_type: str) -> Finding:
    """Whether a Horovod carries the gradients of a device; from plain values.

    Args:
        built: what Horovod was built with.
        device_type: cpu or cuda, the job's.
    """
    if fault := gpu_build_fault(device_type, built):
        return Finding("wrong", "Horovod", f"{fault}: training would die", GPU_BUILD_REMEDY, lasting=True)
    text = f"Horovod built with {', '.join(built) or 'nothing'}"
    if device_type == "cuda" and "nccl" not in built:
        costs = "gradients leave the GPU through host memory; HOROVOD_BUILD=nccl tools/setup_env.sh builds it with NCCL"
        return Finding("slow", "Horovod", f"{text}, job on GPUs", costs)
    return Finding("fine", "Horovod", text)


def probe_gradients(device_type: str) -> list[Finding]:
    """What stands in the way of gradients on a device, for the preflight. Not a collective."""
    libraries, _ = load_libraries()
    found = [judge_gradients(libraries.horovod_built, device_type)] if libraries else []
    return [finding for finding in found if finding.verdict == "wrong"]


def _cuda(device: torch.device) -> Finding:
    build = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"
    if torch.version.cuda and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        build += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    shown = f"{torch.cuda.device_count()} GPU(s) visible" if torch.cuda.is_available() else "no GPU visible"
    return Finding("fine", "CUDA", f"{build}; {shown}; this job's device: {device.type}")


def _parallel(libraries: ParallelLibraries, device_type: str) -> list[Finding]:
    built = f"Horovod built with {', '.join(libraries.horovod_built) or 'nothing'}"
    rebuild = "build Horovod for the MPI of the job: tools/setup_env.sh (make setup)"
    found = []
    if "mpi" not in libraries.horovod_built or libraries.mpi_enabled is False:
        found.append(Finding("wrong", "Horovod", f"{built}; not running over MPI", rebuild))
    else:
        found.append(judge_gradients(libraries.horovod_built, device_type))
    if libraries.thread_level is None:
        found.append(Finding("fine", "MPI threads", "level known only under a launcher"))
    elif libraries.multiple and libraries.threads_supported is not False:
        found.append(Finding("fine", "MPI threads", libraries.thread_level))
    else:
        do = "take an MPI that grants MPI_THREAD_MULTIPLE, which mpi4py beside Horovod needs"
        found.append(Finding("wrong", "MPI threads", libraries.thread_level, do))
    found.append(_gpu_memory(libraries.reads_gpu_memory, device_type))
    return found


def _gpu_memory(reads: bool | None, device_type: str) -> Finding:
    if reads is None:
        return Finding("fine", "CUDA-aware MPI", "known only under a launcher")
    aware = "MPI reads GPU memory" if reads else "MPI does not read GPU memory"
    needed = "; not needed on CPUs" if device_type != "cuda" else ""
    return Finding("fine", "CUDA-aware MPI", aware + (needed or "; messages over MPI pass through the host"))
