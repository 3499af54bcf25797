"""The measurements of jobs/bench_scaling: RUNS/nodes_<N> and RUNS/strong_<N>, a short training each.

Weak scaling keeps the images of a rank, so the mini-batch grows with the nodes. Strong scaling keeps the mini-batch of
the largest size; fewer nodes make more passes for an update.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megdet_hpc.errors import UserError
from megdet_hpc.record.run_record import RunRecord, read_run

WARM_UP_ROWS = 2  # rows of the log in which memory pools fill, and cuDNN and Horovod choose
COMPUTE, DATA, LAYERS, GRADIENTS, STRAGGLERS = "compute", "data", "layers' messages", "gradients", "stragglers"
PARTS = (COMPUTE, DATA, LAYERS, GRADIENTS, STRAGGLERS)
UNSPLIT = "compute and messages"
"""The part of a run on GPUs, whose messages are only queued, that is not waiting for data."""


@dataclass(frozen=True)
class SizeRun:
    """A run of one size."""

    folder: Path
    nodes: int
    ranks: int
    global_batch: int
    """Images of an update."""
    images_per_s: float
    """Median of the rows after the warm-up; so are the next two."""
    step_s: float
    """Time of an update, of the slowest rank [s]."""
    parts: dict[str, float]
    """Time of each part of an update [s]; they add up to step_s."""
    least: float
    most: float
    """Least and largest images/s of these rows."""
    rows: int
    hosts: tuple[str, ...]
    """Host of each rank; empty where the run does not say."""
    device: str
    config: dict[str, Any]
    """Keys with dots."""

    def share(self, part: str) -> float:
        """Share of an update [0 to 1]."""
        return self.parts.get(part, 0.0) / self.step_s


@dataclass(frozen=True)
class Scaling:
    """The runs by number of nodes. Strong scaling ends with the largest weak run, which is both."""

    weak: list[SizeRun]
    strong: list[SizeRun]

    @property
    def one_host(self) -> str:
        """The host, if all ranks of all runs were on one; else ""."""
        hosts = {host for run in [*self.weak, *self.strong] for host in run.hosts}
        return hosts.pop() if len(hosts) == 1 and self.weak[-1].nodes > 1 else ""


def efficiency(runs: list[SizeRun], run: SizeRun) -> float:
    """Images/s of a node, relative to that of the smallest run."""
    return run.images_per_s / run.nodes / (runs[0].images_per_s / runs[0].nodes)


def _parts(row: dict[str, Any]) -> dict[str, float]:
    """The time of an update by what it was spent on [s].

    A rank's messages include waiting for slower ranks. That wait is the work of the slowest rank less the mean one. It
    is taken from both kinds of messages in proportion, and shown as stragglers.
    """
    step, data = row["step_max_s"], row["data_mean_s"]
    if "own_mean_s" not in row:
        return {UNSPLIT: max(step - data, 0.0), DATA: data}
    own = min(row["own_mean_s"], step)
    messages, late = step - own, min(row["own_max_s"], step) - own
    gradients = min(row.get("gradients_mean_s", 0.0), messages)
    pure = 1 - late / messages if messages else 0.0
    return {
        COMPUTE: own - min(data, own),
        DATA: min(data, own),
        LAYERS: (messages - gradients) * pure,
        GRADIENTS: gradients * pure,
        STRAGGLERS: late,
    }


def _measured(folder: Path, nodes: int, record: RunRecord) -> SizeRun:
    rows = [row for row in record.rows if "images_per_s" in row][WARM_UP_ROWS:]
    if not rows:
        raise UserError(f"{folder}: no row after the {WARM_UP_ROWS} of the warm-up; train more steps")
    start = record.starts[-1] if record.starts else None
    ranks = start.ranks if start and start.ranks else nodes
    if not nodes or ranks % nodes:
        raise UserError(f"{folder}: {ranks} rank(s) on {nodes} node(s); accepted: as many on each node, 1 or more")
    parts = [_parts(row) for row in rows]
    if ranks == 1:  # one rank sends nothing
        parts = [{COMPUTE: part.get(UNSPLIT, part.get(COMPUTE, 0.0)), DATA: part[DATA]} for part in parts]
    step = median(row["step_max_s"] for row in rows)
    middle = {name: median(part[name] for part in parts) for name in parts[0]}
    whole = sum(middle.values()) or 1.0
    return SizeRun(
        folder=folder,
        nodes=nodes,
        ranks=ranks,
        global_batch=record.global_batch or 0,
        images_per_s=median(row["images_per_s"] for row in rows),
        step_s=step,
        # medians of parts need not add up to the median of the whole
        parts={name: value / whole * step for name, value in middle.items()},
        least=min(row["images_per_s"] for row in rows),
        most=max(row["images_per_s"] for row in rows),
        rows=len(rows),
        hosts=start.hosts if start else (),
        device=start.device if start else "",
        config=record.config,
    )


def _runs(folder: Path, kind: str) -> list[SizeRun]:
    found: dict[int, Path] = {}
    for file in sorted(folder.glob(f"{kind}_*/metrics.jsonl")):
        run, number = file.parent, file.parent.name.removeprefix(f"{kind}_")
        if not (number.isascii() and number.isdigit()):
            continue
        if other := found.get(int(number)):
            raise UserError(f"{run} and {other.name}: two runs on {int(number)} node(s); accepted: one of each size")
        found[int(number)] = run
    return [_measured(run, nodes, read_run(run)) for nodes, run in sorted(found.items())]


def read_scaling(folder: Path) -> Scaling:
    """The runs below a folder.

    Raises:
        UserError: there are none, two are of one size, one has no row after the warm-up, the ranks of one do not fit
            its nodes, or those of strong scaling differ in mini-batch.
    """
    weak = _runs(folder, "nodes")
    if not weak:
        raise UserError(f"{folder}: no nodes_*/metrics.jsonl, which jobs/bench_scaling writes")
    strong = _runs(folder, "strong")
    if strong and strong[-1].nodes < weak[-1].nodes:
        strong.append(weak[-1])
    batches = sorted({run.global_batch for run in strong})
    if len(batches) > 1:
        raise UserError(
            f"{folder}/strong_*: mini-batches of {batches} images; accepted: one, that of nodes_{weak[-1].nodes}"
        )
    return Scaling(weak, strong)
