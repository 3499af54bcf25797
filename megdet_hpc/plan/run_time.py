"""The hours of a whole run: its updates, evaluations, checkpoints, and the start of each of its jobs.

evaluations = number * images of a rank / (3 * images/s of one rank); deferred: none, but a checkpoint each
checkpoints = number * bytes / write speed; the ranks wait for each of them
start-up    = jobs * minutes of a job's start and end

What nobody gave is an assumption, and its line says so. A detection counts as the forward pass of a training step, a
third of it. The scoring after the detection, on one rank, is not in it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from megdet_hpc.data.shard_format import read_manifest
from megdet_hpc.errors import UserError
from megdet_hpc.log import read_metrics
from megdet_hpc.plan.cost import walltime_pieces
from megdet_hpc.plan.job_plan import JobPlan
from megdet_hpc.plan.options import require_number

COCO_VAL2017_IMAGES = 5_000
RESTART_MINUTES = 10.0
WRITE_GB_PER_SECOND = 0.5
"""Assumption: the speed at which one process writes to a parallel file system [GB/s]."""
_FORWARD_SHARE = 1 / 3  # of a training step, whose backward pass has two gradients a convolution


@dataclass(frozen=True)
class Part:
    """Something that a run does several times: its number, the time of one [s], and where that time comes from."""

    number: int
    seconds: float
    source: str

    @property
    def hours(self) -> float:
        return self.number * self.seconds / 3600


@dataclass(frozen=True)
class CheckpointTime:
    """The time of a checkpoint [s], where it comes from, and whether that is more than an assumption."""

    seconds: float
    source: str
    known: bool = True


@dataclass(frozen=True)
class RunTime:
    """The hours of a run by their parts.

    Attributes:
        training: hours of the updates.
        evaluation: evaluations, by this job or by another.
        checkpoints: those of this run, for which its updates wait.
        start: starts of jobs.
        waited: hours of evaluations for which the updates wait.
    """

    training: float
    evaluation: Part
    checkpoints: Part
    start: Part
    waited: float

    @property
    def hours(self) -> float:
        return self.training + self.waited + self.checkpoints.hours + self.start.hours


def add_time_options(parser: argparse.ArgumentParser) -> None:
    """The options that replace assumptions on a run's time beside its updates."""
    parser.add_argument("--val-images", type=int, help="images of data.val; default: those of the pack, else of COCO")
    parser.add_argument(
        "--evaluation-seconds", type=float, metavar="SECONDS", help="time of one; default: at 3 x training's speed [s]"
    )
    parser.add_argument(
        "--write-speed",
        type=float,
        metavar="GB/S",
        help=f"speed of a checkpoint's file; default: {WRITE_GB_PER_SECOND:g}, an assumption [GB/s]",
    )


def restart_minutes(options: argparse.Namespace) -> float:
    """The time that a job loses to its start and end [min], given or assumed."""
    return RESTART_MINUTES if options.restart_minutes is None else options.restart_minutes


def checkpoint_bytes(state_bytes: int, gradients: int) -> int:
    """Size of a checkpoint [bytes]: the state of a rank without its gradients.

    Args:
        state_bytes: weights, gradients, the optimizer's state and averaged weights.
        gradients: number of trained values, whose gradients are float32.
    """
    return state_bytes - 4 * gradients


def times_due(plan: JobPlan, every_epochs: float) -> int:
    """How often a period of epochs ends in a run; the run's end counts as one."""
    if every_epochs <= 0:
        return 1
    return max(1, math.ceil(plan.epoch.epochs_of(plan.total_steps) / every_epochs - 1e-6))


def num_evaluations(plan: JobPlan) -> int:
    """Evaluations of a run, in it or in a job of their own."""
    config = plan.config.evaluation
    if plan.config.data.val is None:
        return 0
    return config.times or times_due(plan, config.every_epochs)


def _val_images(options: argparse.Namespace, plan: JobPlan) -> tuple[int, str]:
    if options.val_images is not None:
        if options.val_images < 1:
            raise UserError(f"--val-images {options.val_images}; accepted: 1 or more")
        return options.val_images, "--val-images"
    folder = Path(plan.config.data.val or "")
    if plan.config.data.val and folder.is_dir():
        return read_manifest(folder)["totals"]["images"], f"manifest of {folder}"
    return COCO_VAL2017_IMAGES, "assumed: COCO val2017"


def _evaluation(options: argparse.Namespace, plan: JobPlan, images_per_second: float) -> Part:
    number, config = num_evaluations(plan), plan.config.evaluation
    if options.evaluation_seconds is not None:
        require_number("--evaluation-seconds", options.evaluation_seconds, least=True)
        return Part(number, options.evaluation_seconds, "given")
    images, source = _val_images(options, plan)
    views = max(len(config.scales), 1) * (2 if config.flip else 1)
    own = math.ceil(images / plan.nodes.num_ranks) * views
    seen = f" in {views} views" if views > 1 else ""
    text = f"{images} images ({source}){seen} at 3 x the speed of training, assumed; scoring not in it"
    return Part(number, own * _FORWARD_SHARE / images_per_second, text)


def checkpoint_time(options: argparse.Namespace, num_bytes: int) -> CheckpointTime:
    """The time of a checkpoint: that of --write-seconds, --write-speed or --measured, else an assumption.

    Args:
        options: command line of `plan`.
        num_bytes: size of the checkpoint.

    Raises:
        UserError: an option is out of its range.
    """
    size = f"{num_bytes / 1e9:.3g} GB"
    if options.write_seconds is not None:
        require_number("--write-seconds", options.write_seconds)
        return CheckpointTime(options.write_seconds, f"{size}; time given")
    if options.write_speed is not None:
        require_number("--write-speed", options.write_speed)
        return CheckpointTime(num_bytes / 1e9 / options.write_speed, f"{size} at {options.write_speed:g} GB/s, given")
    if options.measured is not None:
        file = Path(options.measured) / "metrics.jsonl"
        times = [row["save_max_s"] for row in read_metrics(file) if "save_max_s" in row]
        if times:
            return CheckpointTime(max(times), f"{size}; the longest in {file}")
    seconds = num_bytes / 1e9 / WRITE_GB_PER_SECOND
    return CheckpointTime(seconds, f"{size} at {WRITE_GB_PER_SECOND:g} GB/s, assumed", known=False)


def _checkpoints(options: argparse.Namespace, plan: JobPlan, num_bytes: int, hours: float) -> Part:
    config = plan.config.checkpoints
    number = times_due(plan, config.every_epochs)
    if config.every_minutes:
        number = max(number, math.ceil(hours * 60 / config.every_minutes))
    if plan.config.evaluation.mode == "deferred":
        number = max(number, num_evaluations(plan))
    time = checkpoint_time(options, num_bytes)
    return Part(number, time.seconds, time.source)


def run_time(
    options: argparse.Namespace,
    plan: JobPlan,
    *,
    training_hours: float,
    images_per_second: float,
    num_bytes: int,
) -> RunTime:
    """The hours of a run.

    Args:
        options: command line of `plan`.
        plan: the run.
        training_hours: hours of its updates.
        images_per_second: training speed of one rank.
        num_bytes: size of a checkpoint.

    Raises:
        UserError: an option is out of its range, or a queue's limit leaves no time to train.
    """
    evaluation = _evaluation(options, plan, images_per_second)
    waited = 0.0 if plan.config.evaluation.mode == "deferred" else evaluation.hours
    checkpoints = _checkpoints(options, plan, num_bytes, training_hours)
    minutes, jobs = restart_minutes(options), 1
    if options.queue_limit is not None:
        if options.queue_limit * 60 <= minutes:
            raise UserError(
                f"--queue-limit {options.queue_limit} h: --restart-minutes {minutes:g} leaves no time to train"
            )
        jobs = walltime_pieces(training_hours + waited + checkpoints.hours, options.queue_limit, minutes)
    start = Part(jobs, 60 * minutes, "assumed" if options.restart_minutes is None else "given")
    return RunTime(training_hours, evaluation, checkpoints, start, waited)


def describe_run_time(time: RunTime, *, deferred: bool, limit: float | None) -> list[str]:
    """Lines about evaluation, checkpoints, starts and their sum.

    Args:
        time: the hours of the run.
        deferred: whether another job evaluates.
        limit: length of a job in the queue [h]; None: no limit.
    """
    evaluation, checkpoints, start = time.evaluation, time.checkpoints, time.start
    each = f"{evaluation.number} of {evaluation.seconds:.3g} s"
    if not evaluation.number:
        first = ["evaluation     none, since data.val is null"]
    elif deferred:
        first = [
            f"evaluation     0 h of this job: evaluation.mode deferred leaves {evaluation.number} checkpoints,",
            f"               which a job of their own scores, {each} on as many ranks",
        ]
    else:
        first = [f"evaluation     {evaluation.hours:.3g} h = {each}, in which the training waits"]
    return [
        *first,
        *([f"               {evaluation.source}"] if evaluation.number else []),
        f"checkpoints    {checkpoints.hours:.3g} h = {checkpoints.number} of {checkpoints.seconds:.3g} s "
        f"({checkpoints.source})",
        f"start-up       {start.hours:.3g} h = {start.number} job(s) x {start.seconds / 60:g} min to start and to end "
        f"({start.source})",
        f"total          {time.hours:.3g} h",
        *([] if limit is None else [f"walltime       {start.number} job(s) of {limit:g} h"]),
    ]
