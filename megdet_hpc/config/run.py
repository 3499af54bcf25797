"""The whole configuration of a run, and the check that its parts fit each other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from megdet_hpc.config.data import DataConfig
from megdet_hpc.config.models import DEFAULT_DETECTOR, FasterRcnnConfig, ModelConfig, detector_family
from megdet_hpc.config.norm import NormConfig
from megdet_hpc.config.outcome import LEAST_CHECKPOINTS, CheckpointConfig, EvaluationConfig, LogConfig
from megdet_hpc.config.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Accepted, check_ranges, ranged, require
from megdet_hpc.config.solver import SolverConfig


@dataclass(frozen=True)
class EmulateConfig:
    """Emulation: one process computes what many ranks would."""

    ranks: int = ranged(0, AT_LEAST_0)
    """Number of ranks that this one process reproduces, one BN group after the other. 0: real ranks [ranks]."""
    keep_graphs: bool = False
    """Keep what the backward passes of all groups need until all forward passes are done, which saves a forward pass
    for counts alone. It takes the memory of all ranks at once, and needs BN groups of one rank each."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    output: str = "runs/megdet"
    """Folder for checkpoints, metrics and pictures. A folder that holds a run is refused unless --resume is given."""
    resume: str = "never"
    """Checkpoint from which to continue. never: start a new run; auto: the newest whole one in output, if there is one;
    or a file."""
    max_steps: int | None = ranged(None, AT_LEAST_1.or_null())
    """Updates in all, after which the run saves and ends. null: the schedule's [steps]."""
    max_minutes: float | None = ranged(None, ABOVE_0.or_null())
    """Time before whose end the run saves and exits with status 75; --resume auto goes on. null: no limit [minutes]."""
    watchdog_minutes: float | Literal["auto"] = ranged(
        "auto", Accepted("0 or more, or auto", lambda minutes: minutes == "auto" or minutes >= 0)
    )
    """Longest time of a step. A longer one ends the job with a report of which ranks wait for which. 0: no limit; auto:
    ten times the longest step so far, but 5 at least and 15 at most; 15 for evaluations, for the first steps and for a
    run of one rank [minutes]."""
    seed: int = ranged(0, AT_LEAST_0)
    """Seed of first weights, order of images, augmentation and box sampling."""
    deterministic: bool = False
    """Use operators that give the same bits each time, where torch has them, and send gradients one by one. Slower.
    CPUs do not need it. Untested on GPUs."""
    device: Literal["auto", "cpu", "cuda", "xpu", "cuda_shared"] = "auto"
    """Device of each rank. auto: its own GPU if there is one, else the CPU. cuda: an NVIDIA GPU, or an AMD one under
    ROCm. xpu: an Intel GPU. AMD's and Intel's were never tried. cuda_shared: the host's first GPU for all of its ranks,
    which shows on one GPU that several ranks agree, and is slow."""
    log_every: int = ranged(20, AT_LEAST_1)
    """Steps between two lines of metrics [steps]."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data and augmentation."""
    model: ModelConfig = field(default_factory=FasterRcnnConfig)
    """Detector."""
    norm: NormConfig = field(default_factory=NormConfig)
    """Normalization."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    """Optimization."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    log: LogConfig = field(default_factory=LogConfig)
    """Trackers of the metrics."""
    emulate: EmulateConfig = field(default_factory=EmulateConfig)
    """Emulation of a larger job."""

    def __post_init__(self) -> None:
        check(self)


def check(config: Config) -> None:
    """Check each range, and that the values fit each other.

    Raises:
        UserError: names the key, the value received and the range accepted.
    """
    check_ranges(config)
    for part in (config.data, config.model, config.norm, config.evaluation, config.solver, config.log):
        part.check()
    config.model.check_norm(config.norm)
    if config.model.geometry.square:
        side = config.data.augmentation.jitter_side
        squares = f"null or data.short_sides = {config.data.short_sides}: the detector takes squares of that side"
        require(side in (None, *config.data.short_sides), "data.augmentation.jitter_side", side, squares)
    require(
        not (config.solver.adascale and config.evaluation.times),
        "evaluation.times",
        config.evaluation.times,
        "null with solver.adascale, which does not know its number of updates beforehand",
    )
    compiled, twice = config.model.compile, getattr(config.model, "memory_efficient", False)
    copies = "false with emulate.ranks, whose ranks are copies"
    require(not (compiled and config.emulate.ranks), "model.compile", compiled, copies)
    again = "false with model.memory_efficient, which runs layers twice"
    require(not (compiled and twice), "model.compile", compiled, again)
    if config.emulate.ranks:
        alone = "with emulate.ranks, in whose one process it would do nothing"
        require(config.solver.compression == "none", "solver.compression", config.solver.compression, f"none {alone}")
        require(config.data.sampling == "uniform", "data.sampling", config.data.sampling, f"uniform {alone}")
        halves = not config.solver.agvm or config.emulate.ranks % 2 == 0
        require(halves, "emulate.ranks", config.emulate.ranks, "an even number with solver.agvm, which compares halves")


def to_dict(config: Config) -> dict[str, Any]:
    """A configuration as a plain nested dict, for YAML, checkpoints and logs."""
    plain: dict[str, Any] = dataclasses.asdict(config)
    return plain


def migrated(stored: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration with values that this version accepts. Version 0.1.0 took checkpoints.keep 1."""
    kept = stored.get("checkpoints", {})
    if "keep" not in kept:
        return stored
    return {**stored, "checkpoints": {**kept, "keep": max(kept["keep"], LEAST_CHECKPOINTS)}}


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration, and the default of each key that it lacks."""
    flat = flatten(stored)

    def fill(defaults: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {
            key: fill(value, f"{prefix}{key}.") if isinstance(value, dict) else flat.get(prefix + key, value)
            for key, value in defaults.items()
        }

    family = detector_family(flat.get("model.detector", DEFAULT_DETECTOR))
    return fill(to_dict(Config(model=family())), "")


def from_dict(stored: dict[str, Any]) -> Config:
    """The configuration of a plain nested dict, such as a checkpoint's; a key that it lacks has its default.

    Raises:
        UserError: a key of another version, or a value out of its range.
    """
    default = Config(model=detector_family(flatten(stored).get("model.detector", DEFAULT_DETECTOR))())
    other = sorted(flatten(stored).keys() - flatten(to_dict(default)).keys())
    require(not other, "the stored configuration", f"with {', '.join(other)}", "keys of this version")

    def restored(part: Any, values: Any) -> Any:
        if not dataclasses.is_dataclass(part) or isinstance(part, type):
            return values
        return dataclasses.replace(part, **{key: restored(getattr(part, key), own) for key, own in values.items()})

    config: Config = restored(default, completed(stored))
    return config


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as a flat one with dotted keys, such as norm.size."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
