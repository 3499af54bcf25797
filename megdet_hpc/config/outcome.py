"""Keys of the scores, metrics and checkpoints that a run leaves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megdet_hpc.config.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, FRACTION, Accepted, ranged, require

LARGEST_SIDE = 16384
"""Largest short side at which an image is seen: what is wider needs tens of GiB [pixels]."""
SIDES = f"1 to {LARGEST_SIDE} each"
_IMAGES_ON_GPU = 8  # without gradients they need less memory than 2 of training
SCORE_NAMES = {"coco": "AP", "voc07": "AP50_voc07", "voc12": "AP50_voc12"}
"""The name of the score of each evaluation.metric, as it is printed and logged."""
EMA_PREFIX = "ema_"
"""What the names of scores of averaged weights begin with."""
_CANDIDATES = 10  # times max_detections: boxes of an image that soft-NMS looks at, best first


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation: how often it is done, and which detections are kept."""

    every_epochs: float = ranged(1.0, AT_LEAST_0)
    """Time between two evaluations on data.val; there is always one at the end. 0: only at the end [epochs]."""
    times: int | None = ranged(None, AT_LEAST_1.or_null())
    """Number of evaluations of the whole run, evenly spread, in place of every_epochs [evaluations]."""
    targets: tuple[float, ...] = ranged((), Accepted("0 to 1 each", lambda aps: all(0 <= ap <= 1 for ap in aps)))
    """APs whose first time is recorded as time_to_ap, which is what large mini-batches are for. []: none [0 to 1]."""
    metric: Literal["coco", "voc07", "voc12"] = "coco"
    """What chooses the best checkpoint. coco: AP; voc07, voc12: Pascal VOC's AP at IoU 0.5 over 11 recalls, or of the
    area under the curve, difficult objects ignored; it is printed beside COCO's as AP50_voc07 or AP50_voc12."""
    score_threshold: float = ranged(0.05, FRACTION)
    """Score below which a detection is dropped [0 to 1]."""
    nms_iou: float = ranged(0.5, FRACTION)
    """IoU above which the weaker of two detections of a class is dropped [0 to 1]."""
    max_detections: int = ranged(100, AT_LEAST_1)
    """Detections kept per image [boxes]."""
    images_per_batch: int | Literal["auto"] = ranged(
        "auto", Accepted("1 or more, or auto", lambda images: images == "auto" or images >= 1)
    )
    """Most images of a detection pass; they have one padded size. auto: 8 on a GPU; 1 on a CPU, which gains little by
    more [images]."""
    mode: Literal["inside", "deferred"] = "inside"
    """Who evaluates. inside: the training, which waits meanwhile; deferred: the training leaves a checkpoint each time
    and goes on, and `evaluate --follow` scores them in a job of its own."""
    max_waiting: int | None = ranged(None, AT_LEAST_1.or_null())
    """Most checkpoints that deferred evaluation keeps until they are scored, besides checkpoints.keep; older ones are
    deleted without scores. null: all, as many as the run has evaluations [files]."""
    scales: tuple[int, ...] = ranged(
        (), Accepted(SIDES, lambda sides: all(1 <= side <= LARGEST_SIDE for side in sides))
    )
    """Short sides at which each image is seen; the detections of all are merged. The long side may be in proportion as
    long as data.max_side is to data.val_short_side. []: data.val_short_side alone [pixels]."""
    flip: bool = False
    """See each image from left to right too, and merge."""
    soft_nms: Literal["none", "linear", "gaussian"] = "none"
    """Soft-NMS in place of NMS in the detections of an image. linear: from nms_iou on scores are multiplied by 1 - IoU;
    gaussian: all by exp(-IoU^2 / soft_nms_sigma)."""
    soft_nms_sigma: float = ranged(0.5, ABOVE_0)
    """Width of the factor of gaussian soft-NMS."""
    soft_nms_score: float = ranged(0.001, FRACTION)
    """Score below which soft-NMS drops a detection; score_threshold holds before [0 to 1]."""

    def check(self) -> None:
        """Check that no scale is named twice, and that training scores for its targets. Raises UserError."""
        require(len(set(self.scales)) == len(self.scales), "evaluation.scales", self.scales, "each side once")
        inside = not self.targets or self.mode == "inside"
        require(inside, "evaluation.targets", self.targets, "[] with mode deferred, whose scores come later")

    def batch_on(self, device_type: str) -> int:
        """Most images of a detection pass on such a device."""
        if self.images_per_batch == "auto":
            return 1 if device_type == "cpu" else _IMAGES_ON_GPU
        return self.images_per_batch

    @property
    def score_name(self) -> str:
        """Name of the score of evaluation.metric, which chooses and ranks."""
        return SCORE_NAMES[self.metric]

    @property
    def merges(self) -> bool:
        """Whether the detections of an image are more than what its detector gives for the plain image."""
        return bool(self.scales) or self.flip or self.soft_nms != "none"

    def of_detector(self) -> EvaluationConfig:
        """The limits that the detector itself keeps. Soft-NMS needs the boxes that NMS would drop."""
        if self.soft_nms == "none":
            return self
        return dataclasses.replace(self, nms_iou=1.0, max_detections=_CANDIDATES * self.max_detections)

    def plain(self) -> EvaluationConfig:
        """The same without all that is done to a detector's own detections."""
        return dataclasses.replace(self, scales=(), flip=False, soft_nms="none")


LEAST_CHECKPOINTS = 2


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: the state of a run on disk."""

    every_epochs: float = ranged(1.0, AT_LEAST_0)
    """Time between two checkpoints; there is always one at the end. 0: only at the end [epochs]."""
    every_minutes: float | None = ranged(None, ABOVE_0.or_null())
    """Longest time between two checkpoints by rank 0's clock, besides those of every_epochs. `plan --mtbf-hours`
    suggests one. null: no limit [minutes]."""
    keep: int = ranged(
        LEAST_CHECKPOINTS,
        Accepted(
            f"{LEAST_CHECKPOINTS} or more, since a newest one that a disk has damaged must not be the only one",
            lambda files: files >= LEAST_CHECKPOINTS,
        ),
    )
    """Newest checkpoints of this run that are kept, 2 or more. Older ones of this run are deleted [files]."""
    keep_best: bool = True
    """Also keep the checkpoint of the highest AP, that of evaluation.metric. best.json in output names it."""


@dataclass(frozen=True)
class LogConfig:
    """Programs that show the metrics of a run."""

    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Programs that get what metrics.jsonl gets: tensorboard; mlflow, a store of files in output; wandb, offline. One
    that fails is left out with a warning. []: none (docs/watching.md)."""

    def check(self) -> None:
        """Check that no tracker is named twice. Raises UserError."""
        require(len(set(self.trackers)) == len(self.trackers), "log.trackers", self.trackers, "each tracker once")
