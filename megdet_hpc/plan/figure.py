"""The picture of --png: the learning rate of every update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt

from megdet_hpc.files import atomic_write


def draw_schedule(rates: Sequence[float], marks: Sequence[int], picture: Path, title: str) -> None:
    """Draw the learning rate of every update on a logarithmic scale.

    Args:
        rates: learning rate of each update.
        marks: steps that get a line, such as the warmup's end and the drops.
        picture: PNG to write.
        title: above the panel.
    """
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    figure.suptitle(title)
    axes.plot(range(len(rates)), rates, color="tab:gray")
    for step in marks:
        axes.axvline(step, color="tab:blue", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylabel("learning rate per update")
    axes.set_xlabel("step (updates)")
    axes.grid(alpha=0.3)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
