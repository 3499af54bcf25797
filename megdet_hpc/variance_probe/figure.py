"""variance.png: the gradient's variance over the mini-batch, a panel per part, beside the 1/N line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from megdet_hpc.data.page import plain
from megdet_hpc.files import atomic_write


def _unique(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def draw_variance(rows: Sequence[dict[str, Any]], picture: Path, title: str) -> None:
    """Draw a row of panels per state and a column per part.

    Args:
        rows: one or more, each with state, norm, part, batch, variance, variance_low and variance_high.
        picture: PNG to write.
        title: above the panels.
    """
    states, parts, norms = _unique(rows, "state"), _unique(rows, "part"), _unique(rows, "norm")
    figure, panels = plt.subplots(
        len(states),
        len(parts),
        figsize=(3.2 * len(parts), 3.4 * len(states) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(plain(title))
    for line, state in zip(panels, states, strict=True):
        for axes, part in zip(line, parts, strict=True):
            for index, norm in enumerate(norms):
                key = {"state": state, "norm": norm, "part": part}
                points = [row for row in rows if all(row[name] == value for name, value in key.items())]
                _draw_points(axes, points, norm, f"C{index}")
            axes.set(xscale="log", yscale="log", title=f"{part}, {state}")
            axes.grid(alpha=0.3, which="both")
            batches = sorted({row["batch"] for row in rows})
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.xaxis.set_minor_locator(NullLocator())
            # a part's variance often spans less than a decade, which would have one tick or none
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            axes.yaxis.set_minor_locator(NullLocator())
    for axes in panels[-1]:
        axes.set_xlabel("mini-batch (images)")
    for axes in panels[:, 0]:
        axes.set_ylabel("variance of the gradient (trace)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        [*handles, plt.Line2D([], [], color="gray", ls=":")], [*labels, "1/N"], loc="outside lower center", ncols=5
    )
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=64)
    plt.close(figure)


def _draw_points(axes: Any, points: list[dict[str, Any]], norm: str, color: str) -> None:
    """One norm's points with their intervals, and the 1/N line through the first."""
    if not points:
        return
    batches, values = [row["batch"] for row in points], [row["variance"] for row in points]
    axes.plot(batches, values, marker="o", markersize=4, color=color, label=norm)
    axes.plot(batches, [values[0] * batches[0] / batch for batch in batches], color=color, ls=":", alpha=0.7)
    for row in points:
        if row["variance_low"]:
            axes.plot([row["batch"]] * 2, [row["variance_low"], row["variance_high"]], color=color, alpha=0.6)
