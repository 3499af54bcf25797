"""The configuration of a run: its parts, and how they fit each other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from megdet_hpc.config.data import DataConfig
from megdet_hpc.config.models import DEFAULT_DETECTOR, FasterRcnnConfig, ModelConfig, detector_family
from megdet_hpc.config.norm import NormConfig
from megdet_hpc.config.outcome import LEAST_CHECKPOINTS, CheckpointConfig, EvaluationConfig
from megdet_hpc.config.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Accepted, check_ranges, ranged, require
from megdet_hpc.config.solver import SolverConfig


@dataclass(frozen=True)
class EmulateConfig:
    """Many ranks in one process."""

    ranks: int = ranged(0, AT_LEAST_0)
    """Reproduce a run of this many ranks in this one process, BN group after BN group; 0: real ranks [ranks]."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    output: str = "runs/megdet"
    """Folder for checkpoints, metrics, pictures; refused if it holds a run already, unless --resume is given."""
    resume: str = "never"
    """never: start new; auto: continue the newest whole checkpoint in output, if any; or the file to continue."""
    max_steps: int | None = ranged(None, AT_LEAST_1.or_null())
    """End cleanly, checkpoint included, after this many updates in total; none: after solver.epochs [steps]."""
    max_minutes: float | None = ranged(None, ABOVE_0.or_null())
    """Save and exit with status 75 before this time is over (--resume auto goes on); none: no limit [minutes]."""
    watchdog_minutes: float | Literal["auto"] = ranged(
        "auto", Accepted("0 or more, or auto", lambda minutes: minutes == "auto" or minutes >= 0)
    )
    """End the job with a report of who waits for whom if a step takes longer than this; 0: never; auto: than ten times
    the longest step so far, within 5 to 15, and 15 for evaluations, first steps and one rank [minutes]."""
    seed: int = ranged(0, AT_LEAST_0)
    """Seed of weights, order, augmentation and box sampling."""
    deterministic: bool = False
    """Only operators that give the same bits each time, where torch has them, and gradients one by one; slower. CPUs
    need it not; untested on GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: each rank's own GPU if there is one, else the CPU."""
    log_every: int = ranged(20, AT_LEAST_1)
    """Write metrics every so many steps [steps]."""
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
    emulate: EmulateConfig = field(default_factory=EmulateConfig)
    """Emulation of a larger job."""

    def __post_init__(self) -> None:
        check(self)


def check(config: Config) -> None:
    """Check each range and how the values fit each other.

    Raises:
        UserError: names the key, the value received and the range accepted.
    """
    check_ranges(config)
    for part in (config.data, config.model, config.norm, config.solver):
        part.check()
    if config.emulate.ranks:
        alone = "with emulate.ranks, in whose one process it would do nothing"
        require(config.solver.compression == "none", "solver.compression", config.solver.compression, f"none {alone}")
        require(config.data.sampling == "uniform", "data.sampling", config.data.sampling, f"uniform {alone}")
        require(
            not config.solver.agvm,
            "solver.agvm",
            config.solver.agvm,
            "false with emulate.ranks: it compares real ranks",
        )


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of a configuration (for YAML, checkpoints and logs)."""
    plain: dict[str, Any] = dataclasses.asdict(config)
    return plain


def migrated(stored: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration with values that this version accepts; 0.1.0 took checkpoints.keep of 1."""
    kept = stored.get("checkpoints", {})
    if "keep" not in kept:
        return stored
    return {**stored, "checkpoints": {**kept, "keep": max(kept["keep"], LEAST_CHECKPOINTS)}}


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the default of each key that its version did not have."""
    flat = flatten(stored)

    def fill(defaults: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {
            key: fill(value, f"{prefix}{key}.") if isinstance(value, dict) else flat.get(prefix + key, value)
            for key, value in defaults.items()
        }

    family = detector_family(flat.get("model.detector", DEFAULT_DETECTOR))
    return fill(to_dict(Config(model=family())), "")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one of dotted keys, such as norm.size."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
