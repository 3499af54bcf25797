"""Probes of the software: versions, build flags and what is missing, and whether all ranks have the same."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence

import h5py
import torch
import torchvision

import megdet_hpc
from megdet_hpc.devices import KINDS, is_gpu
from megdet_hpc.doctor.findings import ALL, Finding, Place, name_places
from megdet_hpc.parallel.libraries import LibraryError, ParallelLibraries, installed, parallel_libraries
from megdet_hpc.parallel.transports import GPU_BUILD_REMEDY, gpu_build_fault
from megdet_hpc.versions import source_hash

# Packages without which everything runs, by the name that Python imports: the name for pip, and what the lack costs
# (docs/benchmarks.md).
LACKS = {
    "hotcoco": ("hotcoco", "pycocotools scores, which takes 95 times as long; megdet analyze refuses"),
    "simplejpeg": ("simplejpeg", "Pillow decodes JPEGs, at three quarters of the speed"),
    "zlib_ng": ("zlib-ng", "zlib checks each image's CRC-32, at a tenth of the speed"),
    "tensorboard": ("tensorboard", "no TensorBoard files; metrics.jsonl and curves.png are written all the same"),
    "matplotlib": (
        "matplotlib",
        "no curves.png, no predictions.png; commands whose work is a picture fail",
    ),
}


def versions(libraries: ParallelLibraries | None) -> dict[str, str]:
    """Versions that must be equal on all ranks, by name."""
    found = {
        "megdet_hpc": f"{megdet_hpc.__version__}, source {source_hash()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "h5py": h5py.__version__,
    }
    if libraries and libraries.mpi4py:
        found |= {"mpi4py": libraries.mpi4py, "MPI": libraries.mpi}
    if libraries and libraries.horovod:
        found["Horovod"] = libraries.horovod
    return found


def find_differences(everyone: Sequence[tuple[Place, Mapping[str, str]]], advice: str) -> list[Finding]:
    """One finding for what is equal everywhere, and one for each host that differs from most ranks.

    If two values are equally frequent, the one of the lowest rank counts as usual.

    Args:
        everyone: every rank's place and values by name. A rank without a name has not installed it.
        advice: what a host that differs should do.
    """
    found, equal = [], []
    for name in dict.fromkeys(name for _, values in everyone for name in values):
        everywhere = [(place, values.get(name, "not installed")) for place, values in everyone]
        usual = Counter(value for _, value in everywhere).most_common(1)[0][0]
        different: dict[tuple[str, str], list[Place]] = {}
        for place, value in everywhere:
            if value != usual:
                different.setdefault((place.host, value), []).append(place)
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
    """The parallel libraries that are installed, or a finding that one of them is broken."""
    try:
        return parallel_libraries(), None
    except LibraryError as error:
        do = "tools/setup_env.sh (make setup) builds Horovod and mpi4py for this MPI; no rank can start"
        return None, Finding("wrong", "Horovod and MPI", f"not loaded: {error}", do)


def probe_software(device: torch.device, wanted: str) -> list[Finding]:
    """Build flags of this rank's libraries, and what is not installed. Not a collective.

    Args:
        device: device of this rank.
        wanted: device of the job: cpu, cuda or xpu. This host may lack it.
    """
    libraries, broken = load_libraries()
    further = _parallel(libraries, wanted) if libraries else [broken] if broken else []
    return [_gpus(device), *further, *probe_lacks(libraries)]


def _missing_packages() -> list[str]:
    return [name for name in LACKS if not installed(name)]


def probe_lacks(libraries: ParallelLibraries | None, missing: Sequence[str] | None = None) -> list[Finding]:
    """What is not installed, and what the lack costs. Not a collective.

    Args:
        libraries: the parallel libraries; None where one is broken.
        missing: names of packages that are not installed; None: look.
    """
    found = []
    if libraries and not libraries.mpi4py:
        costs = (
            "ranks meet over torch.distributed: the job script exports MASTER_ADDR where torchrun, SLURM and PBS do "
            "not tell it; norm.transport mpi and solver.gradients mpi are refused; pack and verify run on one node "
            "(--workers); pip install mpi4py, a wheel that finds the site's MPI, brings them"
        )
        found.append(Finding("slow", "mpi4py", "not installed", costs))
    if libraries and not libraries.horovod:
        text = "not installed: solver.gradients auto is torch (torch.distributed); only norm.transport horovod is lost"
        found.append(Finding("fine", "Horovod", text))
    for name in _missing_packages() if missing is None else missing:
        package, costs = LACKS[name]
        found.append(Finding("slow", package, "not installed", f"{costs}; pip install {package}"))
    return found


def judge_gradients(built: tuple[str, ...], device_type: str) -> Finding:
    """Whether a Horovod can send the gradients of a device, judged from plain values.

    Args:
        built: libraries that Horovod was built with.
        device_type: device of the job: cpu, cuda or xpu.
    """
    if fault := gpu_build_fault(device_type, built):
        return Finding("wrong", "Horovod", f"{fault}: training would fail", GPU_BUILD_REMEDY, lasting=True)
    text = f"Horovod built with {', '.join(built) or 'nothing'}"
    if is_gpu(device_type) and "nccl" not in built:
        costs = "gradients leave the GPU through host memory; HOROVOD_BUILD=nccl tools/setup_env.sh builds it with NCCL"
        return Finding("slow", "Horovod", f"{text}, job on GPUs", costs)
    return Finding("fine", "Horovod", text)


def probe_gradients(device_type: str) -> list[Finding]:
    """Faults that keep Horovod from sending the gradients of a device. Not a collective."""
    libraries, _ = load_libraries()
    found = [judge_gradients(libraries.horovod_built, device_type)] if libraries and libraries.horovod else []
    return [finding for finding in found if finding.verdict == "wrong"]


def _gpus(device: torch.device) -> Finding:
    kinds = [kind for kind in KINDS if _built_for(kind.type)]
    build = f"torch built for {' and '.join(kind.name for kind in kinds)}" if kinds else "torch built without GPUs"
    if kinds and kinds[0].type == "cuda" and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        build += f", {'RCCL' if torch.version.hip else 'NCCL'} {'.'.join(map(str, torch.cuda.nccl.version()))}"
    number = sum(kind.count() for kind in kinds)
    shown = f"{number} GPU(s) visible" if number else "no GPU visible"
    untried = "; never tried by this project" if is_gpu(device) and (torch.version.hip or device.type != "cuda") else ""
    return Finding("fine", "GPUs", f"{build}; {shown}; this job's device: {device.type}{untried}")


def _built_for(device_type: str) -> bool:
    """Whether the installed torch has a kind of GPU."""
    if device_type == "cuda":
        return bool(torch.version.cuda or torch.version.hip)
    return device_type == "xpu" and hasattr(torch, "xpu") and bool(torch.xpu._is_compiled())


def _parallel(libraries: ParallelLibraries, device_type: str) -> list[Finding]:
    built = f"Horovod built with {', '.join(libraries.horovod_built) or 'nothing'}"
    rebuild = "build Horovod for the MPI of the job: tools/setup_env.sh (make setup)"
    found = []
    if not libraries.mpi4py:
        return []
    if not libraries.horovod:
        pass  # probe_lacks says it
    elif "mpi" not in libraries.horovod_built or libraries.mpi_enabled is False:
        found.append(Finding("wrong", "Horovod", f"{built}; not running over MPI", rebuild))
    else:
        found.append(judge_gradients(libraries.horovod_built, device_type))
    if libraries.thread_level is None:
        found.append(Finding("fine", "MPI threads", "level known only under a launcher"))
    elif libraries.multiple and libraries.threads_supported is not False:
        found.append(Finding("fine", "MPI threads", libraries.thread_level))
    else:
        do = "use an MPI that grants MPI_THREAD_MULTIPLE, which mpi4py and Horovod in one process need"
        found.append(Finding("wrong", "MPI threads", libraries.thread_level, do))
    found.append(_gpu_memory(libraries.reads_gpu_memory, device_type))
    return found


def _gpu_memory(reads: bool | None, device_type: str) -> Finding:
    if reads is None:
        return Finding("fine", "CUDA-aware MPI", "known only under a launcher")
    aware = "MPI reads GPU memory" if reads else "MPI does not read GPU memory"
    needed = "; not needed on CPUs" if not is_gpu(device_type) else ""
    return Finding("fine", "CUDA-aware MPI", aware + (needed or "; messages over MPI pass through the host"))
