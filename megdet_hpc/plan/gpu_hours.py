"""The plan's hours for so many updates on GPUs, beside times to an AP that were measured on another machine.

The detector is the paper's: megdet_r50_fpn_256 with 2 images a GPU, so a mini-batch of N images takes N / 2 GPUs. The
speed of a GPU is the one with which 16 images on 8 GPUs take the paper's 33 h by this plan. It is no known GPU's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from statistics import fmean

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.plan.cost import Work
from megdet_hpc.plan.describe import time_of
from megdet_hpc.plan.job_plan import COCO_TRAIN2017_IMAGES, Nodes, TrainingSet, plan_job
from megdet_hpc.plan.network import NETWORKS

CONFIG = "megdet_r50_fpn_256"
IMAGES_PER_SECOND = 1.378
"""Speed of one GPU; docs/results.md, "Batch 256 instead of 16, by the plan"."""
LEAST_GPUS, MOST_GPUS = 8, 128
_IMAGES_PER_GPU, _GPUS_PER_NODE, _NETWORK = 2, 8, "ib-hdr"


def gpus_of(batch: int) -> int | None:
    """GPUs of a mini-batch; None where they are not whole nodes between 8 and 128 GPUs."""
    gpus, rest = divmod(batch, _IMAGES_PER_GPU)
    fits = not rest and gpus % _GPUS_PER_NODE == 0 and LEAST_GPUS <= gpus <= MOST_GPUS
    return gpus if fits else None


@cache
def update_seconds(batch: int) -> float:
    """Time of an update by the plan [s].

    Args:
        batch: images of an update, for which `gpus_of` gives GPUs.
    """
    from megdet_hpc.plan.model_size import message_sizes  # imports torch

    config, _ = parse_config(config_parser("megdet_hpc.plan", ""), ["--config", CONFIG])
    config = replace(config, norm=replace(config.norm, size=min(config.norm.size, batch)))
    training_set = TrainingSet(COCO_TRAIN2017_IMAGES, 80, "COCO train2017")
    plan = plan_job(config, Nodes(gpus_of(batch) or 0, _GPUS_PER_NODE), training_set)
    gradient_bytes, channels = message_sizes(config, training_set.num_categories)
    work = Work(
        images_per_second=IMAGES_PER_SECOND,
        images_per_rank=_IMAGES_PER_GPU,
        accumulate=1,
        gradient_bytes=gradient_bytes,
        cgbn_channels=channels,
        exchange=config.norm.exchange,
        overlap=config.solver.overlap,
        transport=config.norm.transport,
        device_type="cuda",
        gradients=config.solver.gradients,
    )
    return time_of(plan, work, NETWORKS[_NETWORK]).total


def describe_gpu_hours(updates: Mapping[int, Sequence[int | None]], ap: float) -> list[str]:
    """Lines on the hours that measured updates would take on GPUs; none without two mini-batches that fit.

    The mean is that of the runs that reached the AP. Where others did not, the line says how many of how many did.

    Args:
        updates: updates of each run until an AP by mini-batch; None where a run did not reach it.
        ap: the AP.
    """
    rows = []
    for batch, of_runs in sorted(updates.items()):
        reached = [number for number in of_runs if number is not None]
        gpus = gpus_of(batch)
        if gpus and reached:
            mean = fmean(reached)
            few = f", {len(reached)} of {len(of_runs)} runs reached it" if len(reached) < len(of_runs) else ""
            rows.append((batch, gpus, mean, mean * update_seconds(batch) / 3600, few))
    if len(rows) < 2:
        return []
    first, last = rows[0], rows[-1]
    return [
        f"updates to AP {ap:g} as GPUs would make them, by the plan of {CONFIG}:",
        *(
            f"  mini-batch {batch:>4} on {gpus:>3} GPUs: {number:,.0f} updates of {update_seconds(batch):.3g} s = "
            f"{hours:.3g} h{few}"
            for batch, gpus, number, hours, few in rows
        ),
        f"  time {first[3] / last[3]:.3g} : 1, GPUs 1 : {last[1] / first[1]:g}; in the paper's whole runs 33 h on 8 "
        "and 4 h on 128, 8.25 : 1",
        f"  (assumed: {IMAGES_PER_SECOND:g} images/s of a GPU, so that 16 images on 8 GPUs take the paper's 33 h; "
        f"network {_NETWORK}; docs/recipe.md tells what the plan leaves out. The updates are these runs', not COCO's)",
    ]
