"""The loop around the step: load, train, log, evaluate, save."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megdet_hpc.config import Config, to_dict
from megdet_hpc.data.continuation import plan_state
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.loader import make_loader
from megdet_hpc.data.sampler import EpochPlan
from megdet_hpc.engine.checkpoint import checkpoint_name, note_best, read_best, save_checkpoint
from megdet_hpc.engine.step import Passes, Ranks, StepResult, train_step
from megdet_hpc.engine.stop import StopRequests
from megdet_hpc.engine.watchdog import Watchdog
from megdet_hpc.evaluation.coco import score_text
from megdet_hpc.log import MetricsLog, progress_bar
from megdet_hpc.models.detector import Detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.solver.lr_schedule import LrSchedule
from megdet_hpc.solver.precision import Precision

Evaluate = Callable[[], dict[str, float]]


@dataclass
class Training:
    """Everything a run needs, built by the entry point. `step` counts updates done, whatever split they had."""

    config: Config
    world: Communicator
    device: torch.device
    model: Detector
    optimizer: SynchronizedOptimizer
    schedule: LrSchedule
    dataset: DetectionDataset
    plan: EpochPlan
    output: Path
    precision: Precision
    ranks: Passes | None = None
    """Makes the passes; None: of this process's rank."""
    step: int = 0
    check: Callable[[], None] = lambda: None
    """Raises where the output folder is another run's by now; called before each write to it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the newest evaluation; empty before the first and where its step is another than a resumed run's."""
    best_ap: float = -math.inf
    """Of the checkpoint that best.json names."""

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.output / "checkpoints"

    @property
    def last_step(self) -> int:
        """Updates after which the run ends."""
        return min(self.schedule.last_step, self.config.max_steps or self.schedule.last_step)

    @property
    def position(self) -> int:
        """The place in the schedule, in updates of this run's split; `step` unless that changed on the way."""
        return self.plan.position(self.step)

    def state(self) -> dict[str, Any]:
        """The checkpoint's content. Order, augmentation, sampling are functions of the seed, the step and the plan."""
        return {
            "step": self.step,
            "plan": {**self.order(), **plan_state(self.plan, self.step)},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.optimizer.state_dict(),
            "loss_scale": self.precision.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "config": to_dict(self.config),
            "category_ids": self.dataset.categories.ids,
            "category_names": self.dataset.categories.names,
        }

    def order(self) -> dict[str, int | str | bool]:
        """What must stay the same while a run goes on: an epoch's images, their groups, the seed of their order."""
        pack = self.dataset.pack
        return {
            # the same file taken as boxes of upright pictures is another data set
            "annotations_sha256": pack.manifest["source"]["sha256"] + " upright" * pack.upright,
            "group_by_aspect_ratio": self.config.data.group_by_aspect_ratio,
            "num_images": self.plan.num_images,
            "seed": self.plan.seed,
        }


def _due(step: int, every_epochs: float, steps_per_epoch: int) -> bool:
    """Whether a period of every_epochs ended with this step; 0 means never."""
    if every_epochs == 0:
        return False
    period = every_epochs * steps_per_epoch
    return int(step / period + 1e-9) > int((step - 1) / period + 1e-9)


@dataclass
class _Longest:
    """The longest times so far, from which rank 0 tells whether another step fits into the run's time [seconds]."""

    step: float = 0.0
    save: float = 0.0
    evaluation: float = 0.0

    def until_after_next(self, run: Training) -> float:
        """What this step and the one after it take at most, the evaluations after them and a checkpoint included."""
        evaluations = sum(_evaluation_due(run, run.step + ahead) for ahead in (1, 2))
        return 2 * self.step + evaluations * self.evaluation + self.save


def train(run: Training, evaluate: Evaluate | None, stop: StopRequests, watchdog: Watchdog) -> str:
    """Train from run.step to run.last_step, or to where `stop` ends it. Collective of the world.

    Where a checkpoint and an evaluation fall on one step the checkpoint comes first, so that a job that ends in the
    evaluation loses nothing; a run resumed there makes up for the evaluation.

    Args:
        run: objects and position; its step, metrics and weights move on.
        evaluate: collective that returns the validation metrics on every rank; None without validation set.
        stop: asked after every step.
        watchdog: told of every step, and of what rank 0 does alone.

    Returns:
        Why the run stopped before its end, its state saved; "" if it is complete.
    """
    config, world = run.config, run.world
    ranks = run.ranks or Ranks(run.model, world, run.precision)
    loader = make_loader(
        run.dataset,
        ranks.sampler(run.plan, run.step, run.last_step),
        num_workers=config.data.num_workers,
        pin_memory=run.device.type == "cuda",
        side=config.data.max_side if config.data.padding == "fixed" else None,
        decode_on=run.device if config.data.decode_on_gpu else None,
    )
    log = MetricsLog(run.output, run.step, run.check) if world.rank == 0 else None
    bar = progress_bar(initial=run.step, total=run.last_step, unit="step", disable=world.rank != 0, smoothing=0.05)
    longest = _Longest()
    scored = (log.validation(run.step), read_best(run.output).AP) if log else None
    run.metrics, run.best_ap = world.broadcast_object(scored, name="scored")
    if evaluate and run.step and not run.metrics and _evaluation_due(run, run.step):
        _score(run, evaluate, log, bar)
    if run.metrics:  # also where a run ended between the score and the note of it
        _keep_best(run, watchdog, saved=False)
    batches, num_batches = iter(loader), ranks.batches_per_step(run.plan.accumulate)
    since, data_seconds, results, reason = time.perf_counter(), 0.0, list[StepResult](), ""
    run.model.train()
    stop.listen()
    while run.step < run.last_step and not reason:
        watchdog.tick(run.step)
        started = time.perf_counter()
        mine = [batch.to(run.device) for batch in itertools.islice(batches, num_batches)]
        data_seconds += time.perf_counter() - started
        rate = run.schedule.lr_at(run.step)
        result = train_step(
            run.model,
            run.optimizer,
            mine,
            step=run.step,
            seed=config.seed,
            lr=rate,
            clip_norm=config.solver.clip_norm,
            world=world,
            ranks=ranks,
            flags=stop.flags(world.rank, longest.until_after_next(run)),
        )
        results.append(result)
        run.step += 1
        bar.update()
        if result.skipped and world.rank == 0:
            scale = run.precision.scaler.get_scale()
            bar.write(f"step {run.step}: the gradient is not finite in float16; no update, loss scale now {scale:g}")
        last = run.step == run.last_step
        longest.step = max(longest.step, time.perf_counter() - started)
        reason = "" if last else stop.reason(result.flags, world)
        if run.step % config.log_every == 0 or last or reason:
            speeds = _speeds(run, time.perf_counter() - since, data_seconds, len(results))
            watchdog.learn()
            if log:
                _log(log, bar, run, results, rate, speeds)
            since, data_seconds, results = time.perf_counter(), 0.0, []
        paused = time.perf_counter()
        score = evaluate and _evaluation_due(run, run.step) and not reason
        save = last or reason or _due(run.position, config.checkpoints.every_epochs, run.plan.steps_per_epoch)
        if score or save:
            ranks.average_running_statistics()
        if save:
            _save(run, watchdog)
            longest.save = max(longest.save, time.perf_counter() - paused)
        if evaluate and score:
            begun = time.perf_counter()
            _score(run, evaluate, log, bar)
            _keep_best(run, watchdog, saved=bool(save))
            longest.evaluation = max(longest.evaluation, time.perf_counter() - begun)
        since += time.perf_counter() - paused
    bar.close()
    if log:
        log.close()
    return reason


def _evaluation_due(run: Training, step: int) -> bool:
    config = run.config.evaluation
    return step == run.last_step or _due(run.plan.position(step), config.every_epochs, run.plan.steps_per_epoch)


def _save(run: Training, watchdog: Watchdog) -> None:
    """Write a checkpoint on rank 0, for which the others wait. Collective of the world; blocks."""

    def write() -> None:
        run.check()
        keep, best = run.config.checkpoints.keep, run.output / read_best(run.output).file
        save_checkpoint(run.checkpoints, run.step, run.state(), keep=keep, spared=best, check=run.check)

    watchdog.alone(write, name="saved")


def _keep_best(run: Training, watchdog: Watchdog, *, saved: bool) -> None:
    """Keep this step's checkpoint where its AP is the highest so far. Collective of the world; blocks.

    A step without a checkpoint gets one, unless the run is to write one at its end only.

    Args:
        saved: whether the step has its checkpoint already.
    """
    config = run.config.checkpoints
    if not (config.keep_best and run.metrics["AP"] > run.best_ap):  # never where the AP is NaN
        return
    if not saved and config.every_epochs == 0:
        return
    run.best_ap = run.metrics["AP"]
    if not saved:
        _save(run, watchdog)
    if run.world.rank == 0:
        run.check()
        note_best(run.output, run.checkpoints / checkpoint_name(run.step), run.metrics)


def _score(run: Training, evaluate: Evaluate, log: MetricsLog | None, bar: Any) -> None:
    """Evaluate and log. Collective of the world; blocks."""
    run.metrics = evaluate()
    if log:
        scores = {f"val/{key}": value for key, value in run.metrics.items()}
        log.write(run.step, {"epoch": run.position / run.plan.steps_per_epoch, **scores})
        bar.write(f"step {run.step}: validation {score_text(run.metrics)}")


def _speeds(run: Training, seconds: float, data_seconds: float, steps: int) -> dict[str, float]:
    """Times of the last steps: the mean over ranks, and the maximum, since the slowest rank sets the pace."""
    times = run.world.allgather_object((seconds, data_seconds), name="times")
    slowest = max(total for total, _ in times)
    return {
        "images_per_s": run.plan.global_batch * steps / slowest,
        "step_mean_s": sum(total for total, _ in times) / len(times) / steps,
        "step_max_s": slowest / steps,
        "data_mean_s": sum(data for _, data in times) / len(times) / steps,
        "data_max_s": max(data for _, data in times) / steps,
    }


def _log(
    log: MetricsLog, bar: Any, run: Training, results: list[StepResult], rate: float, speeds: dict[str, float]
) -> None:
    """Write one row: losses and gradient norm as means over the steps since the last row, the newest rate.

    The norm is over the steps that were not skipped, and missing where all were.
    """
    means = {key: fmean(result.losses[key] for result in results) for key in results[0].losses}
    norms = [result.gradient_norm for result in results if not result.skipped]
    total = sum(means.values())
    epoch = run.position / run.plan.steps_per_epoch
    losses = {key if key.startswith("loss") else f"loss_{key}": value for key, value in means.items()}
    row = {
        "epoch": epoch,
        "loss": total,
        **losses,
        "lr": rate,
        **({"gradient_norm": fmean(norms)} if norms else {}),
        **speeds,
    }
    if run.precision.scaler.is_enabled():
        row |= {"grad_scale": run.precision.scaler.get_scale(), "skipped_steps": len(results) - len(norms)}
    log.write(run.step, row)
    bar.set_postfix_str(f"epoch {epoch:.2f} loss {total:.3f} lr {rate:.4f} {speeds['images_per_s']:.1f} images/s")
