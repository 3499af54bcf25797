"""The output of rank 0 during training: rows of metrics.jsonl, the journal and the progress bar."""

from __future__ import annotations

import math
import socket
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from statistics import fmean
from types import TracebackType

from megdet_hpc import owner
from megdet_hpc.engine.step import StepResult
from megdet_hpc.engine.training import Training
from megdet_hpc.engine.watchdog import Watchdog
from megdet_hpc.evaluation.coco import score_text
from megdet_hpc.log import MetricsLog, progress_bar, time_to_ap
from megdet_hpc.record.journal import Journal, Phase, Start

# Characters of an error in the journal.
_LONGEST_REASON = 300


class Progress:
    """The log, the journal and the bar of a run. On other ranks than 0 the methods do nothing.

    It is a context; leaving it closes them and notes how the run ended.

    Args:
        run: training that is about to start.
        watchdog: told hosts and limit, which the journal has.
    """

    def __init__(self, run: Training, watchdog: Watchdog) -> None:
        self._run, shows = run, run.world.rank == 0
        self._reason = ""
        self._log = MetricsLog(run.output, run.step, run.check, run.config.log.trackers) if shows else None
        self._bar = progress_bar(initial=run.step, total=run.last_step, unit="step", disable=not shows, smoothing=0.05)
        self._journal = _journal(run, watchdog) if shows else None
        self._results: list[StepResult] = []
        self._hours, self._row = self._log.hours(run.config.log_every) if self._log else (0.0, 0)
        self._reached = self._log.reached() if self._log else frozenset[str]()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        how, why = ("stopped", self._reason) if self._reason else ("finished", "")
        if kind is not None:
            how, why = "failed", f"{kind.__name__}: {error}"
        if self._journal:
            self._journal.close(how, " ".join(why.split())[:_LONGEST_REASON])
        if self._log:
            self._log.close(how)

    def ends(self, reason: str) -> str:
        """Take note of how the run ends: the reason to stop before its end, or "". Gives it back."""
        self._reason = reason
        return reason

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """The time in which rank 0 does something else than training."""
        return self._journal.phase(name) if self._journal else nullcontext()

    def earlier_scores(self) -> dict[str, float]:
        """Scores of this step from an earlier start of the run, on rank 0; empty if there are none."""
        return self._log.validation(self._run.step) if self._log else {}

    def add(self, result: StepResult) -> None:
        """Add the result of a step."""
        self._results.append(result)
        self._bar.update()
        if self._journal:
            self._journal.step(self._run.step)
        if result.skipped and self._log:
            scale = self._run.precision.scaler.get_scale()
            self._bar.write(
                f"step {self._run.step}: the gradient is not finite in float16; no update, loss scale now {scale:g}"
            )

    def scores(self) -> None:
        """Log the run's newest scores."""
        run = self._run
        if self._log:
            scores = {f"val/{key}": value for key, value in run.metrics.items()}
            first = self._first_times()
            self._log.write(run.step, {"epoch": run.epochs(run.step), **scores, **first})
            self._bar.write(f"step {run.step}: validation {score_text(run.metrics)}")
            for key, hours in first.items():
                target = key.split("/")[1]
                self._bar.write(f"step {run.step}: AP {target} for the first time, after {hours:.4g} h of steps")

    def _first_times(self) -> dict[str, float]:
        """Hours of steps by key of the metrics, for each of evaluation.targets that is reached for the first time."""
        ap = self._run.metrics.get(f"{self._run.scored}AP", math.nan)
        keys = {time_to_ap(target): target for target in self._run.config.evaluation.targets}
        found = {key: self._hours for key, target in keys.items() if ap >= target and key not in self._reached}
        self._reached |= found.keys()
        return found

    def row(self, rate: float, speeds: dict[str, float]) -> None:
        """Write one row: means of losses and gradient norm over the steps since the last row, and the newest rate.

        Skipped steps do not count in the norm. If all were skipped, it is missing.

        Args:
            rate: learning rate of the last step.
            speeds: times that `StepClock` gives.
        """
        results, self._results = self._results, []
        if not self._log:
            return
        run = self._run
        self._hours += (run.step - self._row) * speeds["step_max_s"] / 3600
        self._row = run.step
        means = {key: fmean(result.losses[key] for result in results) for key in results[0].losses}
        norms = [result.gradient_norm for result in results if not result.skipped]
        total = sum(means.values())
        epoch = run.epochs(run.step)
        losses = {key if key.startswith("loss") else f"loss_{key}": value for key, value in means.items()}
        row = {
            "epoch": epoch,
            "loss": total,
            **losses,
            "lr": rate,
            **({"gradient_norm": fmean(norms)} if norms else {}),
            **_noise(results),
            **({"adascale_gain": run.scaled.gain, "adascale_steps": run.scaled.steps} if run.scaled else {}),
            **speeds,
        }
        if run.precision.scaler.is_enabled():
            row |= {"grad_scale": run.precision.scaler.get_scale(), "skipped_steps": len(results) - len(norms)}
        self._log.write(run.step, row)
        self._bar.set_postfix_str(
            f"epoch {epoch:.2f} loss {total:.3f} lr {rate:.4f} {speeds['images_per_s']:.1f} images/s"
        )


def _noise(results: list[StepResult]) -> dict[str, float]:
    """Means of the measurements of the gradient noise scale since the last row; empty if there are none."""
    found = [result.noise for result in results if result.noise]
    if not found:
        return {}
    return {
        "gradient_signal": fmean(one.signal for one in found),
        "gradient_variance_per_image": fmean(one.variance for one in found),
    }


def _journal(run: Training, watchdog: Watchdog) -> Journal:
    """The journal of this start, begun. On rank 0."""
    holder = None
    with suppress(OSError):
        holder = owner.current(run.output)
    start = Start(
        time=time.time(),
        host=socket.gethostname(),
        job=holder.job if holder else "",
        ranks=run.world.size,
        hosts=tuple(watchdog.hosts),
        step=run.step,
        last_step=run.last_step,
        steps_per_epoch=run.plan.steps_per_epoch,
        global_batch=run.plan.global_batch,
        growth=tuple(
            (stage.step + run.step - run.position, stage.factor, stage.steps_per_epoch) for stage in run.plan.stages[1:]
        ),
        device=run.device.type,
    )
    return Journal(run.output, start, lambda: watchdog.limit, run.check)
