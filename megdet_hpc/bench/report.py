"""A benchmark's report as tables on the terminal and as JSON."""

from __future__ import annotations

import argparse
import os
import platform
import socket
from pathlib import Path
from typing import Any

import torch
import torchvision

from megdet_hpc.devices import is_gpu, kind_of
from megdet_hpc.parallel.runtime import Runtime


def environment(device: torch.device) -> dict[str, Any]:
    """The conditions of a measurement: processor or GPU, threads, versions."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "host": socket.gethostname(),
        "processor": processor,
        "cores": os.cpu_count(),
        "gpu": kind_of(device.type).module.get_device_name(device) if is_gpu(device) else None,
        "threads_per_rank": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def heading(arguments: argparse.Namespace, runtime: Runtime, device: torch.device) -> dict[str, Any]:
    """The beginning of a report: where it was measured, on which ranks, with which options."""
    given = {key: value for key, value in vars(arguments).items() if key not in ("body", "benchmark", "json")}
    return {"environment": environment(device), "ranks": runtime.description, "options": given}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with equal keys as text in aligned columns: words to the left, numbers to the right, None as a dash."""
    keys = list(rows[0])

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [keys, *([cell(row[key]) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(keys))]
    left = [isinstance(rows[0][key], str) for key in keys]
    return "\n".join(
        "  ".join(
            text.ljust(width) if to_left else text.rjust(width)
            for text, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


def print_report(report: dict[str, Any]) -> None:
    """Print a report. A list of rows is a table under its title, anything else is `key: value`."""
    for title, content in report.items():
        if isinstance(content, list) and content:
            print(f"\n{title}\n{table(content)}")
        elif isinstance(content, dict):
            print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in content.items() if value is not None))
        elif content:
            print(f"{title}: {content}")
