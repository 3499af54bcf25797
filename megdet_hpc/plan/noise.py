"""The mini-batch beyond which more GPUs no longer pay, from the gradient noise scale that a run measured.

The answer of `megdet variance-probe` stands beside it where there is one. Only its files are read, without torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from megdet_hpc.errors import UserError
from megdet_hpc.log import read_metrics

_PARTS = ("first", "middle", "last")
_LEAST_ROWS = 3
PROBE_FILE = "variance.json"
"""Results of `megdet variance-probe`, in its --output."""


@dataclass(frozen=True)
class NoiseScale:
    """The noise scale of a part of a run.

    Attributes:
        part: first, middle or last third of the rows.
        steps: first and last step of these rows.
        images: noise scale; None where the mean gradient cannot be told from its noise.
    """

    part: str
    steps: tuple[int, int]
    images: float | None


def noise_scales(run: Path) -> list[NoiseScale]:
    """The noise scale of each third of a run: mean variance over mean signal of its rows.

    Raises:
        UserError: there is no such folder, or the run has too few measurements.
    """
    if not run.is_dir():
        raise UserError(f"--from {run}: no such folder; accepted: the folder of a run, its --output")
    file = run / "metrics.jsonl"
    rows = [row for row in read_metrics(file) if row.get("gradient_signal") is not None]
    if 0 < len(rows) < _LEAST_ROWS:
        raise UserError(
            f"--from {run}: {file} has {len(rows)} row(s) with a gradient noise scale; accepted: {_LEAST_ROWS} or "
            "more, of a longer run or with a smaller log_every"
        )
    if not rows:
        raise UserError(
            f"--from {run}: {file} has no row with a gradient noise scale; accepted: {_LEAST_ROWS} or more, "
            "which a run with solver.noise_every on two ranks or more writes"
        )
    ends = [len(rows) * part // len(_PARTS) for part in range(len(_PARTS) + 1)]
    parts = [rows[first:end] for first, end in pairwise(ends)]
    return [
        NoiseScale(part, (own[0]["step"], own[-1]["step"]), _scale(own))
        for part, own in zip(_PARTS, parts, strict=True)
    ]


def _scale(rows: list[dict[str, Any]]) -> float | None:
    signal = fmean(row["gradient_signal"] for row in rows)
    variance = fmean(row["gradient_variance_per_image"] for row in rows)
    return variance / signal if signal > 0 and variance > 0 else None


def describe_noise(run: Path, batch: int) -> list[str]:
    """Lines on what the noise scale of a run says of a mini-batch.

    Args:
        run: folder of the run.
        batch: images of an update of the plan.

    Raises:
        UserError: the run has too few measurements.
    """
    found = noise_scales(run)
    lines = [f"noise scale    of {run}, its thirds:"]
    for one in found:
        text = "not to be told: signal or variance is not above 0" if one.images is None else f"{one.images:.3g} images"
        lines.append(f"               {one.part:6} steps {one.steps[0]} to {one.steps[1]}: {text}")
    known = [one.images for one in found if one.images is not None]
    if not known:
        return [*lines, "               the mean gradient is lost in its noise: measure longer, or on more ranks"]
    most = max(known)
    # McCandlish et al. (2018), section 2.3: updates = least * (1 + scale / batch), images = least * (1 + batch / scale)
    return [
        *lines,
        f"               beyond a mini-batch of {most:.3g} images more GPUs no longer pay for this model and data: it",
        "               takes twice the least number of updates, and a larger one needs more images for each it saves",
        f"               this plan's {batch}: {1 + most / batch:.3g} times the least number of updates, "
        f"{1 + batch / most:.3g} times the least number of images",
        "               (an estimate: it assumes that ranks with common statistics have independent gradients)",
    ]


def probe_files(run: Path, named: Path | None) -> list[Path]:
    """The results of the variance probe that is named, else of those in a run's folder or one folder deeper.

    Raises:
        UserError: there are none in the folder that is named.
    """
    if named is None:
        return [*filter(Path.is_file, [run / PROBE_FILE]), *sorted(run.glob(f"*/{PROBE_FILE}"))]
    if not (named / PROBE_FILE).is_file():
        raise UserError(f"--probe {named}: has no {PROBE_FILE}; accepted: the --output of megdet variance-probe")
    return [named / PROBE_FILE]


def describe_probes(run: Path, named: Path | None) -> list[str]:
    """Lines on what the variance probe says of the noise scale, and on what each of both measures.

    Args:
        run: folder of the run, whose own answer stands before.
        named: folder of the probe's results; None: those in the run, if any.

    Raises:
        UserError: the results cannot be read.
    """
    lines: list[str] = []
    for file in probe_files(run, named):
        lines += [f"variance probe of {file.parent}, whole mini-batches at fixed weights:", *_probe_lines(file)]
    if not lines:
        return ["variance probe none in this run; --probe DIR names the --output of megdet variance-probe"]
    return [
        *lines,
        "both measure   variance of one image's gradient over the square of the mean gradient, in images. The run:",
        "               gradients of its ranks, while the weights move; what ranks share (statistics, counts) counts",
        "               as mean, so it is rather too small. The probe: independent draws of whole mini-batches, at",
        "               weights that stay, with the normalization named. Compare the steps that are near each other",
    ]


def _probe_lines(file: Path) -> list[str]:
    """A line for each state and normalization: the noise scale of all parts at the largest mini-batch measured."""
    try:
        rows = [row for row in json.loads(file.read_text())["rows"] if row["part"] == "all"]
        largest: dict[tuple[str, str], dict[str, Any]] = {}
        for row in sorted(rows, key=lambda row: row["batch"]):
            largest[row["state"], row["norm"]] = row
        return [
            f"{'':15}{state}, {norm}, {row['batch']} images: {_images(row['noise_scale'])}, {row['draws']} draws"
            for (state, norm), row in largest.items()
        ] or ["               nothing was measured"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read as results of megdet variance-probe ({error!r})") from error


def _images(scale: float | None) -> str:
    return "lost in its noise" if scale is None else f"{scale:.3g} images"
