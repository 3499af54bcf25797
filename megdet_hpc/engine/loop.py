"""The loop around the step: load, train, log, evaluate, save."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import fmean

from megdet_hpc.data.ahead import on_device
from megdet_hpc.data.batch import Batch, fixed_side
from megdet_hpc.data.loader import make_loader
from megdet_hpc.data.sampler import RankSampler
from megdet_hpc.devices import is_gpu
from megdet_hpc.engine.arithmetic import quickest_convolutions
from megdet_hpc.engine.checkpoint import checkpoint_name, note_best, read_best, save_checkpoint
from megdet_hpc.engine.energy import EnergyMeter
from megdet_hpc.engine.passes import Passes, RankPasses
from megdet_hpc.engine.progress import Progress
from megdet_hpc.engine.step import StepResult, train_step
from megdet_hpc.engine.step_clock import StepClock
from megdet_hpc.engine.stop import StopRequests
from megdet_hpc.engine.training import Training
from megdet_hpc.engine.watchdog import Watchdog
from megdet_hpc.log.deferred import Due, content_key, leave, repeat_after, waiting

Evaluate = Callable[[], dict[str, float]]


def train(run: Training, evaluate: Evaluate | None, stop: StopRequests, watchdog: Watchdog) -> str:
    """Train from run.step to run.last_step, or until `stop` ends it. Collective of the world.

    Args:
        run: objects and position. Its step, metrics and weights are updated.
        evaluate: collective that returns the validation metrics on every rank; None without validation set.
        stop: asked after every step.
        watchdog: gets a tick for every step, and runs rank 0's work alone.

    Returns:
        The reason for which the run stopped early, with its state saved; "" if it is complete.
    """
    world = run.world
    meter = EnergyMeter(run.device, first_on_host=watchdog.hosts.index(watchdog.hosts[world.rank]) == world.rank)
    if world.rank == 0:  # before the bar, whose line it would share
        print(f"{'energy:':15s}{meter.text}", flush=True)
    with Progress(run, watchdog) as progress:
        return progress.ends(_train(run, evaluate, stop, watchdog, progress, meter))


def _train(
    run: Training,
    evaluate: Evaluate | None,
    stop: StopRequests,
    watchdog: Watchdog,
    progress: Progress,
    meter: EnergyMeter,
) -> str:
    """The body of `train`, which opens and closes what rank 0 writes."""
    world, passes = run.world, run.passes or RankPasses(run.model, run.world, run.precision)
    if run.world.rank == 0:
        repeat_after(run.output, run.step, run.check)
        if run.step and run.deferred and run.evaluation_due(run.step):
            _leave_to_follower(run)  # if the run before ended between the checkpoint and this
    if not run.deferred:
        _take_up_scores(run, evaluate, progress, watchdog)
    batches, clock, reason = _batches(run, passes), StepClock(hears=_hears(run), joules=meter.joules), ""
    sizes: list[int] = []  # images of each update since the last row
    result: StepResult | None = None
    run.model.train()
    stop.listen()
    while run.step < run.last_step and not reason:
        watchdog.tick(run.step)
        with clock.step():
            with clock.loading():
                mine = next(batches)
            with quickest_convolutions(run.config):
                result = train_step(
                    run.model,
                    run.optimizer,
                    mine,
                    step=run.step,
                    seed=run.config.seed,
                    lr=(rate := run.rate()),
                    clip_norm=run.schedule.clip_norm_at(run.step),
                    world=world,
                    passes=passes,
                    flags=(*stop.flags(world.rank, _until_after_next(run, clock)), _overdue(run, clock)),
                    earlier=result,
                    noise=run.noise,
                )
        sizes.append(run.plan.images_at(run.step))
        run.step += 1
        if run.average and not result.skipped:
            run.average.update(sizes[-1], passes.running_statistics())
        progress.add(result)
        last = run.step == run.last_step
        *stops, overdue = result.flags
        reason = "" if last else stop.reason(stops, world)
        saves = bool(overdue) or run.checkpoint_due(run.step) or last or bool(reason)
        due = saves or run.evaluation_due(run.step)
        logs = run.step % run.config.log_every == 0 or last or bool(reason)
        if logs or due:
            result.check(world)
        if logs:
            speeds = clock.speeds(world, fmean(sizes))
            sizes.clear()
            watchdog.learn()
            progress.row(rate, speeds)
            clock.restart()
        if due:
            with clock.pause():
                _save_and_evaluate(run, None if reason else evaluate, passes, progress, watchdog, clock, saves=saves)
    return reason


def _hears(run: Training) -> bool:
    """Whether the time in messages is measured: those that torch carries, and all of a GPU, are only queued."""
    return run.device.type == "cpu" and run.config.norm.transport != "torch"


def _batches(run: Training, passes: Passes) -> Iterator[list[Batch]]:
    """The micro-batches of each update in turn, for this process, on its device. The call starts the loader."""
    data = run.config.data
    loader = make_loader(
        run.dataset,
        RankSampler(run.plan, passes.ranks, run.step, run.last_step),
        num_workers=data.num_workers,
        pin_memory=is_gpu(run.device),
        side=fixed_side(data, run.config.model.geometry),
        decode_on=run.device if data.decode_on_gpu else None,
    )
    batches = iter(loader)
    numbers = (run.plan.passes_at(step) * len(passes.ranks) for step in range(run.step, run.last_step))
    return on_device((list(itertools.islice(batches, number)) for number in numbers), run.device)


def _until_after_next(run: Training, clock: StepClock) -> float:
    """Longest time of this step and the next one, with the evaluations after them and a checkpoint [s]."""
    return clock.until_after_next(sum(run.evaluation_due(run.step + ahead) for ahead in (1, 2)))


def _overdue(run: Training, clock: StepClock) -> float:
    """Whether a checkpoint is due by the clock of rank 0, as a flag of this rank."""
    return float(run.world.rank == 0 and clock.unsaved_for(run.config.checkpoints.every_minutes))


def _take_up_scores(run: Training, evaluate: Evaluate | None, progress: Progress, watchdog: Watchdog) -> None:
    """Get the scores of a resumed run's step, by an evaluation if there are none. Collective of the world; blocks."""
    scored = None
    if run.world.rank == 0:
        saved = (run.checkpoints / checkpoint_name(run.step)).is_file()
        scored = progress.earlier_scores(), read_best(run.output).highest_by(run.chosen_by), saved
    run.metrics, run.best_ap, saved = run.world.broadcast_object(scored, name="scored")
    if evaluate and run.step and not run.metrics and run.evaluation_due(run.step):
        _score(run, evaluate, progress)
    if run.metrics:  # also if the run before ended between the score and best.json
        _keep_best(run, watchdog, saved=saved)


def _save_and_evaluate(
    run: Training,
    evaluate: Evaluate | None,
    passes: Passes,
    progress: Progress,
    watchdog: Watchdog,
    clock: StepClock,
    *,
    saves: bool,
) -> None:
    """Write the checkpoint and run the evaluation that are due after a step. Collective of the world; blocks.

    If a checkpoint and an evaluation fall on one step, the checkpoint comes first. A job that ends in the evaluation
    then loses nothing, and the resumed run makes up for the evaluation. A deferred evaluation is a checkpoint that is
    left to the follower.

    Args:
        evaluate: collective that scores; None: no scoring now.
        saves: whether a checkpoint is due. One is after the run's last step.
    """
    due = run.evaluation_due(run.step)
    scores, leaves = bool(evaluate) and due, run.deferred and due
    saves = saves or leaves
    if saves:
        with clock.longest("save"), progress.phase("saving"):
            _average_statistics(run, passes)
            _save(run, watchdog)
            if leaves and run.world.rank == 0:
                _leave_to_follower(run)
    elif scores:
        _average_statistics(run, passes)
    if evaluate and scores:
        with clock.longest("evaluation"), progress.phase("evaluating"):
            _score(run, evaluate, progress)
            _keep_best(run, watchdog, saved=saves)


def _average_statistics(run: Training, passes: Passes) -> None:
    """Make running statistics, and their averages, equal over the ranks. Collective of the world; blocks."""
    passes.average_running_statistics(run.average.statistics if run.average else ())


def _score(run: Training, evaluate: Evaluate, progress: Progress) -> None:
    """Evaluate and log. Collective of the world; blocks."""
    run.metrics = evaluate()
    progress.scores()


def _save(run: Training, watchdog: Watchdog) -> None:
    """Write a checkpoint on rank 0, for which the others wait. Collective of the world; blocks."""

    def write() -> None:
        run.check()
        # before best.json, which a follower writes before a score: what is scored and not the best is not needed
        unscored = waiting(run.output)
        kept = unscored[-(run.config.evaluation.max_waiting or len(unscored)) :]
        spared = {run.output / file for file in (read_best(run.output).file, *(due.file for due in kept))}
        beyond = [due for due in unscored if due not in kept and (run.output / due.file).is_file()]
        keep = run.config.checkpoints.keep
        save_checkpoint(run.checkpoints, run.step, run.state(), keep=keep, spared=spared, check=run.check)
        for due in beyond:
            if not (run.output / due.file).is_file():
                print(f"step {due.step} stays without scores: more than evaluation.max_waiting wait", flush=True)

    watchdog.alone(write, name="saved")


def _leave_to_follower(run: Training) -> None:
    """Leave this step's checkpoint to be scored, unless it is left already. Rank 0 only."""
    path = run.checkpoints / checkpoint_name(run.step)
    if not path.is_file():  # the run went on from a checkpoint elsewhere
        return
    epoch, last = run.epochs(run.step), run.step == run.last_step
    file = path.relative_to(run.output).as_posix()
    leave(run.output, Due(run.step, epoch, file, content_key(path), last), run.check)


def _keep_best(run: Training, watchdog: Watchdog, *, saved: bool) -> None:
    """Keep this step's checkpoint if its AP is the highest so far. Collective of the world; blocks.

    The AP is that of evaluation.metric, and of the averaged weights, if the run has any. A step without a checkpoint
    gets one, unless checkpoints are written only at the end.

    Args:
        saved: whether the step has its checkpoint already.
    """
    config, ap = run.config.checkpoints, run.metrics.get(f"{run.scored}{run.chosen_by}", math.nan)
    if not (config.keep_best and ap > run.best_ap):  # false if the AP is NaN, or if an earlier start did not measure it
        return
    if not saved and config.every_epochs == 0:
        return
    run.best_ap = ap
    if not saved:
        _save(run, watchdog)
    if run.world.rank == 0:
        run.check()
        note_best(run.output, run.checkpoints / checkpoint_name(run.step), run.metrics, run.scored, run.chosen_by)
