"""The sizes at which the study runs: data, detector, batches; each run's settings follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megdet_hpc.errors import UserError

Settings = dict[str, Any]
"""Dotted keys of Config and their values."""


@dataclass(frozen=True)
class Shapes:
    """Generated sets for data_prep/make_shapes.py: numbers of images, their side [pixels], the seed."""

    num_train: int
    num_val: int
    size: int
    seed: int

    @property
    def folder(self) -> str:
        """Its name beside sets of other numbers."""
        return f"shapes-{self.num_train}-{self.num_val}-{self.size}px-seed{self.seed}"


@dataclass(frozen=True)
class Speed:
    """A linear model of the time of a run on one core, for estimates [seconds]."""

    per_micro_batch: float
    per_image: float
    per_evaluation: float
    start: float


@dataclass(frozen=True)
class Scale:
    """One size of the study."""

    name: str
    config: str
    """A shipped configuration."""
    settings: Settings = field(default_factory=dict)
    """What differs from it in all runs."""
    shapes: Shapes | None = None
    """The generated set; None: packs that the user names."""
    pretraining: tuple[Shapes, Settings] | None = None
    """Set and settings of the one run that gives the backbone its first weights; None: a file that the user names."""
    num_images: int = 0
    """Size of the training set, for estimates."""
    images_per_rank: int | None = None
    """Images of a rank. None: as many as share statistics, so that each emulated rank is a BN group of its own."""
    batches: tuple[int, ...] = (16, 32, 64, 128, 256)
    bn_sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    bn_batch: int = 64
    """The mini-batch at which BN sizes are compared."""
    best_bn_size: int = 32
    """BN size of all other runs, or the batch where that is smaller (the paper found 32 best)."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Real ranks."""
    rank_images: int = 2
    """Images per rank where real ranks are timed."""
    speed: Speed | None = None
    """None: not measured."""


_TINY_SHAPES = Shapes(num_train=768, num_val=100, size=64, seed=0)
_TINY_PRETRAINING = (
    Shapes(num_train=768, num_val=50, size=64, seed=1),
    {"solver.base_lr": 0.02, "evaluation.every_epochs": 14.0},
)

SCALES = {
    "tiny": Scale(
        "tiny",
        "study_tiny",
        shapes=_TINY_SHAPES,
        pretraining=_TINY_PRETRAINING,
        num_images=_TINY_SHAPES.num_train,
        rank_images=16,
        speed=Speed(per_micro_batch=0.06, per_image=0.013, per_evaluation=2.0, start=9.0),
    ),
    "bccd": Scale(
        "bccd",
        "megdet_r50_fpn_256",
        # 205 images: as many epochs as give the largest batch some steps
        settings={
            "data.short_sides": (480,),
            "data.max_side": 640,
            "data.val_short_side": 480,
            "solver.epochs": 48.0,
            "solver.drop_epochs": (36.0, 44.0),
            "solver.warmup_epochs": 4.0,
            "evaluation.every_epochs": 4.0,
            "checkpoints.every_epochs": 4.0,
        },
        num_images=205,
        images_per_rank=2,
        ranks=(1, 2, 4, 8),
    ),
    "coco": Scale(
        "coco",
        "megdet_r50_fpn_256",
        num_images=118_287,
        images_per_rank=2,
        ranks=(8, 16, 32, 64, 128),
    ),
}


def scale_named(name: str) -> Scale:
    """The scale of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SCALES:
        raise UserError(f"--scale {name}: accepted are {', '.join(SCALES)}")
    return SCALES[name]
