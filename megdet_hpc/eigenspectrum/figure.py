"""eigenspectrum.png: dimensions over the depth of the network, and the spectrum of some layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt

from megdet_hpc.data.page import plain
from megdet_hpc.eigenspectrum.moments import Spectrum
from megdet_hpc.files import atomic_write

_SPECTRA = 4
_MOST_NAMES = 40


def draw_spectra(found: Mapping[str, Sequence[Spectrum]], picture: Path, title: str) -> None:
    """Draw one or two checkpoints in the same panels.

    Args:
        found: spectra by the name of the checkpoint.
        picture: PNG to write.
        title: above the panels.
    """
    layers = list(dict.fromkeys(one.layer for spectra in found.values() for one in spectra))
    place = {layer: index for index, layer in enumerate(layers)}
    figure = plt.figure(figsize=(max(10, min(18, 0.25 * len(layers))), 10), layout="constrained")
    grid = figure.add_gridspec(3, _SPECTRA)
    share, dead = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, :])
    for index, (given, spectra) in enumerate(found.items()):
        name = plain(given)
        x = [place[one.layer] for one in spectra]
        colour = f"C{index}"
        for key, style in (("participation_ratio", "-"), ("entropy_dimension", "--"), ("stable_rank", ":")):
            y = [100 * getattr(one, key) / one.channels for one in spectra]
            share.plot(x, y, style, color=colour, marker=".", label=f"{key.replace('_', ' ')}, {name}")
        dead.plot(x, [100 * one.dead / one.channels for one in spectra], color=colour, marker=".", label=name)
    share.set(ylabel="dimension\n[% of channels]", xticks=[], ylim=(0, None))
    share.legend(fontsize=7)
    dead.set(ylabel="dead channels [%]", ylim=(-0.1, max(5.0, dead.get_ylim()[1])))
    dead.legend(fontsize=7)
    step = max(1, -(-len(layers) // _MOST_NAMES))
    dead.set_xticks(range(0, len(layers), step), layers[::step], rotation=90, fontsize=6)
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(_SPECTRA, len(layers))).round().astype(int)).tolist()
    for column, index in enumerate(chosen):
        axes = figure.add_subplot(grid[2, column])
        for number, spectra in enumerate(found.values()):
            for one in spectra:
                if one.layer != layers[index]:
                    continue
                total = sum(one.eigenvalues)
                # eigenvalues of nothing have no place on a logarithmic axis
                values = [value / total for value in one.eigenvalues if value > 0]
                if values:
                    axes.plot(range(1, len(values) + 1), values, color=f"C{number}", marker=".", markersize=3)
        axes.set(yscale="log", xlabel="component")
        axes.set_title(layers[index], fontsize=7)
        axes.set_ylabel("part of the variance" if column == 0 else "")
    figure.suptitle(plain(title))
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)
