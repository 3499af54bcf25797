"""What `megdet plan` expects of the same runs, from the speed of the smallest one and a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megdet_hpc.config import Config, migrated
from megdet_hpc.errors import UserError
from megdet_hpc.log import config_files
from megdet_hpc.plan.cost import StepTime, step_time
from megdet_hpc.plan.job_plan import Nodes, find_training_set, plan_job
from megdet_hpc.plan.model_size import ModelSize, measure_model
from megdet_hpc.plan.network import Network
from megdet_hpc.plan.work import work_of
from megdet_hpc.scaling_report.runs import COMPUTE, UNSPLIT, SizeRun


def stored_config(run: Path) -> dict[str, Any]:
    """The configuration of the newest start of a run, with values that this version accepts.

    Raises:
        UserError: there is none that can be read.
    """
    path = [run / "config.yaml", *(file for _, file in config_files(run))][-1]
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: is no run's configuration")
    return migrated(stored)


def estimates(
    runs: list[SizeRun], configs: list[Config], network: Network, cores_per_node: int | None
) -> list[StepTime]:
    """The parts of an update of each run.

    The model knows no waiting for data and no stragglers. The speed of a rank is that of the smallest run: its images
    over its time of compute, on GPUs with the messages of that run.

    Args:
        runs: one kind of scaling, smallest first.
        configs: their configurations.
        network: times of messages.
        cores_per_node: cores that the ranks of a CPU node share; None: each rank has its own device.
    """
    first = runs[0]
    seconds = first.parts.get(COMPUTE, first.parts.get(UNSPLIT, first.step_s))
    speed = first.global_batch / first.ranks / seconds
    if cores_per_node:  # as if it had a core of its own
        speed *= max(1.0, first.ranks / first.nodes / cores_per_node)
    found: list[StepTime] = []
    size: ModelSize | None = None
    for run, config in zip(runs, configs, strict=True):
        per_node = run.ranks // run.nodes
        plan = plan_job(config, Nodes(run.ranks, per_node), find_training_set(config, None), goes_on=True)
        size = size or measure_model(config, plan.training_set.num_categories)
        cores = cores_per_node or (per_node if "cpu" in run.device else None)
        found.append(
            step_time(
                work_of(plan, size, speed, cores),
                network,
                ranks=run.ranks,
                ranks_per_node=per_node,
                group_ranks=plan.ranks_per_statistics if run.ranks > 1 else 1,
                group_nodes=plan.nodes_per_group(),
            )
        )
    return found
