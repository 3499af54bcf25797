"""One plot per grid, in the paper's form: AP over the mini-batch, the BN size, the epoch; time over ranks."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from megdet_hpc.evaluation.coco import metric_text
from megdet_hpc.files import atomic_write

Row = dict[str, Any]
_NORMS = {"cgbn": "with CGBN", "frozen": "without (fixed statistics)"}


def draw(grid: str, rows: list[Row], title: str, picture: Path) -> None:
    """Draw a grid's rows.

    Args:
        grid: key of GRIDS.
        rows: rows that report.rows_of gives.
        title: above the plot.
        picture: PNG to write.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 90)), fontsize=10)
    finished = [row for row in rows if row["status"] in ("done", "failed")]
    {"batch": _batch, "bn_size": _bn_size, "epochs": _epochs, "warmup": _warmup, "ranks": _ranks}[grid](axes, finished)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _line(axes: Axes, rows: list[Row], key: str, label: str, color: str, style: str = "-") -> None:
    """AP over a column, with a gap where there is none; a failed run is a cross at its AP, or at 0 without one."""
    score = [math.nan if row["AP"] is None else row["AP"] for row in rows]
    axes.plot([row[key] for row in rows], score, style, marker="o", color=color, label=label)
    failed = [row for row in rows if row["status"] == "failed"]
    axes.plot([r[key] for r in failed], [r["AP"] or 0.0 for r in failed], "x", color="black", markersize=11, zorder=3)


def _scale(axes: Axes, values: list[int], label: str) -> None:
    """Doublings at equal distances, each value written."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    axes.set_ylabel("box AP at the end")
    if math.isfinite(axes.dataLim.ymax):  # not where no run has an AP
        axes.set_ylim(-0.02, 1.06 * axes.dataLim.ymax)


def _batch(axes: Axes, rows: list[Row]) -> None:
    for norm, color in (("cgbn", "tab:blue"), ("frozen", "tab:red")):
        for rate, style in ((1.0, "-"), (0.5, "--")):
            own = [row for row in rows if (row["norm"], row["rate"]) == (norm, rate)]
            label = f"{_NORMS[norm]}, {'full' if rate == 1 else 'half'} rate"
            _line(axes, own, "batch", label, color, style)
    _scale(axes, [row["batch"] for row in rows], "mini-batch [images]; crosses: failed")


def _bn_size(axes: Axes, rows: list[Row]) -> None:
    _line(axes, rows, "bn_size", f"mini-batch {rows[0]['batch']}", "tab:blue")
    _scale(axes, [row["bn_size"] for row in rows], "images that share batch statistics; crosses: failed")


def _epochs(axes: Axes, rows: list[Row]) -> None:
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = [row for row in rows if row["batch"] == batch and row["epoch"] is not None]
        axes.plot([row["epoch"] for row in own], [row["AP"] for row in own], marker="o", label=f"mini-batch {batch}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("box AP")


def _warmup(axes: Axes, rows: list[Row]) -> None:
    names = [f"{_NORMS[row['norm']]}\n{'warmup' if row['warmup'] else 'no warmup'}" for row in rows]
    colors = ["tab:blue" if row["norm"] == "cgbn" else "tab:red" for row in rows]
    bars = axes.bar(names, [row["AP"] or 0.0 for row in rows], color=colors)
    axes.bar_label(bars, ["failed" if r["status"] == "failed" else metric_text(r["AP"]) for r in rows])
    axes.set_ylabel(f"box AP at the end, mini-batch {rows[0]['batch']}")
    axes.tick_params(axis="x", labelsize=8)


def _ranks(axes: Axes, rows: list[Row]) -> None:
    ranks = [row["ranks"] for row in rows]
    axes.plot(ranks, [row["train_s"] for row in rows], marker="o", color="tab:blue", label="seconds of one epoch")
    _scale(axes, ranks, "real ranks")
    axes.set_ylabel("training time of one epoch [s]")
    axes.set_ylim(0, 1.15 * max(row["train_s"] for row in rows))
    axes.margins(x=0.15)
    for row in rows:
        axes.annotate(f"{row['steps']} steps", (row["ranks"], row["train_s"]), (0, 8), textcoords="offset points")
