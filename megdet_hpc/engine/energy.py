"""The energy that a run takes, from the counters of the processors (RAPL) and of NVIDIA's GPUs (NVML).

RAPL counts a host's packages and, where it can, their memory; other programs of the host are in it. NVML counts a
board. Neither has power supplies, fans, network or disks. Most systems let root alone read RAPL, unless the site allows
it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from megdet_hpc.devices import is_gpu

_POWERCAP = Path("/sys/class/powercap")
_MICRO, _MILLI = 1e-6, 1e-3

Read = Callable[[], float]


class EnergyCounter:
    """A counter that may start again from 0.

    Args:
        read: gives its value [J].
        period: value at which it starts again [J]; infinity if it does not.
    """

    def __init__(self, read: Read, period: float = float("inf")) -> None:
        self._read, self._period = read, period
        self._last, self._sum = read(), 0.0

    def joules(self) -> float:
        """The energy since this object was made [J]. Call it once a period at least."""
        value = self._read()
        step = value - self._last
        self._sum += step if step >= 0 else step + self._period
        self._last = value
        return self._sum


class EnergyMeter:
    """The counters that this rank reads: its GPU's, and on one rank of a host the processors'.

    Attributes:
        text: what is read here, or why nothing is.

    Args:
        device: device of the rank.
        first_on_host: whether no rank of a lower number is on this host.
        powercap: folder of Linux's RAPL counters.
    """

    def __init__(self, device: torch.device, *, first_on_host: bool, powercap: Path = _POWERCAP) -> None:
        self._cpu, cpu_text = _rapl(powercap) if first_on_host else ([], "")
        self._gpu, gpu_text = _nvml(device)
        found = "; ".join(text for text in (cpu_text, gpu_text) if text)
        self.text = found if self._cpu or self._gpu else f"not readable here ({found})"

    def joules(self) -> tuple[float | None, float | None]:
        """The energy of processors and of the GPU since this object was made [J]; None where it cannot be read."""
        try:
            return _sum(self._cpu), _sum(self._gpu)
        except Exception:  # also pynvml's errors; a counter that fails must not end a training
            return None, None


def _sum(counters: Sequence[EnergyCounter]) -> float | None:
    return sum(counter.joules() for counter in counters) if counters else None


def _rapl(folder: Path) -> tuple[list[EnergyCounter], str]:
    """Counters of packages and of their memory, and a text. psys, core and uncore are parts of others, or hold them."""
    zones = sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else []
    counters, names = [], []
    try:
        for zone in zones:
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            period = float((zone / "max_energy_range_uj").read_text()) * _MICRO
            counters.append(EnergyCounter(_file_reader(zone / "energy_uj"), period))
            names.append(name)
    except (OSError, ValueError) as error:
        return [], f"RAPL: {error}"
    return counters, f"RAPL: {', '.join(names)} of each host" if names else f"RAPL: no counters in {folder}"


def _file_reader(file: Path) -> Read:
    return lambda: float(file.read_text()) * _MICRO


def _nvml(device: torch.device) -> tuple[list[EnergyCounter], str]:
    if device.type != "cuda" or torch.version.hip:
        return [], "NVML: NVIDIA's GPUs alone" if is_gpu(device) else ""
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        counter = EnergyCounter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) * _MILLI)
    except ImportError:
        return [], "NVML: pip install nvidia-ml-py"
    except Exception as error:  # pynvml's errors, or a torch that knows no uuid
        return [], f"NVML: {error}"
    return [counter], "NVML: the GPU of each rank"


def energy_row(found: Iterable[tuple[float | None, float | None]], images: float) -> dict[str, float]:
    """Energy of all ranks for a row of metrics.jsonl [J]; without the parts that no rank could read."""
    cpu, gpu = ([value for value in part if value is not None] for part in zip(*found, strict=True))
    row = {f"energy_{name}_j": sum(part) for name, part in (("cpu", cpu), ("gpu", gpu)) if part}
    return row | {"energy_per_image_j": sum(row.values()) / images} if row else {}


def energy_line(rows: Iterable[dict[str, Any]]) -> str:
    """A line on the energy of a run's steps, all its starts together; "" if none of it was read."""
    sums, images = {"energy_cpu_j": 0.0, "energy_gpu_j": 0.0}, 0.0
    for row in rows:
        joules = sum(row.get(key) or 0.0 for key in sums)
        if joules and row.get("energy_per_image_j"):
            images += joules / row["energy_per_image_j"]
            for key in sums:
                sums[key] += row.get(key) or 0.0
    if not images:
        return ""
    parts = [f"{value / 1e3:,.4g} kJ of {key.split('_')[1].upper()}s" for key, value in sums.items() if value]
    return f"energy of the steps: {' + '.join(parts)} = {sum(sums.values()) / images:.3g} J an image"
