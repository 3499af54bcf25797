"""The picture of several runs: AP and loss, over the images seen and over the time of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogFormatter

from megdet_hpc.compare.table import score_names
from megdet_hpc.data.page import plain
from megdet_hpc.files import atomic_write
from megdet_hpc.record.run_record import RunRecord

# Parts of a run's rows over which the bold line of its losses is a mean.
_PARTS = 40
_UNITS = {"hours": 1.0, "minutes": 60.0}  # the largest unit of which there are two; each by its number in an hour
_STYLES = ("-", "--", ":", "-.")
_LEGEND_COLUMNS = 3


def _smooth(values: Sequence[float]) -> tuple[np.ndarray, int]:
    """The mean of the rows up to each one, and over how many: a fortieth of the run, one row at least."""
    window = max(len(values) // _PARTS, 1)
    sums = np.cumsum([0.0, *values])
    begins = np.maximum(np.arange(len(values)) + 1 - window, 0)
    ends = np.arange(len(values)) + 1
    return (sums[ends] - sums[begins]) / (ends - begins), window


def drawn_scores(records: Sequence[RunRecord]) -> tuple[str, list[list[float | None]]]:
    """The score that is drawn, as a label, and its values at each validation of each run.

    It is that of evaluation.metric where all runs have the same, else COCO's AP, which all have.
    """
    metrics = score_names(records)
    if len(metrics) == 1:
        return metrics[0], [[score.own for score in record.scores] for record in records]
    return "COCO's AP (the runs' metrics differ)", [[score.AP for score in record.scores] for record in records]


def draw_comparison(records: Sequence[RunRecord], names: Sequence[str], picture: Path) -> None:
    """Draw four panels: scores above, losses below, over images on the left and over time on the right.

    Args:
        records: runs.
        names: their names in the legend.
        picture: PNG to write.

    Raises:
        OSError: it cannot be written.
    """
    figure, panels = plt.subplots(2, 2, figsize=(12, 8.5), sharex="col", layout="constrained")
    hours = max((record.positions[-1].hours for record in records if record.positions), default=0.0)
    unit, per_hour = next(((unit, each) for unit, each in _UNITS.items() if hours * each >= 2), ("seconds", 3600.0))
    windows: set[int] = set()
    what, scores = drawn_scores(records)
    colors = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for number, (record, name) in enumerate(zip(records, names, strict=True)):
        color, style = colors[number % len(colors)], _STYLES[number // len(colors) % len(_STYLES)]
        losses = [row["loss"] for row in record.rows]
        means, window = _smooth(losses)
        windows.add(window)
        axes_of: tuple[tuple[list[float], list[float]], ...] = (
            ([at.images for at in record.positions], [score.images for score in record.scores]),
            ([at.hours * per_hour for at in record.positions], [score.hours * per_hour for score in record.scores]),
        )
        for column, (places, scored) in enumerate(axes_of):
            known = [(x, value) for x, value in zip(scored, scores[number], strict=True) if value is not None]
            if known:
                panels[0, column].plot(
                    *zip(*known, strict=True), style, color=color, marker="o", markersize=4, clip_on=False
                )
            if window > 1:
                panels[1, column].plot(places, losses, color=color, alpha=0.2, linewidth=0.8)
            alone = "o" if len(losses) == 1 else None
            label = plain(name) if column == 0 else None
            panels[1, column].plot(places, means, style, color=color, marker=alone, linewidth=1.8, label=label)
    _finish(panels, unit, windows, f"{what} of boxes on the validation set")
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), _LEGEND_COLUMNS), fontsize=9)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _finish(panels: np.ndarray, unit: str, windows: set[int], scored: str) -> None:
    """Titles, axes and grids."""
    least, most = min(windows), max(windows)
    over = "" if most == 1 else f", bold: mean of {least if least == most else f'{least} to {most}'} rows"
    score: Axes
    loss: Axes
    for score, loss in panels.T:
        score.set_ylabel(scored)
        loss.set_ylabel(f"loss{over}")
        if any(line.get_ydata().size for line in loss.get_lines()):  # type: ignore[union-attr]
            loss.set_yscale("log")
            loss.yaxis.set_major_formatter("{x:g}")
            loss.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5), labelOnlyBase=False))
        score.set_ylim(bottom=0)
        if not score.get_lines():
            score.text(0.5, 0.5, "no evaluation yet", transform=score.transAxes, ha="center")
    panels[0, 0].set_title("over images seen")
    panels[0, 1].set_title("over the time of the steps (without start, evaluation, saving)")
    panels[1, 0].set_xlabel("images seen")
    panels[1, 0].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[1, 1].set_xlabel(unit)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
