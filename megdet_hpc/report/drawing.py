"""Whether pictures can be drawn here. A run needs none, so without matplotlib it goes on and says so."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from megdet_hpc.log.terminal import warn
from megdet_hpc.programs import drawing_lack


@cache
def can_draw() -> bool:
    """Whether matplotlib can be loaded. Where it cannot, the first call prints a warning.

    The modules that draw load it at their head, so they are imported after this.
    """
    lack = drawing_lack()
    if lack:
        warn(f"no pictures: matplotlib {lack}")
    return not lack


def draw_run(run: Path) -> None:
    """Draw curves.png of a run's folder from its metrics.jsonl; nothing where pictures cannot be drawn."""
    if can_draw():
        from megdet_hpc.report.curves import draw_curves

        draw_curves(run / "metrics.jsonl", run / "curves.png", str(run))
