"""The plot of the grid `scratch`: AP of each seed, by setting, in six panels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from megdet_hpc.files import atomic_write
from megdet_hpc.study.scratch_claims import Row, finished_of

_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple"


def draw_scratch(rows: Sequence[Row], heading: str, picture: Path, score: str = "AP") -> None:
    """Draw a dot for each seed and a line for each mean; crosses are runs that failed.

    Args:
        rows: rows of the runs.
        heading: text above the plot.
        picture: PNG to write.
        score: name of what the column AP holds.
    """
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(heading, 120)), fontsize=11)
    sizes = {int(row["norm"][2:]) for row in rows if row["norm"].startswith("bn") and row["detector"] != "dsod"}
    norms = ["none", *(f"bn{size}" for size in sorted(sizes)), "all", "gn"]
    for column, (detector, stages) in enumerate((("one", "One stage"), ("two", "Two stages, RoIAlign"))):
        _panel(axes[0][column], rows, f"{stages}, from scratch", norms, [
            ("usual rate", _BLUE, {"detector": detector}),
            ("low rate", _ORANGE, {"detector": detector, "rate": "low"}),
            ("higher rate", _GREEN, {"detector": detector, "rate": "higher"}),
        ])  # fmt: skip
    _panel(axes[0][2], rows, "Two stages, usual rate: pooling of regions", norms, [
        ("RoIAlign", _BLUE, {"detector": "two"}),
        ("RoIPool", _ORANGE, {"detector": "two", "pool": "pool"}),
    ])  # fmt: skip
    for column, (detector, stages) in enumerate((("one", "One stage"), ("two", "Two stages"))):
        title = f"{stages}: clipping, rate, and first weights"
        _panel(axes[1][column], rows, title, ["none", "all"], [
            ("usual rate", _BLUE, {"detector": detector}),
            ("usual rate, clipped", _ORANGE, {"detector": detector, "clip": True}),
            ("higher rate", _RED, {"detector": detector, "rate": "higher"}),
            ("higher rate, clipped", _PURPLE, {"detector": detector, "rate": "higher", "clip": True}),
            ("usual rate, from weights", _GREEN, {"detector": detector, "first": "weights"}),
        ])  # fmt: skip
    last: Axes = axes[1][2]
    where = [("none", {"norm": "none"})]
    where += [(part, {"norm": "all", "where": part}) for part in ("heads", "backbone", "all")]
    pairs = [(part, finished_of(rows, detector="one", **factors)) for part, factors in where]
    for size in sorted({int(row["norm"][2:]) for row in rows if row["detector"] == "dsod"}):
        pairs.append((f"BN {size}\nof {_batch(rows)}", finished_of(rows, detector="dsod", norm=f"bn{size}")))
    for place, (_, own_rows) in enumerate(pairs):
        _dots(last, place, own_rows, _BLUE if place < len(where) else _GREEN)
    last.axvline(len(where) - 0.5, color="gray", linewidth=0.8)
    _finish(last, "One stage: CGBN by part, and DSOD's sizes", [name for name, _ in pairs])
    for own in axes.flat:
        own.set_ylabel(f"box {score} at the end")
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=90)
    plt.close(figure)


def _batch(rows: Sequence[Row]) -> int:
    return next((int(row["batch"]) for row in rows if row["detector"] == "dsod"), 0)


def _panel(
    axes: Axes, rows: Sequence[Row], title: str, norms: list[str], series: list[tuple[str, str, dict[str, Any]]]
) -> None:
    """Draw one panel: normalization from left to right, some series beside each other.

    Args:
        axes: place of the panel.
        rows: rows of the runs.
        title: text above it.
        norms: values of the column norm; those without a finished run are left out.
        series: label, color and other factors.
    """
    drawn = [norm for norm in norms if any(finished_of(rows, **own, norm=norm) for _, _, own in series)]
    for index, (label, color, own) in enumerate(series):
        shift = min(0.22, 0.8 / len(series)) * (index - (len(series) - 1) / 2)
        axes.plot([], [], "o", color=color, label=label)
        for place, norm in enumerate(drawn):
            _dots(axes, place + shift, finished_of(rows, **own, norm=norm), color)
    axes.legend(fontsize=8)
    names = {"none": "none", "all": "CGBN\nall", "gn": "GN"}
    _finish(axes, title, [names.get(norm, f"BN {norm.removeprefix('bn')}") for norm in drawn])


def _dots(axes: Axes, place: float, rows: Sequence[Row], color: str) -> None:
    """Draw the finished seeds of a setting; one that failed without AP is at 0, as in the mean."""
    if not rows:
        return
    for marker, failed in (("o", False), ("x", True)):
        scores = [row["AP"] or 0.0 for row in rows if (row["status"] == "failed") == failed]
        axes.plot([place] * len(scores), scores, marker, color=color, markersize=5, alpha=0.7)
    mean = fmean(row["AP"] or 0.0 for row in rows)
    axes.plot([place - 0.07, place + 0.07], [mean] * 2, "-", color=color, linewidth=2)


def _finish(axes: Axes, title: str, names: list[str]) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    axes.set_ylim(bottom=-0.02)
    axes.grid(alpha=0.3)
