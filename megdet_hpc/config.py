"""The configuration of a run: nested frozen dataclasses, cross-checked in one place.

Every field's docstring gives its unit and meaning; `python -m megdet_hpc.train --help` prints them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from megdet_hpc.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Where the packed images are and how they become batches."""

    train: str = "packed/train"
    """Folder with the packed training set (written by data_prep/pack_coco.py)."""
    val: str | None = "packed/val"
    """Folder with the packed validation set; null: nothing is evaluated."""
    images_per_rank: int = 2
    """Images a rank puts through one forward pass [images]."""
    num_workers: int = 2
    """Loader processes per rank; 0 decodes in the training process [processes]."""
    memory_map: bool = False
    """Read the packs through memory maps: quicker for files on a local disk; see docs/data_format.md, Reading."""
    decode_on_gpu: bool = False
    """Decode, resize and flip training images on the rank's GPU (nvJPEG); loader processes then only read."""
    short_sides: tuple[int, ...] = (800,)
    """Training short sides; one is drawn per image (multi-scale training) [pixels]."""
    max_side: int = 1333
    """Upper bound of the long side, in training and evaluation [pixels]."""
    val_short_side: int = 800
    """Short side in evaluation [pixels]."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip in training [0 to 1]."""
    padding: Literal["batch", "fixed"] = "batch"
    """batch: to the largest image of the rank's batch; fixed: to a square of max_side, which no other image changes."""
    group_by_aspect_ratio: bool = True
    """Batches hold only landscape or only portrait images, which saves padding."""
    sampling: Literal["uniform", "shard_local"] = "uniform"
    """uniform: any image next; shard_local: a node reads few shards, in sequence, for storage slow at random reads."""
    shuffle_buffer: int = 2000
    """shard_local: how many images of its sequence a node draws the next one from [images]."""


@dataclass(frozen=True)
class ModelConfig:
    """The detector: each part is a choice made by megdet_hpc.models.factory."""

    detector: Literal["faster_rcnn"] = "faster_rcnn"
    """Detector family."""
    backbone: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """Feature extractor; resnet10 has one basic block per stage, the others are torchvision's."""
    backbone_weights: str | None = "auto"
    """auto: weights/BACKBONE.pth (python -m megdet_hpc.fetch_backbone) where it is there, else from scratch with a
    warning; or a file with ImageNet weights in torchvision's format; null: from scratch."""
    backbone_sha256: str | None = None
    """SHA-256 that the file of backbone_weights must have; a run fills it in; null: any."""
    fixed_from_scratch: bool = False
    """Accept frozen stages and fixed statistics on random weights, which are refused otherwise."""
    frozen_stages: int = 0
    """Backbone stages that stay as loaded: 0 none, 1 the stem, 2 stem and layer1, up to 5 [stages]."""
    neck: Literal["fpn"] = "fpn"
    """What joins the backbone's levels."""
    neck_channels: int = 256
    """Width of every neck level [channels]."""
    box_head: Literal["2fc", "4conv1fc"] = "2fc"
    """Box head: two fully connected layers, or four convolutions (normalised where norm.where has heads) and one."""
    box_head_channels: int = 1024
    """Width of the box head's fully connected layers [channels]."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Anchor side per pyramid level, finest first [pixels of the resized image]."""
    rpn_pre_nms_top_n: int = 2000
    """Proposals kept per level before NMS in training; half of it in evaluation [boxes]."""
    rpn_post_nms_top_n: int = 2000
    """Proposals kept per image after NMS in training; half of it in evaluation [boxes]."""
    rpn_samples_per_image: int = 256
    """Anchors per image in the RPN's loss [boxes]."""
    roi_samples_per_image: int = 512
    """Proposals per image in the box head's loss [boxes]."""


@dataclass(frozen=True)
class NormConfig:
    """Normalization layers: the paper's cross-GPU batch normalization, or one of its rivals."""

    kind: Literal["cgbn", "bn", "frozen", "gn"] = "cgbn"
    """cgbn: statistics over a group of ranks; bn: this rank's own; frozen: constants; gn: 32 channel groups."""
    size: int = 0
    """BN size: images that share statistics (paper, section 3.3); 0 means all ranks' [images, or ranks: see unit]."""
    unit: Literal["images", "ranks"] = "images"
    """What norm.size counts."""
    where: tuple[Literal["backbone", "fpn", "heads"], ...] = ("backbone",)
    """Parts with normalization layers of this kind; parts left out have none, the backbone then has frozen ones."""
    parameters: Literal["decay", "no_decay", "frozen"] = "decay"
    """Scales and offsets of the layers: trained with weight decay, trained without, or kept as they are."""
    exchange: Literal["two_stage", "packed"] = "two_stage"
    """cgbn's messages forward: two_stage, the paper's two; packed, one larger, for networks of high latency."""
    transport: Literal["auto", "mpi", "horovod", "torch"] = "auto"
    """What carries cgbn's messages: auto is mpi on CPUs and torch (NCCL) on GPUs."""
    momentum: float = 0.1
    """Weight of the newest batch in the running statistics, as in torch [0 to 1]."""
    eps: float = 1e-5
    """Added to the variance before the square root."""


# He, Girshick, Dollar, Rethinking ImageNet Pre-training (ICCV 2019), section 3: n x 90,000 iterations of 16 images, the
# rate / 10 in the last 60,000 and again in the last 20,000.
NX_BATCH = 16
NX_ITERATIONS = 90_000
NX_DROPS_BEFORE_END = (60_000, 20_000)


@dataclass(frozen=True)
class SolverConfig:
    """The optimizer, under the linear scaling rule with warmup (paper, sections 3.1 and 3.2)."""

    base_lr: float = 0.02
    """Learning rate at the reference batch [per update]."""
    reference_batch: int = 16
    """Global batch for which base_lr holds [images]."""
    scaling_exponent: float = 1.0
    """Rate = base_lr * (global batch / reference_batch) ** this; 1 is the linear scaling rule, 0.5 the root rule."""
    optimizer: Literal["sgd", "lars", "lamb"] = "sgd"
    """sgd with momentum; lars and lamb scale each tensor's step to its weights, biases and norm layers excepted."""
    momentum: float = 0.9
    """Momentum of sgd and lars, beta1 of lamb [0 to 1, less than 1]."""
    beta2: float = 0.999
    """Of lamb: weight of the past in the mean squared gradient [0 to 1, less than 1]."""
    trust_coefficient: float = 0.001
    """Of lars: a weight tensor's step relative to its norm at rate 1."""
    momentum_correction: bool = False
    """Of lars: a change of the rate acts on the momentum at once, as it always does for sgd in torch's form."""
    weight_decay: float = 1e-4
    """L2 decay of the weights and, by norm.parameters and decay_biases, of the rest [per update]."""
    decay_biases: bool = True
    """Whether the decay also pulls biases to 0 (norm.parameters says it for the normalization layers' own)."""
    agvm: bool = False
    """Scale the rates of fpn, rpn and heads so that their gradients vary like the backbone's; for sgd on even ranks."""
    policy: Literal["steps", "normal", "long", "nx", "cosine"] = "steps"
    """steps: epochs and drop_* as given; normal, long: this package's presets of 11 and 18 epochs with own drops; nx:
    policy_n times 90,000 iterations of 16 images; cosine: half a cosine from the warmup's end to 0 after epochs."""
    policy_n: float = 1.0
    """The n of nx; its drops by 10 come 60,000 and 20,000 iterations of 16 images before its end, whatever n is."""
    epochs: float = 11.0
    """Length of steps and cosine; the other policies have their own [epochs]."""
    iterations: float | None = None
    """Length of steps and cosine in place of epochs [iterations of reference_batch images]."""
    drop_epochs: tuple[float, ...] = (8.0, 10.0)
    """Of steps: where the rate is multiplied by the factor of the same position in drop_factors [epochs]."""
    drop_iterations: tuple[float, ...] | None = None
    """Of steps: in place of drop_epochs [iterations of reference_batch images]."""
    drop_factors: tuple[float, ...] = (0.1, 0.1)
    """Of steps: factors of the drops, each relative to the rate before it."""
    warmup_form: Literal["linear", "doubling", "constant"] = "linear"
    """linear: grows every step (the paper's); doubling: doubles in equal stages; constant: start factor, then 1."""
    warmup_epochs: float = 1.0
    """Length of the warmup, in all forms and policies [epochs]; 0 turns it off."""
    warmup_iterations: float | None = None
    """Length of the warmup in place of warmup_epochs [iterations of reference_batch images]."""
    warmup_start_factor: float = 0.1
    """Rate of the first warmup step relative to the scaled rate [0 to 1]."""
    accumulate: int = 1
    """Forward-backward passes per update [passes]."""
    clip_norm: float | None = None
    """Upper bound of the gradient's global norm after the allreduce; none: no clipping."""
    compression: Literal["none", "fp16"] = "none"
    """fp16: gradients travel in half precision, which halves the allreduce's bytes."""
    overlap: bool | Literal["auto"] = "auto"
    """true: gradients travel during the backward pass; false: after it; auto: after it only on GPUs where they and
    cgbn's messages would go over two NCCL communicators at once, which can hang (docs/design.md)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the training forward (autocast); weights, gradients, boxes, losses stay float32; float16 scales the loss."""


@dataclass(frozen=True)
class EvaluationConfig:
    """When and how detections are made and scored."""

    every_epochs: float = 1.0
    """Evaluate on data.val this often, and always at the end; 0: only at the end [epochs]."""
    score_threshold: float = 0.05
    """Detections below this score are dropped [0 to 1]."""
    nms_iou: float = 0.5
    """IoU above which the weaker of two detections of a class is dropped [0 to 1]."""
    max_detections: int = 100
    """Detections kept per image [boxes]."""


LEAST_CHECKPOINTS = 2


@dataclass(frozen=True)
class CheckpointConfig:
    """State on disk."""

    every_epochs: float = 1.0
    """Write a checkpoint this often, and always at the end; 0: only at the end [epochs]."""
    keep: int = 2
    """Newest checkpoints of this run that are kept, 2 or more; older ones of the same run are deleted [files]."""
    keep_best: bool = True
    """Keep the checkpoint of the highest AP besides them; best.json in output names it."""


@dataclass(frozen=True)
class EmulateConfig:
    """Many ranks in one process."""

    ranks: int = 0
    """Reproduce a run of this many ranks in this one process, BN group after BN group; 0: real ranks [ranks]."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    output: str = "runs/megdet"
    """Folder for checkpoints, metrics, pictures; refused if it holds a run already, unless --resume is given."""
    resume: str = "never"
    """never: start new; auto: continue the newest whole checkpoint in output, if any; or the file to continue."""
    max_steps: int | None = None
    """End cleanly, checkpoint included, after this many updates in total; none: after solver.epochs [steps]."""
    max_minutes: float | None = None
    """Save and exit with status 75 before this time is over (--resume auto goes on); none: no limit [minutes]."""
    watchdog_minutes: float | Literal["auto"] = "auto"
    """End the job with a report of who waits for whom if a step takes longer than this; 0: never; auto: than ten times
    the longest step so far, within 5 to 15, and 15 for evaluations, first steps and one rank [minutes]."""
    seed: int = 0
    """Seed of weights, order, augmentation and box sampling."""
    deterministic: bool = False
    """Only operators that give the same bits each time, where torch has them, and gradients one by one; slower. CPUs
    need it not; untested on GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: each rank's own GPU if there is one, else the CPU."""
    log_every: int = 20
    """Write metrics every so many steps [steps]."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data and augmentation."""
    model: ModelConfig = field(default_factory=ModelConfig)
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


def _require(holds: bool, key: str, value: object, accepted: str) -> None:
    if not holds:
        raise UserError(f"{key} is {value!r}; accepted: {accepted}")


def check(config: Config) -> None:
    """Check each range and how the values fit each other.

    Raises:
        UserError: names the key, the value received and the range accepted.
    """
    data, model, norm, solver = config.data, config.model, config.norm, config.solver
    for key, number in {
        "data.images_per_rank": data.images_per_rank,
        "data.max_side": data.max_side,
        "data.val_short_side": data.val_short_side,
        "data.shuffle_buffer": data.shuffle_buffer,
        "model.neck_channels": model.neck_channels,
        "model.box_head_channels": model.box_head_channels,
        "model.rpn_pre_nms_top_n": model.rpn_pre_nms_top_n,
        "model.rpn_post_nms_top_n": model.rpn_post_nms_top_n,
        "model.rpn_samples_per_image": model.rpn_samples_per_image,
        "model.roi_samples_per_image": model.roi_samples_per_image,
        "solver.reference_batch": solver.reference_batch,
        "solver.accumulate": solver.accumulate,
        "evaluation.max_detections": config.evaluation.max_detections,
        "log_every": config.log_every,
    }.items():
        _require(number >= 1, key, number, "1 or more")
    _require(
        config.checkpoints.keep >= LEAST_CHECKPOINTS,
        "checkpoints.keep",
        config.checkpoints.keep,
        f"{LEAST_CHECKPOINTS} or more, since a newest one that a disk has damaged must not be the only one",
    )
    for key, value in {
        "data.num_workers": data.num_workers,
        "norm.size": norm.size,
        "solver.weight_decay": solver.weight_decay,
        "solver.warmup_epochs": solver.warmup_epochs,
        "evaluation.every_epochs": config.evaluation.every_epochs,
        "checkpoints.every_epochs": config.checkpoints.every_epochs,
        "seed": config.seed,
        "watchdog_minutes": 0 if config.watchdog_minutes == "auto" else config.watchdog_minutes,
        "emulate.ranks": config.emulate.ranks,
    }.items():
        _require(value >= 0, key, value, "0 or more")
    for key, value in {
        "solver.base_lr": solver.base_lr,
        "solver.trust_coefficient": solver.trust_coefficient,
        "solver.epochs": solver.epochs,
        "solver.policy_n": solver.policy_n,
        "norm.eps": norm.eps,
    }.items():
        _require(value > 0, key, value, "more than 0")
    for key, value in {
        "data.flip_probability": data.flip_probability,
        "norm.momentum": norm.momentum,
        "solver.warmup_start_factor": solver.warmup_start_factor,
        "evaluation.score_threshold": config.evaluation.score_threshold,
        "evaluation.nms_iou": config.evaluation.nms_iou,
    }.items():
        _require(0 <= value <= 1, key, value, "0 to 1")
    _require(config.max_steps is None or config.max_steps >= 1, "max_steps", config.max_steps, "1 or more, or null")
    _require(
        config.max_minutes is None or config.max_minutes > 0, "max_minutes", config.max_minutes, "more than 0, or null"
    )
    _require(0 <= model.frozen_stages <= 5, "model.frozen_stages", model.frozen_stages, "0 to 5")
    _require(
        len(model.anchor_sizes) == 5,
        "model.anchor_sizes",
        model.anchor_sizes,
        "five sizes, one per FPN level",
    )
    _require(
        len(data.short_sides) >= 1 and all(1 <= side <= data.max_side for side in data.short_sides),
        "data.short_sides",
        data.short_sides,
        f"one or more sizes from 1 to data.max_side = {data.max_side}",
    )
    _require(
        data.val_short_side <= data.max_side,
        "data.val_short_side",
        data.val_short_side,
        f"1 to {data.max_side}",
    )
    _check_schedule(solver)
    for key, value in {"solver.momentum": solver.momentum, "solver.beta2": solver.beta2}.items():
        _require(0 <= value < 1, key, value, "0 to 1, less than 1")
    _require(not solver.agvm or solver.optimizer == "sgd", "solver.agvm", solver.agvm, "true with solver.optimizer sgd")
    _require(norm.kind != "cgbn" or len(norm.where) > 0, "norm.where", norm.where, "one or more parts")
    if config.emulate.ranks:
        alone = "with emulate.ranks, in whose one process it would do nothing"
        _require(solver.compression == "none", "solver.compression", solver.compression, f"none {alone}")
        _require(data.sampling == "uniform", "data.sampling", data.sampling, f"uniform {alone}")
        _require(not solver.agvm, "solver.agvm", solver.agvm, "false with emulate.ranks: it compares real ranks")
    _require(solver.clip_norm is None or solver.clip_norm > 0, "solver.clip_norm", solver.clip_norm, "more than 0")


def _check_schedule(solver: SolverConfig) -> None:
    """The lengths and factors of the learning rate's schedule."""
    in_iterations = solver.drop_iterations is not None
    key = "solver.drop_iterations" if in_iterations else "solver.drop_epochs"
    drops = solver.drop_epochs if solver.drop_iterations is None else solver.drop_iterations
    _require(
        len(drops) == len(solver.drop_factors),
        "solver.drop_factors",
        solver.drop_factors,
        f"one factor for each of {key} = {drops}",
    )
    _require(list(drops) == sorted(drops), key, drops, "rising order")
    _require(all(drop >= 0 for drop in drops), key, drops, "0 or more each")
    _require(all(f > 0 for f in solver.drop_factors), "solver.drop_factors", solver.drop_factors, "more than 0 each")
    length, warmup = solver.iterations, solver.warmup_iterations
    _require(length is None or length > 0, "solver.iterations", length, "more than 0, or null")
    _require(warmup is None or warmup >= 0, "solver.warmup_iterations", warmup, "0 or more, or null")
    _require(
        solver.warmup_form != "doubling" or solver.warmup_start_factor > 0,
        "solver.warmup_start_factor",
        solver.warmup_start_factor,
        "more than 0 with solver.warmup_form doubling",
    )
    # 60,000 iterations lie between nx's first drop and its end
    _require(
        solver.policy != "nx" or solver.policy_n * NX_ITERATIONS >= NX_DROPS_BEFORE_END[0],
        "solver.policy_n",
        solver.policy_n,
        f"{NX_DROPS_BEFORE_END[0] / NX_ITERATIONS:.3g} or more",
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of a configuration (for YAML, checkpoints and logs)."""
    plain: dict[str, Any] = dataclasses.asdict(config)
    return plain


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the default of each key that its version did not have."""
    flat = flatten(stored)

    def fill(defaults: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {
            key: fill(value, f"{prefix}{key}.") if isinstance(value, dict) else flat.get(prefix + key, value)
            for key, value in defaults.items()
        }

    return fill(to_dict(Config()), "")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one of dotted keys, such as norm.size."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
