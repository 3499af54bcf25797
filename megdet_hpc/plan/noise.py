"""The mini-batch beyond which more GPUs no longer pay, from the gradient noise scale that a run measured."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from megdet_hpc.errors import UserError
from megdet_hpc.log import read_metrics

_PARTS = ("first", "middle", "last")
_LEAST_ROWS = 3


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
        UserError: the run has too few measurements.
    """
    file = run / "metrics.jsonl"
    rows = [row for row in read_metrics(file) if row.get("gradient_signal") is not None]
    if len(rows) < _LEAST_ROWS:
        raise UserError(
            f"--from {run}: {file} has {len(rows)} rows with a gradient noise scale; accepted: {_LEAST_ROWS} or more, "
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
