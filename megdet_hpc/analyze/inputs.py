"""What an analysis reads: the last evaluation of a run, or anybody's results file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megdet_hpc.errors import UserError
from megdet_hpc.log import config_files, read_metrics

WEIGHTS = ("raw", "ema")
_ROUNDING = 1e-3  # of AP; a results file has boxes to 0.001 pixels, and scores to 1e-6


@dataclass(frozen=True)
class AnalysisInputs:
    """The files of an analysis."""

    results: Path
    data_val: Path
    max_detections: int
    source: dict[str, str]
    """What is scored, for a reader."""
    logged_ap: float | None = None
    """AP in the run's log, of the evaluation that wrote the results; None where there is none to compare with."""
    own_val: Path | None = None
    """The set that the run was evaluated on, where data_val is another folder."""
    metric: str = "coco"
    """evaluation.metric: coco, voc07 or voc12."""


def _results_of(run: Path, last: dict[str, Any], weights: str | None) -> tuple[Path, str, str]:
    """The results file of a run's last evaluation, the name of its AP in the log, and its weights for a reader.

    Raises:
        UserError: averaged weights are asked for, and the run has none.
    """
    from megdet_hpc.config.outcome import EMA_PREFIX  # imported late, as in analyze/__main__.py
    from megdet_hpc.evaluation.results import RAW_RESULTS, RESULTS

    averaged = f"val/{EMA_PREFIX}AP" in last
    if weights == "ema" and not averaged:
        raise UserError(f"--weights ema: {run} has no averaged weights (solver.ema_decay); accepted: raw")
    if not averaged:
        return run / RESULTS, "val/AP", ""
    if weights == "raw":
        return run / RAW_RESULTS, "val/AP", ", raw weights"
    return run / RESULTS, f"val/{EMA_PREFIX}AP", ", averaged weights (ema)"


def inputs_of_run(
    run: Path, data_val: Path | None, max_detections: int | None, weights: str | None = None
) -> AnalysisInputs:
    """The last evaluation of a run.

    Args:
        run: folder of the run.
        data_val: packed set in place of the one in its configuration.
        max_detections: limit to use rather than the configured one; None for that.
        weights: raw or ema; None: ema where the run has averaged weights.

    Raises:
        UserError: no run, no evaluation, or no data.val.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; RUN is the folder of a run, its --output")
    files = config_files(run)
    if not files:
        raise UserError(f"{run}: holds no config.yaml, so it is no folder of a run")
    used = files[-1][1]
    try:
        config: Any = yaml.safe_load(used.read_text())
        own, limit = config["data"]["val"], int(config["evaluation"]["max_detections"])
        measure = config["evaluation"].get("metric", "coco")  # runs of earlier versions have no such key
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{used}: is no run's configuration: {error!r:.200}") from None
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "val/AP" in row]
    last = rows[-1] if rows else {}
    results, metric, kind = _results_of(run, last, weights)
    if not results.is_file():
        raise UserError(
            f"{run}: holds no {results.name}, which a run with a data.val writes at its end; of a run that has not "
            "ended, `megdet evaluate --checkpoint CHECKPOINT --data.val DIR --report DIR` analyzes a checkpoint"
        )
    if data_val is None and own is None:
        raise UserError(f"{used}: data.val is null; --data.val DIR names the set of {results}")
    if data_val is None and not Path(own).is_dir():
        raise UserError(
            f"{used}: data.val is {own}, which is no folder seen from here; --data.val DIR says where it is"
        )
    step = f"step {last['step']}, epoch {last.get('epoch', 0):g}" if last else "unknown: the log has no evaluation"
    source = {"run": str(run), "checkpoint": step + kind}
    other = Path(own) if own and data_val is not None and Path(own).is_dir() else None
    return AnalysisInputs(
        results, data_val or Path(own), max_detections or limit, source, last.get(metric), own_val=other, metric=measure
    )


def same_classes(inputs: AnalysisInputs, pack: Any) -> None:
    """Refuse a set whose category ids mean something else than those of the results.

    Raises:
        UserError: the run was evaluated on a set of other categories.
    """
    from megdet_hpc.data.categories import Categories
    from megdet_hpc.data.packed_coco import PackedCoco

    if inputs.own_val is not None:
        own = PackedCoco(inputs.own_val)
        theirs = f"the run's data.val, whose category ids {inputs.results} has,"
        Categories(own.categories).check_same(Categories(pack.categories), theirs, str(pack.directory))


def other_evaluation(inputs: AnalysisInputs, ap: float) -> list[str]:
    """A sentence where the results are not those of the evaluation in the log; else none."""
    logged = inputs.logged_ap
    if logged is None or ap != ap or abs(logged - ap) <= _ROUNDING:
        return []
    return [
        f"the run's log has AP {logged:.3f} at its last evaluation, and {inputs.results} scores {ap:.3f} here: "
        "it is of another evaluation, or of another set or limit"
    ]
