"""The loop around the step: load, train, log, evaluate, save."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from megdet_hpc.data.batch import Batch, fixed_side
from megdet_hpc.data.loader import make_loader
from megdet_hpc.data.sampler import RankSampler
from megdet_hpc.engine.checkpoint import checkpoint_name, note_best, read_best, save_checkpoint
from megdet_hpc.engine.passes import Passes, RankPasses
from megdet_hpc.engine.progress import Progress
from megdet_hpc.engine.step import train_step
from megdet_hpc.engine.step_clock import StepClock
from megdet_hpc.engine.stop import StopRequests
from megdet_hpc.engine.training import Training
from megdet_hpc.engine.watchdog import Watchdog

Evaluate = Callable[[], dict[str, float]]


def train(run: Training, evaluate: Evaluate | None, stop: StopRequests, watchdog: Watchdog) -> str:
    """Train from run.step to run.last_step, or to where `stop` ends it. Collective of the world.

    Args:
        run: objects and position. Its step, metrics and weights move on.
        evaluate: collective that returns the validation metrics on every rank; None without validation set.
        stop: asked after every step.
        watchdog: told of every step, and of what rank 0 does alone.

    Returns:
        Why the run stopped before its end, its state saved; "" if it is complete.
    """
    world, passes = run.world, run.passes or RankPasses(run.model, run.world, run.precision)
    progress, reason = Progress(run), ""
    _take_up_scores(run, evaluate, progress, watchdog)
    batches, clock = _batches(run, passes), StepClock()
    run.model.train()
    stop.listen()
    while run.step < run.last_step and not reason:
        watchdog.tick(run.step)
        with clock.step():
            with clock.loading():
                mine = [batch.to(run.device) for batch in next(batches)]
            result = train_step(
                run.model,
                run.optimizer,
                mine,
                step=run.step,
                seed=run.config.seed,
                lr=(rate := run.schedule.lr_at(run.step)),
                clip_norm=run.config.solver.clip_norm,
                world=world,
                passes=passes,
                flags=stop.flags(world.rank, _until_after_next(run, clock)),
            )
        run.step += 1
        progress.add(result)
        last = run.step == run.last_step
        reason = "" if last else stop.reason(result.flags, world)
        if run.step % run.config.log_every == 0 or last or reason:
            speeds = clock.speeds(world, run.plan.global_batch)
            watchdog.learn()
            progress.row(rate, speeds)
            clock.restart()
        with clock.pause():
            _save_and_evaluate(
                run, None if reason else evaluate, passes, progress, watchdog, clock, ends=last or bool(reason)
            )
    progress.close()
    return reason


def _batches(run: Training, passes: Passes) -> Iterator[list[Batch]]:
    """The micro-batches of one update after another, for this process; its loader starts now."""
    data = run.config.data
    loader = make_loader(
        run.dataset,
        RankSampler(run.plan, passes.ranks, run.step, run.last_step),
        num_workers=data.num_workers,
        pin_memory=run.device.type == "cuda",
        side=fixed_side(data, run.config.model.geometry),
        decode_on=run.device if data.decode_on_gpu else None,
    )
    batches, number = iter(loader), run.plan.accumulate * len(passes.ranks)
    return iter(lambda: list(itertools.islice(batches, number)), [])


def _until_after_next(run: Training, clock: StepClock) -> float:
    """What this step and the one after it take at most, the evaluations after them and a checkpoint included [s]."""
    return clock.until_after_next(sum(run.evaluation_due(run.step + ahead) for ahead in (1, 2)))


def _take_up_scores(run: Training, evaluate: Evaluate | None, progress: Progress, watchdog: Watchdog) -> None:
    """Bring the scores of a resumed run up to its step. Collective of the world; blocks."""
    scored = (progress.earlier_scores(), read_best(run.output).AP) if run.world.rank == 0 else None
    run.metrics, run.best_ap = run.world.broadcast_object(scored, name="scored")
    if evaluate and run.step and not run.metrics and run.evaluation_due(run.step):
        _score(run, evaluate, progress)
    if run.metrics:  # also where a run ended between the score and the note of it
        _keep_best(run, watchdog, saved=False)


def _save_and_evaluate(
    run: Training,
    evaluate: Evaluate | None,
    passes: Passes,
    progress: Progress,
    watchdog: Watchdog,
    clock: StepClock,
    *,
    ends: bool,
) -> None:
    """Do what is due after a step. Collective of the world; blocks.

    If a checkpoint and an evaluation fall on one step, the checkpoint comes first. A job that ends in the evaluation
    then loses nothing, and the resumed run makes up for the evaluation.

    Args:
        evaluate: collective that scores; None: nothing is scored now.
        ends: whether this was the run's last step, which is always saved.
    """
    scores, saves = bool(evaluate) and run.evaluation_due(run.step), ends or run.checkpoint_due(run.step)
    if saves:
        with clock.longest("save"):
            passes.average_running_statistics()
            _save(run, watchdog)
    elif scores:
        passes.average_running_statistics()
    if evaluate and scores:
        with clock.longest("evaluation"):
            _score(run, evaluate, progress)
            _keep_best(run, watchdog, saved=saves)


def _score(run: Training, evaluate: Evaluate, progress: Progress) -> None:
    """Evaluate and log. Collective of the world; blocks."""
    run.metrics = evaluate()
    progress.scores()


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
