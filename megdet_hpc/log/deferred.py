"""A run whose checkpoints another process scores: which ones it leaves, and what became of each.

Two processes write into the run's folder, so each has a file of its own, which it replaces as a whole. The training
writes `deferred/due.json`: the checkpoints to be scored. The follower (`megdet evaluate --follow`) writes
`deferred/scores.json`: their scores. Whoever reads the metrics gets the rows of both.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megdet_hpc.errors import MachineError, UserError, file_error, is_machine_fault
from megdet_hpc.files import write_json

FOLDER = "deferred"
"""Folder in the run's: both files, and the mark of the follower that holds it (owner.py)."""
_DUE, _SCORES = "due.json", "scores.json"
_STALE_TRIES, _STALE_SECONDS = 3, 0.1


@dataclass(frozen=True)
class Due:
    """A checkpoint that is to be scored."""

    step: int
    epoch: float
    file: str
    """Path of the checkpoint, from the run's folder."""
    key: str
    """Sum of the checkpoint's content. A step that is repeated with another result has another one."""
    last: bool = False
    """Whether the run ended with it."""


def content_key(path: Path) -> str:
    """A sum of a checkpoint's content, from the CRC-32 of each part, which its archive lists.

    Raises:
        OSError: there is no such file.
        MachineError: the file system failed, which says nothing of the file.
        zipfile.BadZipFile: it is no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [(part.filename, part.CRC, part.file_size) for part in archive.infolist()]
    except OSError as error:
        if is_machine_fault(error):
            raise MachineError(f"checkpoint {path}: cannot be read ({error.strerror})") from error
        raise
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where it does not exist yet. Whoever writes it anew takes them over.

    Raises:
        UserError: it cannot be read, or is damaged. Its rows would be lost with the next write.
    """
    try:
        content = json.loads(_content(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise file_error(error, f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); copy it again, or remove it to lose what it holds") from error
    if not isinstance(content, list):
        raise UserError(f"{path}: holds no list; copy it again, or remove it to lose what it holds")
    return content


def _content(path: Path) -> bytes:
    """The bytes of a file. A file server may call it stale where another host has just replaced it."""
    for _ in range(_STALE_TRIES):
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            time.sleep(_STALE_SECONDS)
    return path.read_bytes()


def read_due(run: Path) -> list[Due]:
    """The checkpoints that a run left to be scored, oldest first.

    Raises:
        UserError: the list cannot be read.
    """
    return [Due(**row) for row in _read(run / FOLDER / _DUE)]


def _settled(run: Path) -> list[tuple[Due, dict[str, Any] | None]]:
    """Each checkpoint, oldest first, with the row of what became of it; None while it waits.

    A row that belongs to other content of the file does not count.
    """
    # the scores are read first: whoever sees a checkpoint as scored then sees all that was written before
    rows = {row["step"]: row for row in _read(run / FOLDER / _SCORES)}
    found = [(due, rows.get(due.step)) for due in read_due(run)]
    return [(due, row if row and row.get("key") == due.key else None) for due, row in found]


def waiting(run: Path) -> list[Due]:
    """The checkpoints that are not scored yet, oldest first."""
    return [due for due, row in _settled(run) if row is None]


def score_rows(run: Path) -> list[dict[str, Any]]:
    """The scores so far as rows of metrics.jsonl, oldest first."""
    rows = [row for _, row in _settled(run) if row is not None and "lost" not in row]
    return [{key: value for key, value in row.items() if key != "key"} for row in rows]


def leave(run: Path, due: Due, check: Callable[[], None] = lambda: None) -> None:
    """Leave a checkpoint to be scored. Called by the training alone.

    Args:
        run: folder of the run.
        due: the checkpoint.
        check: raises where another start owns the run now.
    """
    others = [other for other in read_due(run) if other.step != due.step]
    _write_due(run, [*others, due], check)


def repeat_after(run: Path, step: int, check: Callable[[], None] = lambda: None) -> None:
    """Forget the checkpoints after a step, which the training will write again. Called by the training alone."""
    due = read_due(run)
    if any(other.step > step for other in due):
        _write_due(run, [other for other in due if other.step <= step], check)


def _write_due(run: Path, due: list[Due], check: Callable[[], None]) -> None:
    check()
    write_json(run / FOLDER / _DUE, [asdict(one) for one in sorted(due, key=lambda one: one.step)])


def settle(run: Path, due: Due, metrics: Mapping[str, float], check: Callable[[], None] = lambda: None) -> None:
    """Write the scores of a checkpoint. Called by the follower alone.

    Args:
        run: folder of the run.
        due: the checkpoint.
        metrics: numbers by their names in metrics.jsonl; NaN for one that does not exist.
        check: raises where another follower has taken over.
    """
    known = {key: None if math.isnan(value) else value for key, value in metrics.items()}
    _write_score(run, {"step": due.step, "key": due.key, "epoch": due.epoch, **known}, check)


def give_up(run: Path, due: Due, why: str, check: Callable[[], None] = lambda: None) -> None:
    """Note that a checkpoint cannot be scored. Called by the follower alone."""
    _write_score(run, {"step": due.step, "key": due.key, "lost": why}, check)


def _write_score(run: Path, row: dict[str, Any], check: Callable[[], None]) -> None:
    others = [other for other in _read(run / FOLDER / _SCORES) if other["step"] != row["step"]]
    check()
    write_json(run / FOLDER / _SCORES, sorted([*others, row], key=lambda one: int(one["step"])))
