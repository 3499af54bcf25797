"""What rank 0 writes while a run trains: rows of metrics.jsonl and the progress bar."""

from __future__ import annotations

from statistics import fmean

from megdet_hpc.engine.step import StepResult
from megdet_hpc.engine.training import Training
from megdet_hpc.evaluation.coco import score_text
from megdet_hpc.log import MetricsLog, progress_bar


class Progress:
    """The log and the bar of a run. Other ranks than 0 have neither, and call it all the same.

    Args:
        run: training that is about to start.
    """

    def __init__(self, run: Training) -> None:
        self._run, shows = run, run.world.rank == 0
        self._log = MetricsLog(run.output, run.step, run.check) if shows else None
        self._bar = progress_bar(initial=run.step, total=run.last_step, unit="step", disable=not shows, smoothing=0.05)
        self._results: list[StepResult] = []

    def earlier_scores(self) -> dict[str, float]:
        """What an earlier start of this run measured at its step; empty if nothing. On rank 0."""
        return self._log.validation(self._run.step) if self._log else {}

    def add(self, result: StepResult) -> None:
        """Take note of a step that is done."""
        self._results.append(result)
        self._bar.update()
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
            self._log.write(run.step, {"epoch": run.position / run.plan.steps_per_epoch, **scores})
            self._bar.write(f"step {run.step}: validation {score_text(run.metrics)}")

    def row(self, rate: float, speeds: dict[str, float]) -> None:
        """Write one row: losses and gradient norm as means over the steps since the last row, the newest rate.

        The norm is over the steps that were not skipped, and missing where all were.

        Args:
            rate: learning rate of the last step.
            speeds: times that `StepClock` gives.
        """
        results, self._results = self._results, []
        if not self._log:
            return
        run = self._run
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
        self._log.write(run.step, row)
        self._bar.set_postfix_str(
            f"epoch {epoch:.2f} loss {total:.3f} lr {rate:.4f} {speeds['images_per_s']:.1f} images/s"
        )

    def close(self) -> None:
        """Close both."""
        self._bar.close()
        if self._log:
            self._log.close()
