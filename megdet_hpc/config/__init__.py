"""The configuration of a run: nested frozen dataclasses, with the range of each field beside it.

The docstring of a field gives its meaning and unit. `python -m megdet_hpc.train --help` prints it.
"""

from megdet_hpc.config.augmentation import AugmentationConfig
from megdet_hpc.config.data import DataConfig, jitter_side
from megdet_hpc.config.geometry import Geometry
from megdet_hpc.config.models import (
    COARSEST_OF_REGIONS,
    DEFAULT_DETECTOR,
    DETECTORS,
    BackboneConfig,
    CascadeMaskRcnnConfig,
    CascadeRcnnConfig,
    DsodConfig,
    FasterRcnnConfig,
    MaskRcnnConfig,
    ModelConfig,
    PeleeConfig,
    RetinaNetConfig,
    ScratchDetConfig,
    SsdConfig,
    TwoStageConfig,
    detector_family,
)
from megdet_hpc.config.norm import NormConfig
from megdet_hpc.config.outcome import CheckpointConfig, EvaluationConfig, LogConfig
from megdet_hpc.config.run import Config, EmulateConfig, completed, flatten, from_dict, migrated, to_dict
from megdet_hpc.config.solver import NX_BATCH, NX_DROPS_BEFORE_END, NX_ITERATIONS, SolverConfig

__all__ = [
    "COARSEST_OF_REGIONS",
    "DEFAULT_DETECTOR",
    "DETECTORS",
    "NX_BATCH",
    "NX_DROPS_BEFORE_END",
    "NX_ITERATIONS",
    "AugmentationConfig",
    "BackboneConfig",
    "CascadeMaskRcnnConfig",
    "CascadeRcnnConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DsodConfig",
    "EmulateConfig",
    "EvaluationConfig",
    "FasterRcnnConfig",
    "Geometry",
    "LogConfig",
    "MaskRcnnConfig",
    "ModelConfig",
    "NormConfig",
    "PeleeConfig",
    "RetinaNetConfig",
    "ScratchDetConfig",
    "SolverConfig",
    "SsdConfig",
    "TwoStageConfig",
    "completed",
    "detector_family",
    "flatten",
    "from_dict",
    "jitter_side",
    "migrated",
    "to_dict",
]
