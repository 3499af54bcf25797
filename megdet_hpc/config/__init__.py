"""The configuration of a run: nested frozen dataclasses, with the range of each field beside it.

The docstring of a field gives its meaning and unit. `python -m megdet_hpc.train --help` prints it.
"""

from megdet_hpc.config.data import DataConfig
from megdet_hpc.config.geometry import Geometry
from megdet_hpc.config.models import (
    DEFAULT_DETECTOR,
    DETECTORS,
    FasterRcnnConfig,
    ModelConfig,
    detector_family,
)
from megdet_hpc.config.norm import NormConfig
from megdet_hpc.config.outcome import CheckpointConfig, EvaluationConfig
from megdet_hpc.config.run import Config, EmulateConfig, completed, flatten, from_dict, migrated, to_dict
from megdet_hpc.config.solver import NX_BATCH, NX_DROPS_BEFORE_END, NX_ITERATIONS, SolverConfig

__all__ = [
    "DEFAULT_DETECTOR",
    "DETECTORS",
    "NX_BATCH",
    "NX_DROPS_BEFORE_END",
    "NX_ITERATIONS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EmulateConfig",
    "EvaluationConfig",
    "FasterRcnnConfig",
    "Geometry",
    "ModelConfig",
    "NormConfig",
    "SolverConfig",
    "completed",
    "detector_family",
    "flatten",
    "from_dict",
    "migrated",
    "to_dict",
]
