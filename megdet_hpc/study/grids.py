"""The declared grids: the runs of a study. A run is named by a hash of its resolved configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config, flatten, to_dict
from megdet_hpc.config.models import DETECTORS, BackboneConfig, ModelConfig
from megdet_hpc.errors import UserError
from megdet_hpc.study.scales import Scale, Settings

GRIDS = {
    "batch": "mini-batch with and without cross-GPU batch normalization, at the full and at half the scaled rate",
    "bn_size": "images that share batch statistics, at a fixed mini-batch",
    "epochs": "AP by epoch, from the smallest to the largest mini-batch",
    "warmup": "the largest mini-batch with and without warmup",
    "ranks": "wall time and steps of one epoch against real ranks",
    "claim": "the paper's claim: small and large mini-batches with CGBN, fixed statistics, statistics of one rank",
    "warmups": "the large mini-batch with warmups of several lengths and forms",
    "rates": "the large mini-batch by the exponent of the scaling rule, the small one also at twice its rate",
    "solvers": "SGD, AGVM, LARS and LAMB at large mini-batches, three or four rates each",
    "causes": "if the large mini-batch is behind: more updates, a lower rate, as few updates of the small one",
    "modules": "backbone x head x FPN levels x input from scratch, ranked by AP and by time of an image",
}
PAPER_GRIDS = ("batch", "bn_size", "epochs", "warmup", "ranks")
"""The grids that `all` stands for: the paper's comparisons."""

SOLVER_RATES = {"lars": (0.5, 2.0, 8.0), "lamb": (0.00125, 0.005, 0.02, 0.08)}
"""Rates of the grid `solvers` at 256 images: our own sweep by factors of 4. Other mini-batches follow the root rule, as
LAMB's authors have it (You et al., ICLR 2020)."""
SOLVER_EXPONENTS = (1.0, 0.75, 0.5)
"""Exponents of the scaling rule that give SGD, alone and with AGVM, its three rates there."""
CASES: dict[str, tuple[bool, float, float]] = {
    "small": (False, 1.0, 1.0),
    "large": (True, 1.0, 1.0),
    "2x epochs": (True, 2.0, 1.0),
    "4x epochs": (True, 4.0, 1.0),
    "half rate": (True, 1.0, 0.5),
    "quarter rate": (True, 1.0, 0.25),
    "4x epochs, half rate": (True, 4.0, 0.5),
    "small, updates of large": (False, 0.0, 1.0),
}
"""Cases of the grid `causes`: whether the mini-batch is the large one, its epochs over the scale's (0: as few as make
the updates of the large one), and its rate over the configuration's."""

# Places in the queue of the runs that tell most; all others come after them.
_CORE, _RIVAL, _FURTHER, _LAST = range(4)

LEVELS = {"two_stage": ((2, 6), (3, 6)), "retinanet": ((3, 7), (4, 7))}
"""Levels of the FPN in the grid `modules`: those of the papers, and without the finest, which costs most."""
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnext50_32x4d")
HEADS: dict[str, tuple[str, Settings]] = {
    "rcnn": ("faster_rcnn", {}),
    "retinanet": ("retinanet", {}),
    "cascade2": ("cascade_rcnn", {"stage_ious": (0.5, 0.6)}),
    "cascade3": ("cascade_rcnn", {"stage_ious": (0.5, 0.6, 0.7)}),
    "cascade4": ("cascade_rcnn", {"stage_ious": (0.5, 0.6, 0.7, 0.8)}),
}
"""Heads of the grid `modules`: the detector family, and its keys."""

_ONE_PASS: Settings = {"solver.accumulate": 1, "solver.grow_to": 0}
"""Settings with which the images of all ranks, real or emulated, are those of an update."""

PLACES = ("output", "resume", "max_minutes", "watchdog_minutes", "device")
"""Keys that change no result: places of files, time limits and the device."""


@dataclass(frozen=True)
class Run:
    """A configuration to train once, even if several grids show it."""

    name: str
    config: Config
    """Resolved, except for paths: data.train, data.val, model.backbone_weights and output."""
    ranks: int = 0
    """Real ranks under mpirun; 0: one process without launcher, which may emulate ranks."""
    data: str = ""
    """Data and first weights, as text."""
    from_scratch: bool = False
    """Whether the run begins with random weights; all others begin with the study's backbone."""

    @cached_property
    def digest(self) -> str:
        """Eight hexadecimal digits of everything that decides the result.

        A key that has its default does not count. So a version with further keys goes on with an earlier one's runs.
        """
        default = flatten(to_dict(Config(model=type(self.config.model)())))
        own = flatten(to_dict(self.config))
        config = {key: value for key, value in own.items() if key not in PLACES and value != default[key]}
        config["model.detector"] = self.config.model.detector
        text = json.dumps([config, self.ranks, self.data], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{self.name}-{self.digest}"

    @property
    def global_batch(self) -> int:
        """Images of one update."""
        config = self.config
        return config.data.images_per_rank * (config.emulate.ranks or self.ranks or 1) * config.solver.accumulate


@dataclass(frozen=True)
class Cell:
    """A run's row in a grid: the first columns."""

    grid: str
    columns: dict[str, Any]
    run: Run
    turn: int = _LAST
    """Place in the queue, if the study trains the most telling runs first."""
    num_categories: int = 0
    """Categories of the data set, where the grid's table counts multiplications; else 0."""


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
    """Make all changes of one part at once, since they may be valid only together."""
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


def begins_from_scratch(scale: Scale) -> bool:
    """Whether the backbone of the scale's detector takes no weights, so that all runs begin with random ones."""
    return not isinstance(base_config(scale).model, BackboneConfig)


def data_text(scale: Scale) -> str:
    """Data and first weights of a scale as text, for the hash of its runs."""
    return f"{scale.name} {scale.shapes} {scale.pretraining}"


def pretraining_run(scale: Scale) -> Run | None:
    """The run that trains the first backbone of all others; None if the user names a file of weights."""
    if not scale.pretraining:
        return None
    shapes, settings = scale.pretraining
    return Run(scale.pretraining_name, with_settings(base_config(scale), {**settings, "norm.size": 0}), 0, str(shapes))


def expand(
    scale: Scale, names: list[str], further: Settings | None = None, inputs: str = "", packs: str = ""
) -> list[Cell]:
    """All cells of some grids.

    Args:
        scale: size of the study.
        names: some keys of GRIDS.
        further: changes to all runs, such as {"seed": 1}.
        inputs: hashes of the packs and weights that the user names.
        packs: hashes of the packs alone, for the runs from scratch.

    Returns:
        Cells in the order of their tables; cells with equal settings hold equal runs.

    Raises:
        UserError: an unknown grid, or settings that do not fit.
    """
    unknown = [name for name in names if name not in GRIDS]
    if unknown:
        raise UserError(f"grid {unknown[0]}: accepted are all, {', '.join(GRIDS)}")
    declare = _Declaration(scale, with_settings(base_config(scale), further or {}), data_text(scale) + inputs, packs)
    return [cell for name in names for cell in getattr(declare, name)()]


def distinct(cells: list[Cell]) -> list[Run]:
    """Each run once; runs on emulated ranks come before those on real ranks."""
    return queue([cells])


def queue(cells_of_seeds: list[list[Cell]]) -> list[Run]:
    """Each run once, the most telling first: the claim with the first seed, then with the others, then all else.

    Args:
        cells_of_seeds: cells that expand() gave for each seed.
    """
    rows = [
        (cell.run.ranks > 0, _place(cell.turn, number), number, cell.run)
        for number, cells in enumerate(cells_of_seeds)
        for cell in cells
    ]
    return list({row[-1].digest: row[-1] for row in sorted(rows, key=lambda row: row[:-1])}.values())


def named_like(runs: list[Run], patterns: list[str]) -> list[Run]:
    """The runs whose folder's name fits one of the shell patterns; without patterns all.

    Raises:
        UserError: no run fits a pattern.
    """
    for pattern in patterns:
        if not any(fnmatchcase(run.folder, pattern) for run in runs):
            names = ", ".join(run.folder for run in runs)
            raise UserError(f"--only {pattern}: no run has such a name; the runs are {names}")
    return [run for run in runs if not patterns or any(fnmatchcase(run.folder, pattern) for pattern in patterns)]


def _place(turn: int, number: int) -> int:
    """Place of a run in the queue, by its cell's turn and its seed's number among the seeds."""
    first = {_CORE: 0, _RIVAL: 1, _FURTHER: 4, _LAST: 6}
    return first[turn] if number == 0 else {_CORE: 2, _RIVAL: 3, _FURTHER: 5, _LAST: 7}[turn]


def peak_rate(run: Run) -> float:
    """The rate of a run at the end of its warmup [per update]."""
    solver = run.config.solver
    return float(solver.base_lr * (run.global_batch / solver.reference_batch) ** solver.scaling_exponent)


class _Declaration:
    """One method per grid."""

    def __init__(self, scale: Scale, base: Config, data: str, packs: str) -> None:
        self.scale, self.base, self.data, self.packs = scale, base, data, packs
        self.from_scratch = not isinstance(base.model, BackboneConfig)
        # fixed statistics belong to given weights
        self.norms = ("cgbn", "bn" if self.from_scratch else "frozen")

    def batch(self) -> list[Cell]:
        return [
            Cell("batch", {"batch": batch, "norm": norm, "rate": rate}, self._run(batch, norm, rate=rate))
            for norm in self.norms
            for rate in (1.0, 0.5)
            for batch in self.scale.batches
        ]

    def bn_size(self) -> list[Cell]:
        batch = self.scale.bn_batch
        sizes = [size for size in self.scale.bn_sizes if size <= batch]
        return [Cell("bn_size", {"bn_size": n, "batch": batch}, self._run(batch, "cgbn", n), _FURTHER) for n in sizes]

    def epochs(self) -> list[Cell]:
        return [Cell("epochs", {"batch": batch}, self._run(batch, "cgbn")) for batch in self.scale.batches]

    def _refuse(self, grid: str, key: str, accepted: str) -> None:
        value = getattr(self.base.solver, key)
        raise UserError(f"{grid} with solver.{key} {value}: accepted are configurations with {accepted}")

    def warmup(self) -> list[Cell]:
        batch, solver = max(self.scale.batches), self.base.solver
        if not (solver.warmup_epochs if solver.warmup_iterations is None else solver.warmup_iterations):
            key = "warmup_epochs" if solver.warmup_iterations is None else "warmup_iterations"
            self._refuse("warmup", key, "a warmup, whose runs are compared with runs without")
        return [
            Cell("warmup", {"norm": norm, "warmup": warm, "batch": batch}, self._run(batch, norm, warmup=warm))
            for norm in self.norms
            for warm in (True, False)
        ]

    def ranks(self) -> list[Cell]:
        policy = self.base.solver.policy
        settings: Settings = {
            **_ONE_PASS,
            # the length is that of epochs alone
            "solver.policy": policy if policy == "cosine" else "steps",
            "solver.iterations": None,
            "solver.least_iterations": None,
            "solver.adascale": False,
            "norm.size": 0,
            "data.images_per_rank": self.scale.rank_images,
            "solver.epochs": 1.0,
            "evaluation.every_epochs": 0.0,
            "data.val": None,
            "checkpoints.every_epochs": 0.0,
        }
        config = with_settings(self.base, settings)
        runs = [Run(f"ranks{number}", config, number, self.data, self.from_scratch) for number in self.scale.ranks]
        return [Cell("ranks", {"ranks": run.ranks, "batch": run.global_batch}, run) for run in runs]

    def modules(self) -> list[Cell]:
        return [
            self._module(backbone, head, levels, (short, long))
            for backbone in BACKBONES
            for head, (family, _) in HEADS.items()
            for levels in LEVELS["retinanet" if family == "retinanet" else "two_stage"]
            for short, long in self.scale.module_inputs
        ]

    def _module(self, backbone: str, head: str, levels: tuple[int, int], sides: tuple[int, int]) -> Cell:
        """One detector from scratch: group normalization, weight-standardized convolutions in the backbone."""
        batch, (family, own) = self.scale.module_batch, HEADS[head]
        short, long = sides
        every: tuple[int, ...] = self.base.model.anchor_sizes  # type: ignore[attr-defined]
        per_rank = self.scale.images_per_rank or batch
        keys: Settings = {
            "backbone": backbone,
            "backbone_weights": None,
            "frozen_stages": 0,
            "conv": "weight_standardized",
            "fpn_levels": levels,
            "anchor_sizes": every[-(levels[1] - levels[0] + 1) :],
            **own,
        }
        if self.scale.module_neck_channels:
            keys["neck_channels"] = self.scale.module_neck_channels
        settings: Settings = {
            **_ONE_PASS,
            "model": _of_family(self.base.model, family, keys),
            "norm.kind": "gn",
            "norm.size": 0,
            "norm.where": ("backbone", "fpn", "heads"),
            "data.short_sides": (short,),
            "data.max_side": long,
            "data.val_short_side": short,
            "data.images_per_rank": per_rank,
            "emulate.ranks": batch // per_rank if batch > per_rank else 0,
            # RetinaNet's paper has half the rate of Faster R-CNN's
            "solver.base_lr": self.base.solver.base_lr * (0.5 if family == "retinanet" else 1.0),
        }
        config = with_settings(self.base, settings)
        data = f"{self.scale.name} {self.scale.shapes} {self.packs}"
        text = f"P{levels[0]}-P{levels[1]}"
        run = Run(f"{backbone}-{head}-{text}-{long}x{short}", config, 0, data, from_scratch=True)
        columns = {"backbone": backbone, "head": head, "levels": text, "input": f"{long}x{short}"}
        return Cell("modules", columns, run, num_categories=self.scale.num_categories)

    def claim(self) -> list[Cell]:
        small, large = self.scale.claim_batches[0], self.scale.claim_batches[-1]
        sizes = {"cgbn": 0, "frozen": 0, "one rank": self.scale.images_of_one_rank}
        turns = {("cgbn", small): _CORE, ("cgbn", large): _CORE, ("frozen", large): _RIVAL}
        return [
            Cell(
                "claim",
                {"norm": norm, "batch": batch},
                self._run(batch, "frozen" if norm == "frozen" else "cgbn", size),
                turns.get((norm, batch), _LAST if norm == "one rank" else _FURTHER),
            )
            for norm, size in sizes.items()
            for batch in self.scale.claim_batches
        ]

    def warmups(self) -> list[Cell]:
        batch, own = self.scale.claim_batches[-1], self.base.solver.warmup_epochs
        if self.base.solver.warmup_iterations is not None:
            self._refuse("warmups", "warmup_iterations", "a warmup in epochs, whose lengths are compared")
        lengths = dict.fromkeys(epochs for epochs in (*self.scale.warmups, own) if epochs)
        kinds = [("none", 0.0), *((form, epochs) for form in ("linear", "exp") for epochs in lengths)]
        return [
            Cell(
                "warmups",
                {"form": form, "epochs": epochs, "batch": batch},
                self._run(batch, "cgbn", warmup=epochs > 0, form=(form, epochs)),
                _FURTHER if form == "none" else _LAST,
            )
            for form, epochs in kinds
        ]

    def rates(self) -> list[Cell]:
        small, large = self.scale.claim_batches[0], self.scale.claim_batches[-1]
        self._refuse_reference("rates", large)
        runs: list[tuple[int, float | None, Run]] = [
            (small, None, self._run(small, "cgbn", rate=rate)) for rate in (1.0, 2.0)
        ]
        runs += [(large, e, self._run(large, "cgbn", exponent=e)) for e in (1.0, 0.75, 0.5)]
        return [
            Cell("rates", {"batch": batch, "exponent": exponent, "rate": peak_rate(run)}, run, _LAST)
            for batch, exponent, run in runs
        ]

    def solvers(self) -> list[Cell]:
        cells = []
        small = self.scale.claim_batches[0]
        self._refuse_reference("solvers", *(batch for batch in self.scale.solver_batches if batch != small))
        for batch in self.scale.solver_batches:
            plain: Settings = {"solver.optimizer": "sgd", "solver.agvm": False}
            # at the reference all exponents give one rate
            exponents = SOLVER_EXPONENTS[: 1 if batch == self.base.solver.reference_batch else None]
            runs = [("sgd", self._run(batch, "cgbn", exponent=e, further=plain)) for e in exponents]
            number = runs[0][1].config.emulate.ranks
            if number and number % 2 == 0:  # AGVM compares halves of the ranks
                halves: Settings = {**plain, "solver.agvm": True}
                for exponent in SOLVER_EXPONENTS:
                    run = self._run(batch, "cgbn", exponent=exponent, further=halves, suffix="-agvm")
                    runs.append(("agvm", run))
            for solver, rates in SOLVER_RATES.items():
                for rate in rates:
                    own = {**plain, "solver.optimizer": solver, "solver.base_lr": rate, "solver.reference_batch": 256}
                    run = self._run(batch, "cgbn", exponent=0.5, further=own, suffix=f"-{solver}{rate:g}")
                    runs.append((solver, run))
            cells += [
                Cell("solvers", {"solver": solver, "batch": batch, "rate": peak_rate(run)}, run) for solver, run in runs
            ]
        return cells

    def _refuse_reference(self, grid: str, *batches: int) -> None:
        """Raise UserError if a mini-batch is the reference, at which all exponents give one rate."""
        if self.base.solver.reference_batch in batches:
            self._refuse(grid, "reference_batch", f"another one than the mini-batch, {' or '.join(map(str, batches))}")

    def causes(self) -> list[Cell]:
        small, large = self.scale.claim_batches[0], self.scale.claim_batches[-1]
        solver = self.base.solver
        for key in ("iterations", "drop_iterations", "warmup_iterations"):
            if getattr(solver, key) is not None:
                self._refuse("causes", key, "lengths in epochs, which it changes")
        if solver.policy != "steps":
            self._refuse("causes", "policy", "solver.policy steps, whose epochs it changes")
        cells = []
        for name, (is_large, times, rate) in CASES.items():
            batch, length = (large, times) if is_large else (small, times or small / large)
            further = {} if length == 1 else self._lengthened(length)
            suffix = "" if length == 1 else f"-epochs{length:g}x"
            if rate == 1 or batch == solver.reference_batch:
                run = self._run(batch, "cgbn", rate=rate, further=further, suffix=suffix)
            else:
                # as an exponent, so that half and a quarter of the rate are runs of the grid `rates`
                more = math.log(rate, batch / solver.reference_batch)
                exponent = round(solver.scaling_exponent + more, 6)
                run = self._run(batch, "cgbn", exponent=exponent, further=further, suffix=suffix)
            columns = {"case": name, "batch": batch, "epochs": run.config.solver.epochs, "rate": peak_rate(run)}
            cells.append(Cell("causes", columns, run, _CORE if name in ("small", "large") else _LAST))
        return cells

    def _lengthened(self, times: float) -> Settings:
        """A schedule and its evaluations so many times as long; a longer one keeps its warmup."""
        solver = self.base.solver
        return {
            "solver.epochs": solver.epochs * times,
            "solver.drop_epochs": tuple(epoch * times for epoch in solver.drop_epochs),
            "solver.warmup_epochs": solver.warmup_epochs * min(times, 1.0),
            "evaluation.every_epochs": self.base.evaluation.every_epochs * times,
        }

    def _run(
        self,
        batch: int,
        norm: str,
        bn_size: int = 0,
        *,
        rate: float = 1.0,
        warmup: bool = True,
        form: tuple[str, float] | None = None,
        exponent: float | None = None,
        further: Settings | None = None,
        suffix: str = "",
    ) -> Run:
        """One emulated run. With frozen statistics images are independent, so one rank holds all of them if it may.

        Args:
            batch: images of an update.
            norm: cgbn or frozen.
            bn_size: images that share statistics; 0: the scale's best.
            rate: factor of the base rate.
            warmup: whether there is one.
            form: its form and length in place of the scale's [epochs].
            exponent: exponent of the scaling rule; None: the configuration's.
            further: other settings, which come last.
            suffix: end of the name, which tells them.
        """
        size = min(bn_size or self.scale.best_bn_size, batch)
        # a rank shares its images out among smaller groups, which is quicker than a rank for each; regions cannot be
        whole = size if "heads" in self.base.norm.where else max(size, min(self.scale.best_bn_size, batch))
        alone = {"cgbn": whole, "bn": min(self.scale.bn_sizes), "frozen": batch}
        per_rank = self.scale.images_per_rank or alone[norm]
        num_ranks = batch // per_rank
        settings: Settings = {
            "norm.kind": norm,
            "norm.size": size if norm == "cgbn" else 0,
            "data.images_per_rank": per_rank,
            "emulate.ranks": num_ranks if num_ranks > 1 else 0,
            "solver.base_lr": self.base.solver.base_lr * rate,
            **_ONE_PASS,
        }
        if self.scale.images_per_row:
            settings["log_every"] = max(self.scale.images_per_row // batch, 1)
        name = f"{norm}{size if norm == 'cgbn' else ''}-b{batch}-lr{rate:g}{'' if warmup else '-nowarmup'}"
        if not warmup:
            settings |= {"solver.warmup_epochs": 0.0, "solver.warmup_iterations": None}
        elif form:
            settings |= {"solver.warmup_form": form[0], "solver.warmup_epochs": form[1]}
            own = form == (self.base.solver.warmup_form, self.base.solver.warmup_epochs)
            name += "" if own else f"-{form[0]}{form[1]:g}"
        if exponent not in (None, self.base.solver.scaling_exponent):
            settings["solver.scaling_exponent"] = exponent
            name += f"-exponent{exponent:g}"
        settings |= further or {}
        name += suffix
        return Run(name, with_settings(self.base, settings), 0, self.data, self.from_scratch)


def _of_family(model: ModelConfig, family: str, keys: Settings) -> ModelConfig:
    """The keys of another detector family, with the values that both families have, and some changed."""
    kind = DETECTORS[family]
    names = {field.name for field in dataclasses.fields(kind)} - {"detector"}
    shared = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name in names}
    return kind(**{**shared, **keys})


def estimated_seconds(run: Run, scale: Scale) -> float | None:
    """Time of a run on one idle core, by the scale's speed; None if the speed was not measured."""
    if not scale.speed or run.from_scratch:  # the speed is that of the scale's own detector
        return None
    speed, config = scale.speed, run.config
    steps = math.ceil(scale.num_images / run.global_batch) * config.solver.epochs
    steps = min(steps, config.max_steps or steps)
    virtual = config.emulate.ranks or 1
    pass_seconds = speed.per_micro_batch + speed.per_image * config.data.images_per_rank
    # with several emulated groups an extra forward pass counts boxes (engine/emulate.py)
    several = virtual > 1 and run.config.norm.size < run.global_batch
    counting = 4 / 3 if several and not config.emulate.keep_graphs else 1
    every = config.evaluation.every_epochs
    evaluations = (config.solver.epochs // every if every else 1) if config.data.val else 0
    passes = steps * virtual * config.solver.accumulate
    return speed.start + passes * pass_seconds * counting + evaluations * speed.per_evaluation
