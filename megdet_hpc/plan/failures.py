"""How often a run should save, from the time that a checkpoint takes and the time between failures.

J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
Systems 22 (2006), equation 37; its first term is J. W. Young's of 1974. Failures come at random, independent of each
other, and a run goes on from its last checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megdet_hpc.errors import UserError
from megdet_hpc.plan.run_time import CheckpointTime


@dataclass(frozen=True)
class SavingPlan:
    """Checkpoints of a run on nodes that fail.

    Attributes:
        write_seconds: time for which the ranks wait for a checkpoint [s].
        failure_seconds: mean time between failures of the whole job [s].
        restart_seconds: time from a failure to the first step after it [s].
    """

    write_seconds: float
    failure_seconds: float
    restart_seconds: float

    @property
    def interval(self) -> float:
        """Training time between two checkpoints that loses the least time [s]."""
        half = self.write_seconds / (2 * self.failure_seconds)
        if half >= 1:
            return self.failure_seconds
        series = 1 + math.sqrt(half) / 3 + half / 9
        return math.sqrt(2 * self.write_seconds * self.failure_seconds) * series - self.write_seconds

    def lost(self, interval: float | None = None) -> float:
        """Share of the time that saving, work done twice and restarts take, to first order [0 and up].

        Args:
            interval: training time between two checkpoints [s]; None: the best one.
        """
        interval = self.interval if interval is None else interval
        again = (interval + self.write_seconds) / 2 + self.restart_seconds
        return self.write_seconds / (interval + self.write_seconds) + again / self.failure_seconds


def describe_saving(
    node_hours: float, nodes: int, write: CheckpointTime, restart_minutes: float, step_seconds: float | None
) -> list[str]:
    """Lines about the best time between checkpoints.

    Args:
        node_hours: mean time between failures of one node [h].
        nodes: nodes of the job.
        write: time of a checkpoint.
        restart_minutes: time that a start costs [min].
        step_seconds: time of an update [s]; None if it is not known.

    Raises:
        UserError: a checkpoint takes as long as the job lives on average.
    """
    saving = SavingPlan(write.seconds, 3600 * node_hours / nodes, 60 * restart_minutes)
    if saving.write_seconds >= saving.failure_seconds:
        raise UserError(
            f"--mtbf-hours {node_hours:g} on {nodes} node(s): the job fails every {saving.failure_seconds:.0f} s on "
            f"average, and a checkpoint takes {write.seconds:.3g} s ({write.source}), so hardly any would be finished"
        )
    every, hours = saving.interval, saving.failure_seconds / 3600
    steps = f", about {max(1, round(every / step_seconds))} updates" if step_seconds else ""
    half, best, twice = (saving.lost(factor * every) for factor in (0.5, 1, 2))
    return [
        f"checkpoints    checkpoints.every_minutes {every / 60:.3g}{steps} (Daly 2006)",
        f"               for a failure of a node every {node_hours:,.0f} h, of one of {nodes} every {hours:,.4g} h;",
        f"               a checkpoint of {write.seconds:.3g} s ({write.source}), a restart of {restart_minutes:g} min",
        f"               saving, work done twice and restarts take {best:.2%} of the time,",
        f"               {half:.2%} at half the interval, {twice:.2%} at twice",
    ]
