"""The state of a run on disk. A file is whole or not there, and reading it runs no code from it."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megdet_hpc.config import migrated
from megdet_hpc.errors import MachineError, UserError, is_machine_fault
from megdet_hpc.files import atomic_write, write_json

FORMAT_VERSION = 1
BEST = "best.json"
_NAME = re.compile(r"step_(\d+)\.pt")


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    found = [file for file in folder.glob("step_*.pt") if _NAME.fullmatch(file.name)]
    return sorted(found, key=step_of)


def step_of(file: Path) -> int:
    """Updates done at a checkpoint, from the name that `save_checkpoint` gave it."""
    match = _NAME.fullmatch(file.name)
    assert match, file
    return int(match[1])


def remove_unfinished(folder: Path) -> None:
    """Remove what a writer that was killed has left half written; for the run that holds the folder."""
    for file in folder.glob(".step_*.tmp"):
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Best:
    """The checkpoint of the highest AP so far, as best.json names it. Empty where there is no such file."""

    file: str = ""
    """Path of the checkpoint, from the folder of best.json."""
    step: int = 0
    AP: float = -math.inf
    AP50: float = -math.inf


def read_best(folder: Path) -> Best:
    """The best checkpoint of a run's folder, as long as its file is there."""
    try:
        best = Best(**json.loads((folder / BEST).read_bytes()))
    except (OSError, ValueError, TypeError):
        return Best()
    return best if best.file and (folder / best.file).is_file() else Best()


def note_best(folder: Path, checkpoint: Path, metrics: dict[str, float]) -> None:
    """Name a checkpoint below a run's folder in the run's best.json."""
    file = checkpoint.relative_to(folder).as_posix()
    best = Best(file, step_of(checkpoint), metrics["AP"], metrics["AP50"])
    write_json(folder / BEST, asdict(best))


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after some updates."""
    return f"step_{step:08d}.pt"


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    *,
    keep: int,
    spared: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write step_<step>.pt atomically, then delete this run's checkpoints older than the newest `keep`.

    Args:
        folder: the run's folder of checkpoints.
        step: updates done.
        state: tensors and plain Python values only, so that weights_only loading accepts it.
        keep: files to leave.
        spared: a file to leave besides them.
        check: raises where the folder is another run's by now; nothing of that one is touched then.

    Raises:
        OSError: disk full or no permission; nothing is lost.
    """
    path = folder / checkpoint_name(step)
    try:
        with atomic_write(path) as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
            check()  # after what takes long
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else error
        raise OSError(f"checkpoint {path}: cannot be written ({reason}); older ones are as they were") from error
    # files ahead of this step are not this run's, or damaged ones that it was resumed before
    written = [file for file in checkpoint_files(folder) if step_of(file) <= step]
    for old in written[:-keep]:
        if old != spared:
            check()
            old.unlink(missing_ok=True)
    return path


def checkpoint_of(path: Path, key: str = "checkpoint") -> Path:
    """The file that a path means: for a run's folder its best checkpoint, else its newest; for best.json the one named.

    Args:
        path: a file or a run's folder.
        key: key that names it, for messages.

    Raises:
        UserError: there is no such path, or a folder without checkpoints.
    """
    if path.name == BEST or path.is_dir():
        folder = path if path.is_dir() else path.parent
        if file := read_best(folder).file:
            return folder / file
        if path.name == BEST:
            raise UserError(f"{key} {path}: names no checkpoint that is there")
        if files := checkpoint_files(folder / "checkpoints") or checkpoint_files(folder):
            return files[-1]
        raise UserError(f"{key} {path}: is no run's folder: it has neither {BEST} nor checkpoints/step_NNNNNNNN.pt")
    return path


def load_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU with weights_only=True.

    Args:
        path: the file, or what stands for one (checkpoint_of).
        mmap: leave the tensors on disk until they are touched; their bytes are then not compared with their CRC-32.

    Raises:
        UserError: missing, cut off, damaged, or of another format version.
        MachineError: the file system failed.
    """
    path = checkpoint_of(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    try:
        if not mmap:
            _check_bytes(path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        if is_machine_fault(error):
            raise MachineError(f"checkpoint {path}: cannot be read ({error})") from error
        raise UserError(f"checkpoint {path}: damaged or not a checkpoint ({error})") from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"checkpoint {path}: format version {version!r}, this program reads {FORMAT_VERSION}")
    if "config" in state:
        state["config"] = migrated(state["config"])
    return state


def _check_bytes(path: Path) -> None:
    """Raise ValueError where a checkpoint's archive differs from its sums, at which torch does not look on reading."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} differs from its CRC-32")


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a folder; a damaged one is passed over with a message.

    Returns:
        None where the folder has no checkpoint.

    Raises:
        UserError: there are checkpoints and none is whole.
        MachineError: the file system failed; an older checkpoint would lose work.
    """
    files = checkpoint_files(folder)
    for path in reversed(files):
        try:
            return path, load_checkpoint(path)
        except MachineError:
            raise
        except UserError as error:
            print(f"{error}; trying the one before", flush=True)
    if files:
        raise UserError(f"{folder}: none of its {len(files)} checkpoint(s) is whole")
    return None
