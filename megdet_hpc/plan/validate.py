"""Comparison of the time model with real runs on this host. The first run calibrates it, the others test it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megdet_hpc.errors import UserError
from megdet_hpc.log import read_metrics
from megdet_hpc.parallel.cores import usable_cores
from megdet_hpc.parallel.local_launch import error_of_ranks, rank_launcher
from megdet_hpc.plan.cost import StepTime, Work, step_time
from megdet_hpc.plan.network import Network

_WARM_UP = 4  # steps before the first that counts
_STEPS = 16
_TIMEOUT = 900  # s


@dataclass(frozen=True)
class Comparison:
    """Result of one number of ranks: predicted parts, fastest measured step [s], and the host's load before it."""

    ranks: int
    predicted: StepTime
    measured: float
    load: float

    @property
    def error(self) -> float:
        """Error of the prediction, relative to the measured step."""
        return self.predicted.total / self.measured - 1


def quickest_step(arguments: list[str], ranks: int) -> float:
    """The shortest step of a short training under mpirun on this host; the slowest rank counts [s].

    Other work on the machine only makes steps longer, so the shortest is nearest to that of an idle machine.

    Args:
        arguments: command line of megdet_hpc.train.
        ranks: number of ranks to start.

    Raises:
        UserError: the run failed, whose error the message holds; it took too long; or it is too short.
    """
    with tempfile.TemporaryDirectory(prefix="plan-validate-") as folder:
        own = ["--output", f"{folder}/run", "--max_steps", str(_STEPS), "--log_every", "1", "--data.val", "null"]
        # all batches have one size, so that steps do not differ by their images
        own += ["--data.padding", "fixed"]
        command = [*rank_launcher(ranks), sys.executable, "-m", "megdet_hpc.train"]
        try:
            done = subprocess.run(
                [*command, *arguments, *own],
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"},
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{ranks} rank(s) did not end {_STEPS} updates within {_TIMEOUT} s; accepted: a smaller model or "
                "fewer ranks"
            ) from None
        if done.returncode:
            said = error_of_ranks(done.stderr.strip() or done.stdout)
            raise UserError(f"{ranks} rank(s) ended with status {done.returncode}: {said}")
        rows = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    counted = [row["step_max_s"] for row in rows if row["step"] > _WARM_UP]
    if not counted:
        last = rows[-1]["step"] if rows else 0
        raise UserError(
            f"{ranks} rank(s): the run ended after {last} updates; accepted: a run of more than {_WARM_UP}, since "
            "the first ones do not count"
        )
    return min(counted)


def predict_and_measure(
    arguments: list[str], groups: dict[int, int], work: Work, network: Network
) -> Iterator[Comparison]:
    """Measure each number of ranks, one after another, and predict each from the step of one rank.

    Args:
        arguments: command line of megdet_hpc.train, with configuration and data.
        groups: numbers of ranks, each with the number of ranks that share batch statistics. More ranks than this host
            has cores share the cores.
        work: the work of a rank. Measured values replace its images_per_second and cores.
        network: network between the ranks of this host.
    """
    load_alone = os.getloadavg()[0]
    alone = quickest_step([*arguments, "--norm.size", "0"], 1)
    images = work.images_per_rank * work.accumulate
    work = replace(work, images_per_second=images / alone, cores=usable_cores())
    for ranks, group in groups.items():
        load = load_alone if ranks == 1 else os.getloadavg()[0]
        measured = alone if ranks == 1 else quickest_step(arguments, ranks)
        predicted = step_time(work, network, ranks=ranks, ranks_per_node=ranks, group_ranks=group, group_nodes=1)
        yield Comparison(ranks, predicted, measured, load)
