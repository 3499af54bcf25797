"""The scores of a run's checkpoints, taken beside the training: `megdet evaluate --follow RUN`.

With `evaluation.mode deferred` the training leaves checkpoints (log/deferred.py). The follower scores each as it
appears, in a job of its own with any number of ranks. All that it knows is on disk. So it may be started before the
run, killed and started again, and each checkpoint is scored once.
"""

from __future__ import annotations

import math
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megdet_hpc import owner
from megdet_hpc.config import Config
from megdet_hpc.config.outcome import EMA_PREFIX
from megdet_hpc.data.categories import Categories
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.engine.agreement import require_agreement
from megdet_hpc.engine.arithmetic import set_arithmetic
from megdet_hpc.engine.checkpoint import load_checkpoint, note_best, prune_checkpoints, read_best
from megdet_hpc.engine.ownership import owned
from megdet_hpc.errors import MachineError, UserError
from megdet_hpc.evaluation.coco import Scores, result_line, score_text
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.log.deferred import FOLDER, Due, content_key, give_up, read_due, score_rows, settle, waiting
from megdet_hpc.log.metrics import scores_of
from megdet_hpc.log.trackers import Trackers
from megdet_hpc.models.factory import restored_detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.record.journal import NOW, read_starts
from megdet_hpc.record.run_record import configuration
from megdet_hpc.report.drawing import draw_run
from megdet_hpc.solver.precision import Precision, keep_coordinates_float32
from megdet_hpc.validation.scores import Validation

Configure = Callable[[dict[str, Any]], Config]


@dataclass(frozen=True)
class _Task:
    """A checkpoint to score, for all ranks."""

    due: Due
    state: dict[str, Any]
    config: Config


@dataclass(frozen=True)
class _End:
    """The end of the follower."""

    finished: bool
    text: str


class _Watch:
    """What rank 0 sees of the run.

    Args:
        run: folder of the run.
        patience: time without a sign of the run after which the follower ends [seconds].
        configure: gives the configuration for a checkpoint's content.
        check: raises where another follower has taken over.
    """

    def __init__(self, run: Path, patience: float, configure: Configure, check: Callable[[], None]) -> None:
        self._run, self._patience, self._configure, self._check = run, patience, configure, check
        self._sign: Any = None
        self._moved = time.monotonic()
        self._told = ""

    def next(self) -> _Task | _End | None:
        """The next checkpoint, the end, or None where it has to be waited for."""
        finished = self._finished()  # before the look for checkpoints: the run leaves its last one before it ends
        for due in waiting(self._run):
            if task := self._task(due, finished):
                self._moved = time.monotonic()
                return task
        left = waiting(self._run)
        if not read_due(self._run) and self._mode() == "inside":
            raise UserError(
                f"--follow {self._run}: the run scores its checkpoints itself (evaluation.mode inside); "
                "accepted: a run with evaluation.mode deferred"
            )
        if finished and not left:
            return _End(True, "the run has ended, and every checkpoint that it left is scored")
        return self._waits()

    def _waits(self) -> _End | None:
        sign = (len(read_due(self._run)), len(read_starts(self._run)), _stamp(self._run / NOW))
        if sign != self._sign:
            self._sign, self._moved = sign, time.monotonic()
        idle = time.monotonic() - self._moved
        if idle > self._patience:
            return _End(
                False,
                f"no sign of the run for {idle / 60:.0f} minutes (--patience); start the follower again to go on",
            )
        self._tell("waits for the next checkpoint" if read_starts(self._run) else "waits for the run to begin")
        return None

    def _tell(self, text: str) -> None:
        if text != self._told:
            print(f"{self._run}: {text}", flush=True)
            self._told = text

    def _finished(self) -> bool:
        """Whether the run has come to its end, and no other start of it is under way."""
        starts = read_starts(self._run)
        held = owner.may_be_held_by(self._run) is not None
        return bool(starts) and starts[-1].end == "finished" and not held

    def _mode(self) -> str:
        """evaluation.mode of the run's newest start; "" where it has not begun."""
        config = configuration(self._run)
        known = any(key.startswith("evaluation.") for key in config)
        return str(config.get("evaluation.mode", "inside")) if known else ""

    def _task(self, due: Due, finished: bool) -> _Task | None:
        """The task of a checkpoint; None where its file is not the one that was left.

        A file that was written again is announced again soon, unless the run has ended.
        """
        path = self._run / due.file
        try:
            if content_key(path) != due.key:
                if finished:
                    self._give_up(due, "the file is another one now")
                return None
            state = load_checkpoint(path)
        except FileNotFoundError:
            self._give_up(due, "the file is gone")
        except MachineError:
            raise
        except (UserError, zipfile.BadZipFile) as error:
            if path.is_file() and _same(path, due):
                self._give_up(due, f"the file is damaged ({error})")
        else:
            state.pop("optimizer", None)  # as large as the weights, and for the training alone
            return _Task(due, state, self._configure(state)) if _same(path, due) else None
        return None

    def _give_up(self, due: Due, why: str) -> None:
        print(f"step {due.step}: cannot be scored: {due.file}: {why}", flush=True)
        give_up(self._run, due, why, self._check)


def _same(path: Path, due: Due) -> bool:
    """Whether a file that was read is still the one that was left."""
    try:
        return content_key(path) == due.key
    except (OSError, zipfile.BadZipFile):
        return True  # damaged, or deleted after it was read


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


class _Waits:
    """The ranks of a follower, which no watchdog watches."""

    def __init__(self, world: Communicator) -> None:
        self._world = world

    def alone(self, work: Callable[[], Any], *, name: str) -> Any:
        """The result of rank 0's work, on every rank. Collective of the world; blocks."""
        return self._world.broadcast_object(work() if self._world.rank == 0 else None, name=name)


class _Scorer:
    """The detector and the validation set of one configuration, for one checkpoint after another.

    Collective of the world.

    Args:
        task: first checkpoint.
        runtime: runtime of this process.
        command: command line, which must be the same on all ranks.
    """

    def __init__(self, task: _Task, runtime: Runtime, command: str) -> None:
        self.config, self._world = task.config, runtime.world
        config = task.config
        if not config.data.val:
            raise UserError("data.val is null; name the packed set to score")
        set_arithmetic(config)
        device = runtime.device(config.device)
        dataset = DetectionDataset.open(
            config.data.val, config.data, training=False, seed=0, geometry=config.model.geometry
        )
        require_agreement(self._world, {"the command line": command}, {"data.val": dataset.pack})
        trained = Categories.of_checkpoint(task.state, dataset.categories)
        model = restored_detector(
            config, task.state["model"], task.due.file, num_categories=len(trained), group=self._world
        )
        keep_coordinates_float32(model.to(device))
        self._model = model
        precision = Precision(config.solver.precision, device)
        self.validation = Validation(config, trained, dataset, device, self._world, precision)
        if self._world.rank == 0:
            print("".join(f"{line}\n" for line in self.validation.said), end="", flush=True)

    def scores(self, task: _Task, run: Path, check: Callable[[], None]) -> dict[str, float]:
        """The scores of a checkpoint's weights, and of its averaged ones as ema_AP and so on."""
        averaged = task.state.get("ema")
        metrics = self._of(task.state["model"], task, run, check, main=averaged is None)
        if averaged is not None:
            found = self._of(averaged["model"], task, run, check, main=True)
            metrics |= {EMA_PREFIX + key: value for key, value in found.items()}
        return metrics

    def _of(
        self, weights: dict[str, Any], task: _Task, run: Path, check: Callable[[], None], *, main: bool
    ) -> dict[str, float]:
        self._model.load_state_dict(weights)

        def finish(detections: DetectionTable, scores: Scores) -> None:
            check()
            if task.due.last:
                self.validation.write_last(run, detections, scores, main=main)

        return self.validation(self._model, finish, _Waits(self._world))


def follow(
    run: Path, runtime: Runtime, configure: Configure, *, patience: float, interval: float, command: str
) -> bool:
    """Score the checkpoints of a run until it has ended. Collective of the world (`follow`, and those of a validation).

    Args:
        run: folder of the run, which need not exist yet.
        runtime: runtime of this process.
        configure: gives the configuration for a checkpoint's content.
        patience: time without a sign of the run after which the follower ends [seconds].
        interval: time between two looks at the folder [seconds].
        command: command line of this rank.

    Returns:
        Whether the run has ended and all is scored.

    Raises:
        UserError: another follower is at work, or the run scores itself.
    """
    world = runtime.world
    with _held(run, world) as check:
        watch = _Watch(run, patience, configure, check) if world.rank == 0 else None
        scorer: _Scorer | None = None
        while True:
            found = world.broadcast_object(watch.next() if watch else None, name="follow")
            if isinstance(found, _End):
                if watch:
                    _leave(run, found, check)
                return found.finished
            if found is None:
                time.sleep(interval)  # no rank polls meanwhile
                continue
            begin = time.monotonic()
            if scorer is None or scorer.config != found.config:
                scorer = _Scorer(found, runtime, command)
            metrics = scorer.scores(found, run, check)
            if watch:
                _note(run, found, metrics, check)
                more = f"; {left} more wait" if (left := len(waiting(run))) else ""
                seconds = time.monotonic() - begin
                print(f"step {found.due.step}: validation {score_text(metrics)}; {seconds:.1f} s{more}", flush=True)


@contextmanager
def _held(run: Path, world: Communicator) -> Iterator[Callable[[], None]]:
    """The follower's part of a run's folder, held by rank 0; gives the check that it still is. `owner`."""
    try:
        with owned(run / FOLDER, world) as held:
            yield held.check
    finally:
        if world.rank == 0:
            with suppress(OSError):
                run.rmdir()  # of a run that never began


def _note(run: Path, task: _Task, metrics: dict[str, float], check: Callable[[], None]) -> None:
    """Write down a checkpoint's scores. best.json first: what is scored and not the best may be deleted."""
    config = task.config
    by, prefix = config.evaluation.score_name, EMA_PREFIX if task.state.get("ema") else ""
    highest = read_best(run).highest_by(by)
    path = run / task.due.file
    if config.checkpoints.keep_best and metrics.get(prefix + by, math.nan) > highest and path.is_file():
        check()
        note_best(run, path, metrics, prefix, by)
    row = {f"val/{key}": value for key, value in metrics.items()}
    settle(run, task.due, row, check)
    if "tensorboard" in config.log.trackers:
        # a folder of its own, since a second writer in the training's would hide what came before
        board = Trackers(("tensorboard",), run / FOLDER, task.due.step - 1)
        board.write(task.due.step, {key: value for key, value in row.items() if not math.isnan(value)})
        board.close("finished")


def _leave(run: Path, end: _End, check: Callable[[], None]) -> None:
    """Delete what nobody needs any more, draw the curves, and say the last words. Rank 0 only."""
    rows = score_rows(run)
    if end.finished and rows:
        check()
        _prune(run)
        draw_run(run)
    print(f"{run}: {end.text}", flush=True)
    best = read_best(run)
    if rows and best.file:
        print(f"highest {best.metric}: {best.highest:.3f}, checkpoint {run / best.file}")
    if end.finished and rows:
        print(result_line(scores_of(rows[-1]), output=run), flush=True)


def _prune(run: Path) -> None:
    """Delete the checkpoints that the training kept for the follower alone, unless the run goes on by now."""
    with suppress(UserError):
        claim = owner.take(run, environ={})  # no part of a job's claim on the follower's folder
        try:
            keep, step = int(configuration(run)["checkpoints.keep"]), read_starts(run)[-1].end_step or 0
            prune_checkpoints(run / "checkpoints", step, keep, {run / read_best(run).file}, claim.check)
        finally:
            claim.release()
