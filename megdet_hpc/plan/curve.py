"""The learning rate over a run as text, for terminals and job logs."""

from __future__ import annotations

import math

from megdet_hpc.solver.lr_schedule import LrSchedule

_DECADES = 3  # shown below the peak; smaller rates, such as a cosine's end, lie on the bottom line


def ascii_curve(schedule: LrSchedule, num_steps: int, width: int = 64, height: int = 10) -> str:
    """Lines of `height` rows and an axis: rates on a logarithmic scale over the run's steps.

    A column shows the rate of its first step, so a warmup shorter than a column is not seen.
    """
    columns = min(width, num_steps)
    steps = [column * num_steps // columns for column in range(columns)]
    rates = [schedule.lr_at(step) for step in steps]
    top = max(rates)
    bottom = max(min(rates), top / 10**_DECADES)
    span = math.log(top / bottom) or 1.0
    places = [round((height - 1) * math.log(max(rate, bottom) / bottom) / span) for rate in rates]
    lines = []
    for row in reversed(range(height)):
        label = f"{bottom * math.exp(span * row / (height - 1)):9.3g}" if row in (0, height - 1) else " " * 9
        lines.append(f"{label} |" + "".join("*" if place == row else " " for place in places).rstrip())
    lines.append(" " * 10 + "+" + "-" * columns)
    lines.append(f"{'step':>9}  0{num_steps:>{max(columns - 1, 1)}}")
    return "\n".join(lines)
