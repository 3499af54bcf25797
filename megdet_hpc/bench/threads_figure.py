"""The picture of `bench threads --figure`: what each thread of each rank did, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from megdet_hpc.files import atomic_write

GRADIENTS = "gradients"
"""Name of a wait for the gradients."""
_INTERVALS = 200  # of the picture
_COLOURS = {
    "has a core": "tab:green",
    "waits for a core": "tab:red",
    "in a message of the layers": "tab:blue",
    "waits for gradients": "tab:orange",
}


class Span(NamedTuple):
    """A time from begin to end [s of time.perf_counter], with what happened in it."""

    begin: float
    end: float
    name: str


@dataclass(frozen=True)
class ThreadTrack:
    """What a thread did.

    Attributes:
        name: main, or the name that the system knows.
        samples: (S, 3): time [s], time with a core and time in which it waited for one since its start [ns].
    """

    name: str
    samples: np.ndarray

    def shares(self, spans: Sequence[Span]) -> tuple[float | None, float | None]:
        """Shares of these times in which it had a core, and in which it waited for one; None where nobody looked."""
        if len(self.samples) < 2:
            return None, None
        times, ran, waited = self.samples.T
        whole = sum(span.end - span.begin for span in spans)
        found = []
        for counter in (ran, waited):
            inside = sum(np.interp(span.end, times, counter) - np.interp(span.begin, times, counter) for span in spans)
            found.append(float(inside / 1e9 / whole))
        return found[0], found[1]


def title_of(num_ranks: int) -> str:
    """The title of the picture; one rank sends nothing."""
    if num_ranks == 1:
        return "What the threads of one rank do in a step, which sends nothing"
    return "What the threads do in a step that sends gradients and the layers' messages"


def _bars(axes: Axes, track: ThreadTrack, begin: float, end: float, row: float) -> None:
    """Fill the row of a thread: below, the share of each interval with a core; above it, the share without one."""
    edges = np.linspace(begin, end, _INTERVALS + 1)
    times, *counters = track.samples.T
    ran, waited = (np.diff(np.interp(edges, times, counter)) / 1e9 / np.diff(edges) for counter in counters)
    ran = ran.clip(0, 1)
    left, width = edges[:-1] - begin, np.diff(edges)
    axes.bar(left, 0.8 * ran, width, bottom=row, align="edge", color=_COLOURS["has a core"])
    above = 0.8 * np.minimum(waited, 1 - ran).clip(0)
    axes.bar(left, above, width, bottom=row + 0.8 * ran, align="edge", color=_COLOURS["waits for a core"])


def draw_threads(
    steps: Sequence[Sequence[Span]],
    waits: Sequence[Sequence[Span]],
    tracks: Sequence[Mapping[str, ThreadTrack]],
    picture: Path,
) -> None:
    """Draw the first of these steps: a row for the waits of each rank, then one for each of its busy threads.

    Args:
        steps: steps of each rank, of which the first is drawn.
        waits: messages of each rank's own thread.
        tracks: threads of each rank.
        picture: PNG to write.
    """
    begin, end = min(own[0].begin for own in steps), max(own[0].end for own in steps)
    whole = [Span(begin, end, "")]
    busy = [[track for track in own.values() if (track.shares(whole)[0] or 0) >= 0.01] for own in tracks]
    rows = [(rank, track) for rank, own in enumerate(busy) for track in [None, *sorted(own, key=lambda t: t.name)]]
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    places = range(len(rows) - 1, -1, -1)  # the first row is at the top
    for place, (rank, track) in zip(places, rows, strict=True):
        if track is not None:
            _bars(axes, track, begin, end, place)
            continue
        for span in waits[rank]:
            kind = "waits for gradients" if span.name == GRADIENTS else "in a message of the layers"
            axes.barh(place + 0.4, span.end - span.begin, 0.8, left=span.begin - begin, color=_COLOURS[kind])
    labels = [f"rank {rank}: {track.name if track else 'messages'}" for rank, track in rows]
    axes.set_yticks(np.array(places) + 0.4, labels)
    axes.set_ylim(-0.1, len(rows))
    axes.set_xlim(0, end - begin)
    axes.set_xlabel("time in a step [s]")
    figure.suptitle(title_of(len(steps)))
    handles = [Patch(color=colour, label=name) for name, colour in _COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
