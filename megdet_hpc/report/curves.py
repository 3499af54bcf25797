"""curves.png: losses, learning rate and AP of a run, read back from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt

from megdet_hpc.data.page import plain
from megdet_hpc.files import atomic_write
from megdet_hpc.log import read_metrics


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw three panels over a common step axis.

    Args:
        metrics: the run's metrics.jsonl.
        picture: PNG to write.
        title: title of the picture.
    """
    rows = read_metrics(metrics)
    figure, (losses, rate, score) = plt.subplots(3, 1, figsize=(8, 9), sharex=True, layout="constrained")
    figure.suptitle(plain(title))
    for key in sorted({key for row in rows for key in row if key.startswith("loss")}):
        losses.plot(*_series(rows, key), label=key, linewidth=2 if key == "loss" else 1)
    losses.set_ylabel("loss, mean over ranks")
    losses.set_yscale("log")
    rate.plot(*_series(rows, "lr"), color="tab:gray")
    rate.set_ylabel("learning rate per update")
    voc = [prefix + name for prefix in ("", "ema_") for name in ("AP50_voc07", "AP50_voc12")]
    for key in ("AP", "AP50", "ema_AP", "ema_AP50", *voc):
        steps, values = _series(rows, f"val/{key}")
        if steps:
            score.plot(steps, values, marker="o", label=f"validation {key}")
    score.set_ylabel("box AP")
    score.set_ylim(0, 1)
    score.set_xlabel("step (updates)")
    for axes in (losses, score):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    for axes in (losses, rate, score):
        axes.grid(alpha=0.3)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
