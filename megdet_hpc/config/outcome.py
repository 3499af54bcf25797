"""Keys of the scores and checkpoints that a run leaves."""

from __future__ import annotations

from dataclasses import dataclass

from megdet_hpc.config.ranges import AT_LEAST_0, AT_LEAST_1, FRACTION, Accepted, ranged


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation: how often it is done, and which detections are kept."""

    every_epochs: float = ranged(1.0, AT_LEAST_0)
    """Time between two evaluations on data.val; there is always one at the end. 0: only at the end [epochs]."""
    score_threshold: float = ranged(0.05, FRACTION)
    """Score below which a detection is dropped [0 to 1]."""
    nms_iou: float = ranged(0.5, FRACTION)
    """IoU above which the weaker of two detections of a class is dropped [0 to 1]."""
    max_detections: int = ranged(100, AT_LEAST_1)
    """Detections kept per image [boxes]."""


LEAST_CHECKPOINTS = 2


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: the state of a run on disk."""

    every_epochs: float = ranged(1.0, AT_LEAST_0)
    """Time between two checkpoints; there is always one at the end. 0: only at the end [epochs]."""
    keep: int = ranged(
        LEAST_CHECKPOINTS,
        Accepted(
            f"{LEAST_CHECKPOINTS} or more, since a newest one that a disk has damaged must not be the only one",
            lambda files: files >= LEAST_CHECKPOINTS,
        ),
    )
    """Newest checkpoints of this run that are kept, 2 or more. Older ones of this run are deleted [files]."""
    keep_best: bool = True
    """Also keep the checkpoint of the highest AP. best.json in output names it."""
