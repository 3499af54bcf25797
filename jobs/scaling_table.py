"""Print the measurements of jobs/bench_scaling: python jobs/scaling_table.py RUNS, with folders RUNS/nodes_<N>."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

WARM_UP_ROWS = 2  # rows of 5 steps each, in which memory pools fill, and cuDNN and Horovod choose


def median_speed(metrics: Path) -> float:
    """Median speed of a run after the warm-up [images/s].

    Raises:
        SystemExit: the run has no row after the warm-up.
    """
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    speeds = [row["images_per_s"] for row in rows if "images_per_s" in row][WARM_UP_ROWS:]
    if not speeds:
        sys.exit(f"{metrics}: no row after the {WARM_UP_ROWS} of the warm-up; train more steps")
    return median(speeds)


def main(folder: Path) -> None:
    """Print one row for each number of nodes. Efficiency is images/s per node, relative to the smallest run."""
    runs = sorted((int(path.parent.name.removeprefix("nodes_")), path) for path in folder.glob("nodes_*/metrics.jsonl"))
    if not runs:
        sys.exit(f"{folder}: no nodes_*/metrics.jsonl")
    print(f"{'nodes':>5} {'images/s':>10} {'per node':>10} {'efficiency':>10}")
    base = median_speed(runs[0][1]) / runs[0][0]
    for nodes, path in runs:
        speed = median_speed(path)
        print(f"{nodes:5d} {speed:10.1f} {speed / nodes:10.1f} {speed / nodes / base:10.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
