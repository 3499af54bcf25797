"""The declared grids: which runs the study consists of, each named by a hash of its resolved configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config, to_dict
from megdet_hpc.errors import UserError
from megdet_hpc.study.scales import Scale, Settings

GRIDS = {
    "batch": "mini-batch with and without cross-GPU batch normalization, at the full and at half the scaled rate",
    "bn_size": "images that share batch statistics, at a fixed mini-batch",
    "epochs": "AP by epoch, from the smallest to the largest mini-batch",
    "warmup": "the largest mini-batch with and without warmup",
    "ranks": "wall time and steps of one epoch against real ranks",
}

# Where a run keeps its files and how long it may take at once change no number in it.
_PLACES = ("output", "resume", "max_minutes", "watchdog_minutes", "device")


@dataclass(frozen=True)
class Run:
    """A configuration to train once, whichever grids show it."""

    name: str
    config: Config
    """Resolved but for its places: data.train, data.val, model.backbone_weights and output."""
    ranks: int = 0
    """Real ranks under mpirun; 0: one process without launcher, which may emulate ranks."""
    data: str = ""
    """What its data and first weights are, as text."""

    @cached_property
    def digest(self) -> str:
        """Eight hexadecimal digits of everything that decides the result."""
        config = {key: value for key, value in to_dict(self.config).items() if key not in _PLACES}
        text = json.dumps([config, self.ranks, self.data], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.digest}"

    @property
    def global_batch(self) -> int:
        """Images of one update."""
        return self.config.data.images_per_rank * (self.config.emulate.ranks or self.ranks or 1)


@dataclass(frozen=True)
class Cell:
    """A run's place in a grid: its row's first columns."""

    grid: str
    columns: dict[str, Any]
    run: Run


def with_settings(config: Config, settings: Settings) -> Config:
    """The configuration with some keys changed.

    Args:
        config: any.
        settings: dotted keys to values of the fields' own types.

    Raises:
        UserError: an unknown key, or values that do not fit.
    """
    changed: Config = _replaced(config, [(key.split("."), value, key) for key, value in settings.items()])
    return changed


def _replaced(part: Any, changes: list[tuple[list[str], Any, str]]) -> Any:
    """All changes of one part at once, since only together they may fit."""
    new: dict[str, Any] = {}
    inner: dict[str, list[tuple[list[str], Any, str]]] = {}
    for path, value, key in changes:
        if path[0] not in {field.name for field in dataclasses.fields(part)}:
            raise UserError(f"{key}: the configuration has no such key")
        if len(path) == 1:
            new[path[0]] = value
        else:
            inner.setdefault(path[0], []).append((path[1:], value, key))
    new.update({name: _replaced(getattr(part, name), own) for name, own in inner.items()})
    return dataclasses.replace(part, **new)


def base_config(scale: Scale) -> Config:
    """The scale's configuration."""
    config, _ = parse_config(config_parser("megdet_hpc.study", ""), ["--config", scale.config])
    return with_settings(config, scale.settings)


def data_text(scale: Scale) -> str:
    """What a scale's data and first weights are, for the hash of its runs."""
    return f"{scale.name} {scale.shapes} {scale.pretraining}"


def pretraining_run(scale: Scale) -> Run | None:
    """The run whose backbone all others begin with; None where the user brings weights."""
    if not scale.pretraining:
        return None
    shapes, settings = scale.pretraining
    return Run("pretraining", with_settings(base_config(scale), {**settings, "norm.size": 0}), 0, str(shapes))


def expand(scale: Scale, names: list[str], further: Settings | None = None, inputs: str = "") -> list[Cell]:
    """All cells of some grids.

    Args:
        scale: size of the study.
        names: some keys of GRIDS.
        further: changes to all runs, such as {"seed": 1}.
        inputs: what packs and weights the user names hold, as text, for the hash.

    Returns:
        Cells in the order of their tables; cells with equal settings hold equal runs.

    Raises:
        UserError: an unknown grid, or settings that do not fit.
    """
    unknown = [name for name in names if name not in GRIDS]
    if unknown:
        raise UserError(f"grid {unknown[0]}: accepted are all, {', '.join(GRIDS)}")
    declare = _Declaration(scale, with_settings(base_config(scale), further or {}), data_text(scale) + inputs)
    return [cell for name in names for cell in getattr(declare, name)()]


def distinct(cells: list[Cell]) -> list[Run]:
    """Each run once, those that the trainer emulates before those on real ranks."""
    runs = {cell.run.digest: cell.run for cell in cells}
    return sorted(runs.values(), key=lambda run: run.ranks > 0)


class _Declaration:
    """One method per grid."""

    def __init__(self, scale: Scale, base: Config, data: str) -> None:
        self.scale, self.base, self.data = scale, base, data

    def batch(self) -> list[Cell]:
        return [
            Cell("batch", {"batch": batch, "norm": norm, "rate": rate}, self._run(batch, norm, rate=rate))
            for norm in ("cgbn", "frozen")
            for rate in (1.0, 0.5)
            for batch in self.scale.batches
        ]

    def bn_size(self) -> list[Cell]:
        batch = self.scale.bn_batch
        sizes = [size for size in self.scale.bn_sizes if size <= batch]
        return [Cell("bn_size", {"bn_size": n, "batch": batch}, self._run(batch, "cgbn", n)) for n in sizes]

    def epochs(self) -> list[Cell]:
        return [Cell("epochs", {"batch": batch}, self._run(batch, "cgbn")) for batch in self.scale.batches]

    def warmup(self) -> list[Cell]:
        batch = max(self.scale.batches)
        return [
            Cell("warmup", {"norm": norm, "warmup": warm, "batch": batch}, self._run(batch, norm, warmup=warm))
            for norm in ("cgbn", "frozen")
            for warm in (True, False)
        ]

    def ranks(self) -> list[Cell]:
        settings: Settings = {
            "norm.size": 0,
            "data.images_per_rank": self.scale.rank_images,
            "solver.epochs": 1.0,
            "evaluation.every_epochs": 0.0,
            "data.val": None,
            "checkpoints.every_epochs": 0.0,
        }
        config = with_settings(self.base, settings)
        runs = [Run(f"ranks{number}", config, number, self.data) for number in self.scale.ranks]
        return [Cell("ranks", {"ranks": run.ranks, "batch": run.global_batch}, run) for run in runs]

    def _run(self, batch: int, norm: str, bn_size: int = 0, *, rate: float = 1.0, warmup: bool = True) -> Run:
        """One emulated run. With frozen statistics images do not meet, so one rank holds them all where it may."""
        size = min(bn_size or self.scale.best_bn_size, batch)
        per_rank = self.scale.images_per_rank or (size if norm == "cgbn" else batch)
        num_ranks = batch // per_rank
        settings: Settings = {
            "norm.kind": norm,
            "norm.size": size if norm == "cgbn" else 0,
            "data.images_per_rank": per_rank,
            "emulate.ranks": num_ranks if num_ranks > 1 else 0,
            "solver.base_lr": self.base.solver.base_lr * rate,
        }
        if not warmup:
            settings["solver.warmup_epochs"] = 0.0
        name = f"{norm}{size if norm == 'cgbn' else ''}-b{batch}-lr{rate:g}{'' if warmup else '-nowarmup'}"
        return Run(name, with_settings(self.base, settings), 0, self.data)


def estimated_seconds(run: Run, scale: Scale) -> float | None:
    """What a run takes on one idle core by the scale's speed; None where that was not measured."""
    if not scale.speed:
        return None
    speed, config = scale.speed, run.config
    steps = math.ceil(scale.num_images / run.global_batch) * config.solver.epochs
    steps = min(steps, config.max_steps or steps)
    virtual = config.emulate.ranks or 1
    pass_seconds = speed.per_micro_batch + speed.per_image * config.data.images_per_rank
    # several emulated groups count boxes in a forward pass of their own (engine/emulate.py)
    counting = 4 / 3 if virtual > 1 and run.config.norm.size < run.global_batch else 1
    every = config.evaluation.every_epochs
    evaluations = (config.solver.epochs // every if every else 1) if config.data.val else 0
    return speed.start + steps * virtual * pass_seconds * counting + evaluations * speed.per_evaluation
