"""The charts of an analysis as PNG bytes. Of hundreds of classes they show the worst; the CSV files have all."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megdet_hpc.analyze.analysis import Analysis, Rows
from megdet_hpc.data.page import plain

WORST_CLASSES = 30  # bars
WORST_CURVES = 8  # lines that can be told apart
WORST_CONFUSED = 20  # rows of a matrix whose numbers can be read
_LONGEST = 24  # letters of a name beside an axis


def png(figure: Figure) -> bytes:
    """A figure's PNG; the figure is closed."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()


def short(name: str) -> str:
    """A name that fits beside an axis, and that matplotlib does not take for mathematics."""
    text = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "\u2026"
    return plain(text)


def worst_classes(analysis: Analysis, count: int) -> Rows:
    """The classes with boxes of the lowest AP, the lowest first."""
    have = [row for row in analysis.classes if row["boxes"]]
    return sorted(have, key=lambda row: row["AP"])[:count]


def class_chart(analysis: Analysis) -> bytes:
    """Bars of AP50 and AP for each class."""
    rows = worst_classes(analysis, WORST_CLASSES)[::-1]
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.28 * len(rows)), layout="constrained")
    places = np.arange(len(rows))
    axes.barh(places, [row["AP50"] for row in rows], color="#9ecae1", label="AP50", height=0.75)
    axes.barh(places, [row["AP"] for row in rows], color="#08519c", label="AP", height=0.4)
    axes.set_yticks(places, [f"{short(row['class'])} ({row['boxes']:,})" for row in rows], fontsize=8)
    axes.set(xlim=(0, 1), ylim=(-0.6, max(len(rows), 1) - 0.4), xlabel="AP50 (light) and AP (dark)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return png(figure)


def curve_chart(analysis: Analysis) -> bytes:
    """Precision against recall: the mean over classes at three demands, and the worst classes at IoU 0.5."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    curves, place = analysis.curves, {row["class"]: k for k, row in enumerate(analysis.classes)}
    have = [k for k, row in enumerate(analysis.classes) if row["boxes"]]
    means = {"mean, IoU 0.50": "precision50", "mean, IoU 0.75": "precision75", "mean, 0.50 to 0.95": "precision"}
    for (label, key), style in zip(means.items(), ("-", "--", ":"), strict=True):
        axes.plot(curves["recall"], curves[key][have].mean(axis=0), color="black", ls=style, lw=2, label=label)
    for row in worst_classes(analysis, WORST_CURVES):
        own = curves["precision50"][place[row["class"]]]
        axes.plot(curves["recall"], own, lw=1, label=short(row["class"]))
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return png(figure)


def most_confused(matrix: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The classes with the most boxes found as another class or that took such a box, in their order."""
    inner = matrix[:-1, :-1].copy()
    np.fill_diagonal(inner, 0)
    wrong = inner.sum(axis=0) + inner.sum(axis=1)
    missed = matrix[:-1, -1] + matrix[-1, :-1]
    return np.sort(np.lexsort((-missed, -wrong))[:count])


def confusion_chart(analysis: Analysis) -> bytes:
    """The confusion matrix of the most confused classes; colours are shares of a row, numbers are boxes."""
    chosen = most_confused(analysis.confusion, WORST_CONFUSED)
    background = len(analysis.subject.truth.names)
    picked = np.append(chosen, background)
    part = analysis.confusion[np.ix_(picked, picked)]
    total = np.maximum(analysis.confusion[picked].sum(axis=1, keepdims=True), 1)
    names = [short(analysis.subject.truth.names[k]) for k in chosen]
    side = 2.6 + 0.42 * len(picked)
    figure, axes = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    share = part / total
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), number in np.ndenumerate(part):
        if number:
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{number:,}", ha="center", va="center", fontsize=7, color=colour)
    places = np.arange(len(picked))
    axes.set_xticks(places, [*names, "missed"], rotation=90, fontsize=8)
    axes.set_yticks(places, [*names, "background"], fontsize=8)
    axes.set(xlabel="found as", ylabel="box in the set")
    figure.colorbar(image, label="share of the row", shrink=0.8)
    return png(figure)


def error_chart(analysis: Analysis) -> bytes:
    """Bars of what each error type costs in AP50."""
    rows = analysis.errors[::-1]
    figure, axes = plt.subplots(figsize=(7.5, 3), layout="constrained")
    costs = [0.0 if math.isnan(row["cost_AP50"]) else row["cost_AP50"] for row in rows]
    bars = axes.barh([f"{row['meaning']} ({row['error']})" for row in rows], costs, color="#cb181d")
    texts = [f"{_text(row['cost_AP50'])}, {row['count']:,} times" for row in rows]
    axes.bar_label(bars, texts, padding=4, fontsize=8)
    axes.set(xlim=(0, 1.35 * max([*costs, 0.01])), xlabel="AP50 that would be gained without it")
    axes.tick_params(labelsize=8)
    return png(figure)


def range_chart(analysis: Analysis) -> bytes:
    """Bars of AP by the boxes' size and by their aspect."""
    figure, grid = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained", width_ratios=(3, 5))
    for axes, kind in zip(grid, ("size", "aspect"), strict=True):
        rows = [row for row in analysis.ranges if row["by"] == kind]
        places = np.arange(len(rows))
        axes.bar(places - 0.2, [row["AP50"] for row in rows], 0.4, color="#9ecae1", label="AP50")
        axes.bar(places + 0.2, [row["AP"] for row in rows], 0.4, color="#08519c", label="AP")
        for place, row in zip(places, rows, strict=True):
            top = 0.0 if math.isnan(row["AP50"]) else row["AP50"]
            text = f"{row['boxes']:,} boxes" if row["boxes"] else "none"
            axes.text(place, top + 0.02, text, ha="center", fontsize=7)
        labels = [row["range"].replace(" (", "\n(") for row in rows]
        axes.set_xticks(places, labels, fontsize=6.5)
        axes.set(ylim=(0, 1.1), xlim=(-0.6, len(rows) - 0.4), title=f"by {kind}")
        axes.grid(axis="y", alpha=0.3)
    grid[0].legend(fontsize=8)
    return png(figure)


def calibration_chart(analysis: Analysis) -> bytes:
    """The share of right detections against their score, above how many there are."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(5.5, 5.2), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    bins = [row for row in analysis.bins if row["detections"]]
    top.plot([0, 1], [0, 1], color="grey", ls="--", lw=1, label="a score means what it says")
    top.plot(
        [row["mean_score"] for row in bins],
        [row["share_right"] for row in bins],
        marker="o",
        color="#08519c",
        label="this detector",
    )
    top.set(ylim=(0, 1.02), xlim=(0, 1), ylabel="share that is right")
    top.legend(fontsize=8)
    middle = [(row["score_from"] + row["score_to"]) / 2 for row in analysis.bins]
    bottom.bar(middle, [row["detections"] for row in analysis.bins], width=0.09, color="#6baed6")
    if bins:
        bottom.set_yscale("log")
    bottom.set(xlabel="score", ylabel="detections")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    return png(figure)


def _text(value: Any) -> str:
    return "none" if math.isnan(value) else f"{value:.3f}"
