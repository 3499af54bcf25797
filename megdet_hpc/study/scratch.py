"""The grid `scratch`: what a detector needs to train from random weights. Lines of runs around a few claims.

The full product of its factors would have thousands of runs. A line changes one factor, or crosses the two that a claim
is about. Lines stand in the order in which they are trained; a run that several lines show is trained once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from megdet_hpc.config import Config
from megdet_hpc.errors import UserError
from megdet_hpc.study.grids import Cell, Run, base_config, estimated_seconds, pretraining_run, with_settings
from megdet_hpc.study.scales import SCALES, Scale, Settings, Shapes, Speed

NAME = "scratch"
TEXT = "training from random weights: normalization, rate, clipping and pooling of regions, with one and two stages"
NUM_SEEDS = 3
DSOD_SIZES = (4, 12)
"""Images that share statistics in the comparison which DSOD's authors publish."""
Rate = Literal["low", "usual", "higher"]
Pool = Literal["align", "pool"]
First = Literal["scratch", "weights"]
Where = Literal["all", "backbone", "heads"]
POOLS: tuple[Pool, ...] = ("align", "pool")
FIRST: tuple[First, ...] = ("scratch", "weights")
WHERE: tuple[Where, ...] = ("all", "backbone", "heads")
RATES: tuple[Rate, ...] = ("low", "usual", "higher")
_SIZES = (2, 4, 8, 16)
_CLIP_NORM = 1.0
_INDEPENDENT = 16  # images in one pass of a run without batch statistics, where their number changes no result


@dataclass(frozen=True)
class StudiedDetector:
    """A detector of the study, and what its runs share.

    Attributes:
        scale: its configuration, data, speed and first weights, as for the other grids.
        batch: mini-batch [images].
        where: parts that have normalization where a run does not say otherwise.
        rates: values of solver.base_lr: low, usual and higher.
    """

    scale: Scale
    batch: int
    where: tuple[str, ...]
    rates: tuple[float, float, float]


@dataclass(frozen=True)
class Treatment:
    """The settings of some runs that differ in their seed.

    Attributes:
        detector: key of the scale's detectors: one (one stage), two (two stages) or dsod.
        norm: none, bn2, bn4 ... (statistics of so many images), all (CGBN over the mini-batch) or gn.
        rate: one of RATES.
        pool: pooling of regions, align or pool; two stages only.
        clip: whether the gradient's norm is clipped.
        first: scratch, or weights of a backbone.
        where: all parts, or one of them; no normalization elsewhere.
    """

    detector: Literal["one", "two", "dsod"]
    norm: str
    rate: Rate = "usual"
    pool: Pool = "align"
    clip: bool = False
    first: First = "scratch"
    where: Where = "all"


def _lines(sizes: tuple[str, ...], detector: Literal["one", "two"]) -> dict[str, list[Treatment]]:
    """The lines of one detector.

    Args:
        sizes: norms with statistics of fewer images than the mini-batch has.
        detector: key of the detector.
    """
    of = partial(Treatment, detector)
    lines = {
        "norm": [of("none"), of(sizes[0]), of("all"), of("gn")],
        "rate": [of(norm, rate) for rate in RATES for norm in ("none", "all")],
        "clip": [of(norm, clip=clip) for clip in (False, True) for norm in ("none", "all")]
        + [of("none", "higher", clip=clip) for clip in (False, True)],
        "first": [of(norm, first=first) for first in FIRST for norm in ("none", "all")],
        "size": [*map(of, sizes), of("all")],
    }
    if detector == "one":
        lines["where"] = [of("none"), *(of("all", where=where) for where in WHERE)]
    else:
        lines["pool"] = [of(norm, pool=pool) for pool in POOLS for norm in ("none", sizes[0], "all", "gn")]
    return lines


ORDER = (
    ("dsod", "dsod"), ("one", "norm"), ("two", "norm"), ("one", "rate"), ("two", "pool"), ("one", "where"),
    ("one", "clip"), ("two", "rate"), ("one", "first"), ("two", "clip"), ("one", "size"), ("two", "first"),
    ("two", "size"),
)  # fmt: skip
"""Detector and line, in the order of training: what a claim rests on comes first."""
LINES = tuple(dict.fromkeys(line for _, line in ORDER))


@dataclass(frozen=True)
class ScratchScale:
    """One size of the study.

    Attributes:
        detectors: detectors by one, two and dsod. The BN sizes that DSOD's authors compare divide dsod's mini-batch.
    """

    detectors: dict[str, StudiedDetector]

    @property
    def scale(self) -> Scale:
        """The data of all detectors."""
        return self.detectors["two"].scale

    def treatments(self) -> Iterator[tuple[str, Treatment]]:
        """Lines and their treatments, in the order of training."""
        for key, line in ORDER:
            if key == "dsod":
                yield from ((line, Treatment("dsod", f"bn{size}")) for size in DSOD_SIZES)
                continue
            sizes = tuple(f"bn{size}" for size in _SIZES if size < self.detectors[key].batch)
            for treatment in _lines(sizes, "one" if key == "one" else "two")[line]:
                if treatment.first == "scratch" or self.has_weights(key):
                    yield line, treatment

    def has_weights(self, key: str) -> bool:
        """Whether there are weights to begin with: made by the study, or, with two stages, a file that a user names."""
        return bool(self.detectors[key].scale.pretraining) or key == "two"


def scratch_cells(
    scale: ScratchScale,
    seeds: Iterable[int] = range(NUM_SEEDS),
    lines: Sequence[str] = LINES,
    *,
    packs: str = "",
    weights: str = "",
) -> list[Cell]:
    """A cell for each line, treatment and seed. Cells with equal settings hold equal runs.

    Args:
        scale: size of the study.
        seeds: seeds of each treatment.
        lines: some of LINES.
        packs: hashes of the packs that the user names.
        weights: hash of the backbone's weights that the user names.
    """
    parts = {key: _parts(studied, packs, weights) for key, studied in scale.detectors.items()}
    return [
        _cell(scale.detectors[treatment.detector], parts[treatment.detector], line, treatment, seed)
        for line, treatment in scale.treatments()
        for seed in seeds
        if line in lines
    ]


def _parts(studied: StudiedDetector, packs: str, weights: str) -> tuple[Config, dict[str, str]]:
    """The configuration of a detector, and the text of data and first weights for the hash of its runs."""
    first = pretraining_run(studied.scale)
    text = f"{studied.scale.name} {studied.scale.shapes} {packs}"
    return base_config(studied.scale), {"scratch": text, "weights": f"{text} {first.digest if first else weights}"}


def _cell(studied: StudiedDetector, parts: tuple[Config, dict[str, str]], line: str, of: Treatment, seed: int) -> Cell:
    base, texts = parts
    grouped = of.norm.startswith("bn")
    size = int(of.norm.removeprefix("bn")) if grouped else studied.batch
    kind = {"none": "frozen", "gn": "gn"}.get(of.norm, "cgbn")
    where = studied.where if of.where == "all" else (of.where,)
    per_rank = size if kind == "cgbn" else min(studied.batch, _INDEPENDENT)
    settings: Settings = {
        "seed": seed,
        "norm.kind": kind,
        "norm.size": size if kind == "cgbn" else 0,
        # without statistics there is nothing behind a convolution, which then has its bias; the backbone's constant
        # normalization is the identity, or that of the weights which it begins with
        "norm.where": where if kind != "frozen" else ("backbone",),
        "data.images_per_rank": per_rank,
        "emulate.ranks": studied.batch // per_rank if studied.batch > per_rank else 0,
        "solver.base_lr": studied.rates[RATES.index(of.rate)],
        "solver.accumulate": 1,
        "solver.clip_norm": _CLIP_NORM if of.clip else None,
        "model.backbone_weights": None,
        "model.fixed_from_scratch": of.first == "scratch",
    }
    if of.detector == "two":
        settings["model.roi_pool"] = of.pool
    words = [of.detector, of.norm, f"b{studied.batch}", of.rate]
    words += [of.pool] * (of.detector == "two" and of.pool == "pool") + ["clip"] * of.clip
    words += ["weights"] * (of.first == "weights") + [of.where] * (of.where != "all") + [f"s{seed}"]
    run = Run("-".join(words), with_settings(base, settings), 0, texts[of.first], from_scratch=of.first == "scratch")
    columns: dict[str, Any] = {
        "line": line,
        "detector": of.detector,
        "norm": of.norm,
        "rate": of.rate,
        "base_lr": settings["solver.base_lr"],
        "pool": of.pool if of.detector == "two" else "",
        "clip": of.clip,
        "first": of.first,
        "where": "" if of.norm == "none" else of.where,
        "batch": studied.batch,
        "seed": seed,
    }
    return Cell(NAME, columns, run)


def scratch_seconds(scale: ScratchScale, cell: Cell) -> float | None:
    """Time of a cell's run on one idle core; None if it was not measured."""
    # the speeds of this study's scales are those of its detectors, which the other grids do not train from scratch
    return estimated_seconds(replace(cell.run, from_scratch=False), scale.detectors[cell.columns["detector"]].scale)


def scratch_scale(name: str) -> ScratchScale:
    """The scale of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SCRATCH_SCALES:
        raise UserError(f"--scale {name}: with {NAME} accepted are {', '.join(SCRATCH_SCALES)}")
    return SCRATCH_SCALES[name]


_TINY = SCALES["tiny"]
_TINY_SHAPES = _TINY.shapes
_TINY_LENGTH: Settings = {
    "solver.epochs": 4.0,
    "solver.drop_epochs": (3.25,),
    "solver.warmup_epochs": 0.5,
    "evaluation.every_epochs": 2.0,
    "checkpoints.every_epochs": 1.0,
    "log.trackers": (),
}
_TINY_PRETRAINING_SHAPES = Shapes(num_train=768, num_val=50, size=64, seed=1)
_TINY_ONE = Scale(
    "tiny",
    "study_scratch",
    settings=_TINY_LENGTH,
    shapes=_TINY_SHAPES,
    pretraining=(_TINY_PRETRAINING_SHAPES, {"evaluation.every_epochs": 0.0}),
    pretraining_name="pretraining-one",
    num_images=_TINY.num_images,
    speed=Speed(per_micro_batch=0.03, per_image=0.005, per_evaluation=1.0, start=6.0),
)
_TINY_TWO = replace(
    _TINY,
    settings=_TINY_LENGTH,
    pretraining=(
        _TINY_PRETRAINING_SHAPES,
        {
            "evaluation.every_epochs": 0.0,
            "solver.base_lr": 0.04,
            "solver.epochs": 8.0,
            "solver.drop_epochs": (7.0,),
        },
    ),
    pretraining_name="pretraining-two",
    speed=Speed(per_micro_batch=0.05, per_image=0.007, per_evaluation=1.5, start=6.0),
)
_IN_RANKS: Settings = {"solver.accumulate": 1}  # all images of an update are those of emulated ranks


def _published(name: str, num_images: int, two: Settings) -> ScratchScale:
    """A size with the published configurations of one-stage detectors."""
    scale = {
        key: Scale(name, config, settings={**_IN_RANKS, **settings}, num_images=num_images)
        for key, config, settings in (
            ("one", f"scratchdet300_{name}", {}),
            ("two", "rethinking_r50_fpn_cgbn_2x", two),
            ("dsod", f"dsod300_{name}", {}),
        )
    }
    return ScratchScale({
        # low and usual are ScratchDet's without and with normalization, for 128 images
        "one": StudiedDetector(scale["one"], 128, ("backbone", "heads"), (0.001, 0.05, 0.2)),
        "two": StudiedDetector(scale["two"], 16, ("backbone", "fpn", "heads"), (0.002, 0.02, 0.08)),
        # 8 GPUs with 12 images, or 24 with 4
        "dsod": StudiedDetector(scale["dsod"], 96, ("backbone", "heads"), (0.01, 0.1, 0.4)),
    })  # fmt: skip


_VOC_TWO: Settings = {
    "data.short_sides": (600,),
    "data.max_side": 1000,
    "data.val_short_side": 600,
    "solver.policy_n": 1.0,
    "evaluation.metric": "voc07",
    "evaluation.every_epochs": 10.0,
    "checkpoints.every_epochs": 10.0,
}
SCRATCH_SCALES = {
    "tiny": ScratchScale({
        "one": StudiedDetector(_TINY_ONE, 16, ("backbone", "heads"), (0.005, 0.05, 0.2)),
        "two": StudiedDetector(_TINY_TWO, 16, ("backbone", "fpn"), (0.01, 0.04, 0.16)),
        "dsod": StudiedDetector(_TINY_ONE, 24, ("backbone", "heads"), (0.005, 0.05, 0.2)),
    }),
    "voc": _published("voc", 16_551, _VOC_TWO),
    "coco": _published("coco", 118_287, {}),
}  # fmt: skip
"""The sizes of the study, by name. Only `tiny` was trained."""
