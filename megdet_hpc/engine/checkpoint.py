"""The state of a run on disk. Files are written atomically, and reading one runs no code from it."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megdet_hpc.config import migrated
from megdet_hpc.errors import MachineError, UserError, is_machine_fault
from megdet_hpc.files import atomic_write, write_json

FORMAT_VERSION = 1
BEST = "best.json"
RAW, EMA = "raw", "ema"
"""The weights of a checkpoint: as the last update left them, and their moving average, where the run made one."""
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
    """Remove unfinished files of a writer that was killed. Only the run that holds the folder may call it."""
    for file in folder.glob(".step_*.tmp"):
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Best:
    """The checkpoint of the highest AP so far, as best.json names it. Empty if there is no such file."""

    file: str = ""
    """Path of the checkpoint, from the folder of best.json."""
    step: int = 0
    AP: float = -math.inf
    AP50: float = -math.inf
    weights: str = RAW
    """Weights that have this AP: raw, or ema for the averaged ones."""
    chosen_by: str = "AP"
    """Name of the score that chose it, without a prefix."""
    score: float | None = None
    """Value of that score; None: that of AP."""

    @property
    def highest(self) -> float:
        """The score that chose it."""
        return self.AP if self.score is None else self.score

    def highest_by(self, name: str) -> float:
        """The score that chose it; minus infinity if another metric chose it.

        Args:
            name: name of a score, without a prefix.
        """
        return self.highest if self.chosen_by == name else -math.inf

    @property
    def metric(self) -> str:
        """Name of the score that chose it in the metrics."""
        return f"{EMA}_{self.chosen_by}" if self.weights == EMA else self.chosen_by


def read_best(folder: Path) -> Best:
    """The best checkpoint of a run's folder, as long as its file is there."""
    try:
        best = Best(**json.loads((folder / BEST).read_bytes()))
    except (OSError, ValueError, TypeError):
        return Best()
    return best if best.file and (folder / best.file).is_file() else Best()


def note_best(folder: Path, checkpoint: Path, metrics: dict[str, float], prefix: str = "", by: str = "AP") -> None:
    """Name a checkpoint below a run's folder in the run's best.json.

    Args:
        folder: folder of the run.
        checkpoint: file in it.
        metrics: scores of that step.
        prefix: prefix of those that chose it; "" for those of the raw weights.
        by: name of the score that chose it, without the prefix.
    """
    file, weights = checkpoint.relative_to(folder).as_posix(), EMA if prefix else RAW
    best = Best(file, step_of(checkpoint), metrics[f"{prefix}AP"], metrics[f"{prefix}AP50"], weights)
    if by == "AP":
        return write_json(folder / BEST, {k: v for k, v in asdict(best).items() if k not in ("chosen_by", "score")})
    write_json(folder / BEST, asdict(replace(best, chosen_by=by, score=metrics[f"{prefix}{by}"])))


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after some updates."""
    return f"step_{step:08d}.pt"


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    *,
    keep: int,
    spared: Collection[Path] = (),
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write step_<step>.pt atomically, then delete this run's checkpoints older than the newest `keep`.

    Args:
        folder: the run's folder of checkpoints.
        step: updates done.
        state: tensors and plain Python values only, so that weights_only loading accepts it.
        keep: number of newest files to keep.
        spared: further files to keep.
        check: raises if another start has taken the folder. Then no file is replaced or deleted.

    Raises:
        OSError: the disk is full, or permission is missing. Older checkpoints stay.
    """
    path = folder / checkpoint_name(step)
    try:
        with atomic_write(path) as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
            check()  # after the long write
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else error
        raise OSError(f"checkpoint {path}: cannot be written ({reason}); older ones are as they were") from error
    prune_checkpoints(folder, step, keep, spared, check)
    return path


def prune_checkpoints(
    folder: Path, step: int, keep: int, spared: Collection[Path], check: Callable[[], None] = lambda: None
) -> None:
    """Delete a run's checkpoints except the newest `keep` and those that are spared; arguments of `save_checkpoint`."""
    # files of later steps belong to another run, or are damaged ones that could not be renamed
    written = [file for file in checkpoint_files(folder) if step_of(file) <= step]
    for old in written[:-keep]:
        if old not in spared:
            check()
            old.unlink(missing_ok=True)


def checkpoint_of(path: Path, key: str = "checkpoint") -> Path:
    """The checkpoint file that a path stands for.

    A run's folder stands for its best checkpoint, or without one for its newest. best.json stands for the file that it
    names.

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
        path: the file, or a path that stands for it (checkpoint_of).
        mmap: read tensors from disk only when they are used. Their bytes are then not compared with their CRC-32.

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


def with_weights(state: dict[str, Any], choice: str | None, source: str) -> dict[str, Any]:
    """A checkpoint's content with the weights to use under `model`, and what they are under `weights`.

    The optimizer's state is left out, which only training needs, and which is as large as the weights or larger.

    Args:
        state: content of the checkpoint.
        choice: raw or ema; None: the averaged weights where there are any.
        source: name of the checkpoint in messages.

    Raises:
        UserError: averaged weights are asked for, and there are none.
    """
    averaged = state.get("ema")
    if choice == EMA and averaged is None:
        raise UserError(f"{source}: has no averaged weights; --weights {RAW} takes those it has (solver.ema_decay)")
    taken = choice or (EMA if averaged else RAW)
    rest = {key: value for key, value in state.items() if key not in ("ema", "optimizer")}
    model = averaged["model"] if averaged and taken == EMA else state["model"]
    return {**rest, "model": model, "weights": taken, "has_ema": averaged is not None}


def weights_line(state: dict[str, Any]) -> str:
    """A line for the user on the weights that `with_weights` took; "" where a checkpoint has only one kind."""
    if not state["has_ema"]:
        return ""
    other = RAW if state["weights"] == EMA else EMA
    kind = "the moving average" if state["weights"] == EMA else "those of the last update"
    return f"weights: {state['weights']}, {kind} (--weights {other} takes the others)\n"


def _check_bytes(path: Path) -> None:
    """Raise ValueError if a checkpoint's archive differs from its CRC-32, which torch does not compare on reading."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} differs from its CRC-32")


def _set_aside(damaged: Collection[Path], check: Callable[[], None]) -> None:
    """Rename damaged checkpoints, so that none counts as the newest. `check` raises if the run has lost the folder."""
    for path in damaged:
        check()
        try:
            path.rename(path.with_name(f"{path.name}.damaged"))
        except OSError as error:
            print(f"{path}: is damaged and cannot be renamed ({error.strerror}); remove it", flush=True)
        else:
            print(f"{path}: renamed to {path.name}.damaged", flush=True)


def load_newest(folder: Path, check: Callable[[], None] | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a folder. Damaged ones are skipped with a message.

    Args:
        folder: a run's folder of checkpoints.
        check: raises if another start has taken the folder; None: the folder is only read. The run that holds the
            folder renames damaged files to NAME.damaged, so that they hide no later checkpoint from whoever counts.

    Returns:
        None where the folder has no checkpoint.

    Raises:
        UserError: there are checkpoints and none is whole.
        MachineError: the file system failed; an older checkpoint would lose work.
    """
    files = checkpoint_files(folder)
    damaged: list[Path] = []
    for path in reversed(files):
        try:
            state = load_checkpoint(path)
        except MachineError:
            raise
        except UserError as error:
            print(f"{error}; trying the one before", flush=True)
            damaged.append(path)
            continue
        if check and damaged:
            _set_aside(damaged, check)
        return path, state
    if files:
        raise UserError(f"{folder}: none of its {len(files)} checkpoint(s) is whole")
    return None
