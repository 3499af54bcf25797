"""Warnings of runs that start but fail or give poor results, from published experience."""

from __future__ import annotations

from megdet_hpc.errors import UserError
from megdet_hpc.models.weights import check_constants, find_weights, scratch_warning
from megdet_hpc.plan.job_plan import JobPlan

# Peng et al., MegDet (CVPR 2018): without batch normalization 64 and 128 images do not converge reliably.
_LARGE_BATCH = 64
# The same paper, section 3.3: 32 images that share statistics were best; more were not better.
_BEST_BN_SIZE = 32
# The shipped configurations have a rate of 0.02 at 16 images. The linear rule makes that 0.32 at 256 images. Published
# configurations have less: 0.24 at 256 images and 0.38 at 512.
_BASE, _BASE_RATE = 16, 0.02
_PUBLISHED = "published configurations have 0.24 at 256 images and 0.38 at 512"
_HIGHEST_AT_256, _HIGHEST = 0.32, 0.38
_REFERENCE = f"{_BASE_RATE} at {_BASE} images"
_TOLERANCE = 2.0  # below 256 images: small models and data sets train at higher rates than the rules give


def warnings_of(plan: JobPlan) -> list[str]:
    """One sentence for each known risk of a plan."""
    return [*_weight_warnings(plan), *_norm_warnings(plan), *_rate_warnings(plan)]


def _weight_warnings(plan: JobPlan) -> list[str]:
    config = plan.config
    scratch = scratch_warning(config.model, plan.total_images)
    found = [scratch] if scratch else []
    try:
        check_constants(config, find_weights(config.model))
    except UserError as error:
        found.append(f"the run will be refused if it finds no weights: {error}")
    return found


def _norm_warnings(plan: JobPlan) -> list[str]:
    norm, batch = plan.config.norm, plan.epoch.global_batch
    per_rank, images = plan.config.data.images_per_rank, plan.groups.images
    kind = norm.kind if "backbone" in norm.where else "frozen"
    found = []
    if kind in ("frozen", "bn") and batch >= _LARGE_BATCH:
        what = "constant" if kind == "frozen" else f"statistics of {per_rank} images"
        found.append(
            f"global batch {batch} with {what} normalization in the backbone: the paper found that 64 and 128 images "
            "do not converge reliably without batch norm over them; use norm.kind cgbn or gn, backbone in norm.where"
        )
    if norm.kind != "cgbn":
        return found
    if images > _BEST_BN_SIZE:
        found.append(
            f"BN size {images} images: the paper's best is {_BEST_BN_SIZE}; more was not better and costs messages"
        )
    if images == per_rank and plan.epoch.num_ranks > 1:
        found.append(
            f"BN size {images} is one rank's images: this is plain batch norm, nothing is shared between ranks"
        )
    if images < per_rank:
        found.append(
            f"BN size {images} is less than one rank's {per_rank} images, which are shared out: the statistics are "
            "noisier than plain batch norm's"
        )
    solver = plan.config.solver
    if solver.accumulate > 1 or plan.epoch.growth:
        key = "grow_to" if plan.epoch.growth else "accumulate"
        found.append(
            f"solver.{key} {getattr(solver, key)}: batch statistics are those of a pass, so the BN size "
            f"stays {images} images, and the layers' messages are sent in each pass"
        )
    return found


def _rate_warnings(plan: JobPlan) -> list[str]:
    solver, schedule, batch = plan.config.solver, plan.schedule, plan.epoch.global_batch
    found = []
    if schedule.warmup_steps == 0 and batch >= _LARGE_BATCH:
        found.append(
            f"global batch {batch} at rate {schedule.peak_lr:.4g} without warmup: the scaled rate is too large for the "
            "first steps (paper, section 3.2); set solver.warmup_epochs"
        )
    grown = [stage.step for stage in plan.epoch.stages[1:]]
    first_drop = min([*schedule.drop_steps, *grown, schedule.total_steps])
    if schedule.warmup_steps >= first_drop:
        found.append(
            f"warmup of {schedule.warmup_steps} steps is not over at step {first_drop}, the first drop or the end: the "
            "rate never reaches its peak"
        )
    if gap := schedule.clip_gap():
        found.append(gap)
    if schedule.drop_steps and min(schedule.drop_steps) >= schedule.total_steps and not grown:
        found.append(
            f"the first drop of the rate, at step {min(schedule.drop_steps)}, lies behind the run's end after "
            f"{schedule.total_steps} steps: the rate never falls; set solver.drop_epochs with solver.epochs"
        )
    limit, known = _highest_rate(batch)
    if solver.optimizer == "sgd" and schedule.peak_lr > limit * (1 + 1e-9):
        found.append(
            f"peak rate {schedule.peak_lr:.4g} for {batch} images is over {limit:.3g} ({known}); "
            "lower solver.scaling_exponent or solver.base_lr"
            + ("" if solver.agvm or batch <= 512 else ", or see solver.agvm for batches beyond 1,000")
        )
    largest = batch * plan.epoch.stages[-1].factor
    if largest > plan.training_set.num_images:
        found.append(
            f"global batch {largest} is larger than the training set of {plan.training_set.num_images} images: "
            "images repeat within an update"
        )
    return found


def _highest_rate(batch: int) -> tuple[float, str]:
    """The highest rate without a warning, and the rule that gives it."""
    if batch > 256:
        return _HIGHEST, _PUBLISHED
    if batch < _BASE:
        return _TOLERANCE * _BASE_RATE * (batch / _BASE) ** 0.5, f"{_TOLERANCE:g} times the root rule from {_REFERENCE}"
    linear = _BASE_RATE * batch / _BASE
    if _TOLERANCE * linear < _HIGHEST_AT_256:
        return _TOLERANCE * linear, f"{_TOLERANCE:g} times the linear rule from {_REFERENCE}"
    return _HIGHEST_AT_256, f"the linear rule at 256 images from {_BASE_RATE} at {_BASE}; {_PUBLISHED}"
