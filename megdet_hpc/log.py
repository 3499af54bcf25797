"""The log of a run: JSON lines, TensorBoard, and lines on rank 0's terminal."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megdet_hpc.files import atomic_write

# Time between two states of a progress bar in a log file, which keeps them all [seconds].
_LOG_FILE_INTERVAL = 10.0


def progress_bar(iterable: Any = None, **keywords: Any) -> Any:
    """tqdm's bar on standard error. In a log file it is redrawn seldom."""
    interval = 0.2 if sys.stderr.isatty() else _LOG_FILE_INTERVAL
    return tqdm(iterable, mininterval=interval, maxinterval=2 * interval, dynamic_ncols=True, **keywords)


class MetricsLog:
    """The metrics of a run: one JSON object a line in metrics.jsonl, and TensorBoard scalars. Rank 0 only.

    A resumed run drops the lines of the steps that it will repeat. Each line is on disk before the run goes on, so a
    checkpoint never exists without the lines before it.

    Args:
        folder: folder of the run.
        first_step: number of updates that are done.
        check: function called before each write; it raises where another run owns the folder now.
    """

    def __init__(self, folder: Path, first_step: int, check: Callable[[], None] = lambda: None) -> None:
        check()
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= first_step]
        with atomic_write(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        self._check, self._kept = check, kept
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open for the length of the run
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log numbers of the state after `step` updates. Where a number has a unit, the key names it.

        NaN stands for a metric that does not exist: null in the file, no point in TensorBoard.
        """
        self._check()
        known = {key: None if math.isnan(value) else value for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        os.fsync(self._file.fileno())
        for key, value in known.items():
            if value is not None:
                self._board.add_scalar(key, value, step)

    def validation(self, step: int) -> dict[str, float]:
        """The scores that an earlier start of this run logged at this step; empty if there are none."""
        rows = [row for row in self._kept if row["step"] == step]
        found = {key[4:]: value for row in rows for key, value in row.items() if key.startswith("val/")}
        return {key: math.nan if value is None else value for key, value in found.items()}

    def close(self) -> None:
        self._file.close()
        self._board.close()


def config_files(folder: Path) -> list[tuple[int, Path]]:
    """The configuration files of a run's starts, oldest first, as pairs (updates done at that start, file)."""
    first = folder / "config.yaml"
    later = sorted(folder.glob("config-*.yaml"))
    numbered = [(int(file.stem[7:]), file) for file in later if file.stem[7:].isdigit()]
    return [(0, first)] * first.is_file() + numbered


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A line that a kill or a power cut tore is left out.

    A metric that does not exist is None. So is pycocotools' -1, which older runs logged for it.
    """
    rows: list[dict[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append({key: None if value == -1 and key.startswith("val/") else value for key, value in row.items()})
    return rows
