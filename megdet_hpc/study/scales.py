"""The sizes of a study: data, detector, mini-batches. Each run's settings follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
        """Name of the set's folder, which tells its numbers."""
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
    """A shipped configuration, or a file."""
    settings: Settings = field(default_factory=dict)
    """Settings that differ from it in all runs."""
    shapes: Shapes | None = None
    """The generated set; None: packs that the user names."""
    pretraining: tuple[Shapes, Settings] | None = None
    """Set and settings of the run that trains the backbone's first weights; None: the user names a file."""
    pretraining_name: str = "pretraining"
    """Name of that run."""
    num_images: int = 0
    """Size of the training set, for estimates."""
    images_per_rank: int | None = None
    """Images of a rank. None: the BN size, so that each emulated rank is a BN group."""
    batches: tuple[int, ...] = (16, 32, 64, 128, 256)
    bn_sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    claim_batches: tuple[int, ...] = (16, 64, 256)
    """Mini-batches of the grid `claim`. The first is the paper's small one, the last its large one, also of `warmups`
    and `rates`."""
    solver_batches: tuple[int, ...] = (256, 1024)
    """Mini-batches of the grid `solvers`."""
    images_of_one_rank: int = 2
    """Images that share statistics without a message between ranks, in the grid `claim`."""
    warmups: tuple[float, ...] = (1.0,)
    """Lengths of the warmup in the grid `warmups`, beside none and the scale's own [epochs]."""
    images_per_row: int = 0
    """Images between two rows of metrics; larger mini-batches have a row each. 0: as the configuration says."""
    bn_batch: int = 64
    """The mini-batch at which BN sizes are compared."""
    best_bn_size: int = 32
    """BN size of all other runs, at most their mini-batch (the paper found 32 best)."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of real ranks."""
    rank_images: int = 2
    """Images per rank in the runs on real ranks."""
    target_ap: float | None = None
    """AP until whose first validation the time is a column of the tables."""
    speed: Speed | None = None
    """None: not measured."""
    num_categories: int = 0
    """Categories of the data set, for the counts of the grid `modules`."""
    module_inputs: tuple[tuple[int, int], ...] = ((512, 512), (600, 800), (720, 1080), (800, 1333))
    """Inputs of the grid `modules`: the largest short and long side [pixels]."""
    module_batch: int = 16
    """Mini-batch of the grid `modules`."""
    module_neck_channels: int | None = None
    """Width of the FPN there, which group normalization divides into 32 groups; None: the configuration's."""


_TINY_SHAPES = Shapes(num_train=768, num_val=100, size=64, seed=0)
_TINY_PRETRAINING = (
    Shapes(num_train=768, num_val=50, size=64, seed=1),
    {"solver.base_lr": 0.02, "evaluation.every_epochs": 14.0},
)

_SMALL_SHAPES = Shapes(num_train=4096, num_val=400, size=64, seed=0)
_SMALL_PRETRAINING = (
    Shapes(num_train=2048, num_val=100, size=64, seed=1),
    {"solver.epochs": 12.0, "solver.drop_epochs": (10.0, 11.5), "solver.warmup_epochs": 1.0,
     "evaluation.every_epochs": 12.0},
)  # fmt: skip

SCALES = {
    "tiny": Scale(
        "tiny",
        "study_tiny",
        shapes=_TINY_SHAPES,
        pretraining=_TINY_PRETRAINING,
        num_images=_TINY_SHAPES.num_train,
        rank_images=16,
        solver_batches=(64, 256),
        speed=Speed(per_micro_batch=0.06, per_image=0.013, per_evaluation=2.0, start=9.0),
        num_categories=5,
        # each pads to its own multiple of 32; 64 x 48 is the input of the other grids
        module_inputs=((32, 32), (48, 64), (64, 96), (80, 128)),
        module_neck_channels=32,
    ),
    "small": Scale(
        "small",
        "study_small",
        shapes=_SMALL_SHAPES,
        pretraining=_SMALL_PRETRAINING,
        num_images=_SMALL_SHAPES.num_train,
        batches=(16, 64, 256),
        bn_sizes=(2, 8, 32, 128),
        bn_batch=256,
        solver_batches=(16, 256, 1024),
        images_per_row=256,
        target_ap=0.7,
        rank_images=16,
        speed=Speed(per_micro_batch=0.02, per_image=0.0025, per_evaluation=4.0, start=6.0),
        num_categories=5,
        module_inputs=((32, 32), (48, 64), (64, 96), (80, 128)),
        module_neck_channels=32,
    ),
    "bccd": Scale(
        "bccd",
        "megdet_r50_fpn_256",
        # with 205 images, this many epochs give the largest mini-batch enough steps
        settings={
            "data.short_sides": (480,),
            "data.max_side": 640,
            "data.val_short_side": 480,
            # the next five: another configuration's own lengths give way
            "solver.policy": "steps",
            "solver.iterations": None,
            "solver.least_iterations": None,
            "solver.drop_iterations": None,
            "solver.warmup_iterations": None,
            "solver.epochs": 48.0,
            "solver.drop_epochs": (36.0, 44.0),
            "solver.drop_factors": (0.1, 0.1),
            "solver.warmup_epochs": 4.0,
            "evaluation.every_epochs": 4.0,
            "checkpoints.every_epochs": 4.0,
        },
        num_images=205,
        solver_batches=(64, 128),
        num_categories=3,
        images_per_rank=2,
        ranks=(1, 2, 4, 8),
    ),
    "coco": Scale(
        "coco",
        "megdet_r50_fpn_256",
        num_images=118_287,
        num_categories=80,
        images_per_rank=2,
        ranks=(8, 16, 32, 64, 128),
    ),
}


def scale_named(name: str, config: str = "") -> Scale:
    """The scale of that name.

    Args:
        name: some key of SCALES.
        config: configuration of all runs, with its own images, in place of the scale's; "" for the scale's.

    Raises:
        UserError: there is no such scale.
    """
    if name not in SCALES:
        raise UserError(f"--scale {name}: accepted are {', '.join(SCALES)}")
    scale = SCALES[name]
    if not config:
        return scale
    settings = {key: value for key, value in scale.settings.items() if not key.startswith("data.")}
    return replace(scale, config=config, settings=settings, speed=None)
