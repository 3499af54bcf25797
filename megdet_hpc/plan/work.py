"""The work of a rank in an update, from a plan and the size of its model."""

from __future__ import annotations

from megdet_hpc.devices import found_type
from megdet_hpc.plan.cost import Work
from megdet_hpc.plan.job_plan import JobPlan
from megdet_hpc.plan.model_size import ModelSize


def work_of(plan: JobPlan, size: ModelSize, images_per_second: float, cores: int | None, *, here: bool = False) -> Work:
    """What one rank of the plan does in an update.

    Args:
        plan: the run's plan.
        size: its gradients and layers.
        images_per_second: speed of one rank alone.
        cores: cores of a node that trains on CPUs; None: each rank has its own device.
        here: whether the ranks run on this host's devices.
    """
    on_cpus = plan.config.device == "cpu" or cores is not None or (here and found_type() == "cpu")
    return Work(
        images_per_second=images_per_second,
        images_per_rank=plan.config.data.images_per_rank,
        accumulate=plan.config.solver.accumulate,
        gradient_bytes=size.gradient_bytes,
        cgbn_channels=size.cgbn_channels,
        exchange=plan.config.norm.exchange,
        cores=cores,
        overlap=plan.config.solver.overlap,
        transport=plan.config.norm.transport,
        device_type="cpu" if on_cpus else "cuda",
        gradients=plan.config.solver.gradients,
    )
