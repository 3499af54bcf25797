"""A plan as lines of text: first what is certain, then the estimates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from megdet_hpc.config import Config
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.transports import resolve_transport
from megdet_hpc.plan.cost import StepTime, Work, step_time
from megdet_hpc.plan.curve import ascii_curve
from megdet_hpc.plan.job_plan import JobPlan, Nodes, TrainingSet, plan_job
from megdet_hpc.plan.network import Network
from megdet_hpc.solver.lr_schedule import resolve_schedule

if TYPE_CHECKING:  # the module imports torch, which takes long and which a refusal does not need
    from megdet_hpc.plan.model_size import ModelSize

_SCALING_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
_SHOWN_GROUPS = 4
_GIB = 2**30
# Length of the warmup [epochs] in published configurations of this many images or more that train by SGD: NVIDIA's Mask
# R-CNN in MLPerf Training v3.1 (256 images: 1,800 and 2,300 updates), AGVM's repository (256: 920, 512: 460 updates).
_PUBLISHED_WARMUPS, _LEAST_PUBLISHED = (2.0, 5.0), 256


def marks(plan: JobPlan) -> list[tuple[int, str]]:
    """Steps at which the course of the learning rate changes, each with a text."""
    schedule, last = plan.schedule, plan.total_steps - 1
    found = [(0, "start")]
    if schedule.warmup_steps:
        found.append((schedule.warmup_steps, "warmup ends"))
    found += [
        (step, f"drop x {factor:g}") for step, factor in zip(schedule.drop_steps, schedule.drop_factors, strict=True)
    ]
    grown = plan.epoch.stages[1:]
    found += [(stage.step, f"{plan.epoch.global_batch * stage.factor} images an update") for stage in grown]
    return [*sorted(mark for mark in found if mark[0] <= last), (last, "last step")]


def describe_run(plan: JobPlan) -> list[str]:
    """Batch, steps, schedule and BN groups: the trainer's own arithmetic."""
    epoch, solver, schedule = plan.epoch, plan.config.solver, plan.schedule
    aspect = "; aspect groups may add 1" if plan.config.data.group_by_aspect_ratio else ""
    lines = [
        f"training set   {plan.training_set.num_images} images ({plan.training_set.source})",
        f"ranks          {plan.nodes.num_ranks} on {plan.nodes.num_nodes} node(s) of {plan.nodes.ranks_per_node}",
        f"global batch   {epoch.num_ranks} ranks x {epoch.images_per_rank} images x {epoch.accumulate} passes = "
        f"{epoch.global_batch} images",
        f"steps          {epoch.steps_per_epoch} an epoch = ceil({epoch.num_images} / {epoch.global_batch}){aspect}; "
        f"{plan.total_steps} in all, {epoch.epochs_of(plan.total_steps):.4g} epochs",
        *(
            f"               from epoch {stage.epoch} on {epoch.accumulate * stage.factor} passes = "
            f"{epoch.global_batch * stage.factor} images: {stage.steps_per_epoch} an epoch"
            for stage in epoch.stages[1:]
        ),
        *_lengthened(plan),
        *_adaptive(plan),
        f"peak rate      {solver.base_lr:g}, times the gain of each update"
        if solver.adascale
        else f"peak rate      {solver.base_lr:g} x ({epoch.global_batch} / {solver.reference_batch}) ** "
        f"{solver.scaling_exponent:g} = {schedule.peak_lr:.4g}",
        f"warmup         {schedule.warmup_steps} steps = {_epochs(plan, schedule.warmup_steps):.3g} epochs, "
        f"{schedule.warmup_form} from {schedule.warmup_start_factor:g}"
        if schedule.warmup_steps
        else "warmup         none",
        *_published_warmup(plan),
        "",
        f"{'step':>9} {'epoch':>8} {'rate':>10}",
    ]
    for step, what in marks(plan):
        lines.append(f"{step:>9} {_epochs(plan, step):>8.3g} {schedule.lr_at(step):>10.4g}  {what}")
    return [*lines, "", ascii_curve(schedule, plan.total_steps), "", *_describe_groups(plan)]


def _epochs(plan: JobPlan, step: int) -> float:
    """The epochs of the schedule's first steps: its updates, or with solver.adascale those of the base batch."""
    if not plan.config.solver.adascale:
        return plan.epoch.epochs_of(step)
    return step * plan.config.solver.reference_batch / plan.epoch.global_batch / plan.epoch.steps_per_epoch


def _adaptive(plan: JobPlan) -> list[str]:
    """A line on a run whose number of updates the gradient decides; none for others."""
    if not plan.config.solver.adascale:
        return []
    least = math.ceil(plan.total_steps / max(plan.epoch.global_batch / plan.config.solver.reference_batch, 1))
    return [f"               by solver.adascale at most; the variance of the gradient decides, {least} at least"]


def _published_warmup(plan: JobPlan) -> list[str]:
    """A line on published lengths of the warmup, where this one is none of them."""
    batch, epochs = plan.epoch.global_batch, _epochs(plan, plan.schedule.warmup_steps)
    low, high = _PUBLISHED_WARMUPS
    solver = plan.config.solver
    known = solver.optimizer == "sgd" and not solver.adascale and batch >= _LEAST_PUBLISHED
    if not known or low - 0.1 <= epochs <= high + 0.1:
        return []
    return [f"               published configurations of 256 and 512 images warm up {low:g} to {high:g} epochs"]


def _lengthened(plan: JobPlan) -> list[str]:
    """A line on what made the run longer than its epochs; none where nothing did."""
    solver = plan.config.solver
    if solver.least_iterations is None:
        return []
    length = f"solver.epochs {solver.epochs:g}"
    if solver.iterations is not None:
        length = f"solver.iterations {solver.iterations:g}"
    shorter = replace(solver, least_iterations=None)
    alone = resolve_schedule(
        shorter, global_batch=plan.epoch.global_batch, steps_per_epoch=plan.epoch.steps_per_epoch
    ).total_steps
    if plan.schedule.total_steps == alone:
        return []
    return [
        f"               by solver.least_iterations {solver.least_iterations:g} of {solver.reference_batch} images; "
        f"{length} alone would be {alone} steps"
    ]


def _describe_groups(plan: JobPlan) -> list[str]:
    norm = plan.config.norm
    if norm.kind != "cgbn":
        return [f"normalization  {norm.kind} in {', '.join(norm.where)}: no messages"]
    if plan.config.emulate.ranks:
        return [f"BN groups      {plan.groups}, one after the other in one process"]
    if plan.groups.per_rank > 1:
        return [f"BN groups      {plan.groups}: no messages"]
    across = plan.nodes_per_group()
    where = f"a group spans up to {across} nodes" if across > 1 else "no group leaves its node"
    lines = [f"BN groups      {plan.groups}; {where}"]
    for group in range(min(plan.groups.num_groups, _SHOWN_GROUPS)):
        ranks = plan.group_ranks(group)
        nodes = plan.nodes.of_ranks(ranks[0], ranks[-1])
        lines.append(f"               group {group}: {_span('rank', ranks)} on {_span('node', nodes)}")
    if plan.groups.num_groups > _SHOWN_GROUPS:
        lines.append(f"               and so on to group {plan.groups.num_groups - 1}")
    return lines


def _span(what: str, numbers: range) -> str:
    return f"{what} {numbers[0]}" if len(numbers) == 1 else f"{what}s {numbers[0]} to {numbers[-1]}"


def describe_memory(plan: JobPlan, size: ModelSize) -> list[str]:
    """Memory of a rank as far as shapes tell it, and a list of what they do not. An emulating process is one rank."""
    height, width = size.image_size
    emulated = plan.config.emulate.ranks
    regions = f" and of {size.regions_per_image} boxes an image" if size.regions_per_image else ""
    # the ranks of an emulated BN group run at the same time; each has its own activations and gradients
    together = (emulated if plan.config.emulate.keep_graphs else plan.ranks_per_statistics) if emulated else 1
    images = together * plan.config.data.images_per_rank
    state = size.state_bytes / _GIB + (together * size.gradient_bytes / _GIB if emulated else 0.0)
    kept = together * size.activation_bytes / _GIB
    many = [f"               {together} of the {emulated} emulated ranks run together"] if emulated else []
    average = ", averaged weights" if plan.config.solver.ema_decay else ""
    half = "; half precision keeps less" if plan.config.solver.precision != "float32" else ""
    backbone = "" if size.backbone_macs is None else f", {size.backbone_macs / 1e9:.4g} of them in the backbone"
    return [
        f"parameters     {size.parameters:,}, {size.trained:,} trained; "
        f"gradients of {size.gradient_bytes / 2**20:.0f} MiB travel in each update",
        f"arithmetic     {size.macs / 1e9:.4g} GMAC forward for an image of {height} x {width}{backbone}",
        f"memory a rank  {state:.2f} GiB weights, gradients, optimizer{average} "
        f"+ {kept:.2f} GiB kept for the backward pass = {state + kept:.2f} GiB or more",
        f"               from the shapes of {images} x 3 x {height} x {width} in float32{regions}{half}; not in it:",
        "               workspaces of convolutions, buffers of Horovod and NCCL, proposals, what the allocator wastes",
        *many,
    ]


def time_of(plan: JobPlan, work: Work, network: Network, factor: int = 1) -> StepTime:
    """Time of an update of a plan.

    Args:
        plan: ranks and groups.
        work: work of a rank in the first updates.
        network: times of a message.
        factor: passes of the update over those of the first ones.
    """
    group = plan.ranks_per_statistics
    return step_time(
        replace(work, accumulate=work.accumulate * factor),
        network,
        ranks=plan.nodes.num_ranks,
        ranks_per_node=plan.nodes.ranks_per_node,
        group_ranks=group,
        group_nodes=plan.nodes_per_group() if group > 1 else 1,
    )


def hours_of(plan: JobPlan, work: Work, network: Network) -> float:
    """Training time of a plan, without start-up, evaluation and checkpoints."""
    first = plan.epoch.global_batch
    return sum(number * time_of(plan, work, network, size // first).total for number, size in plan.updates()) / 3600


def _carrier(work: Work) -> str:
    """The library of the gradients. auto is Horovod where it is installed, which the job's hosts decide."""
    return {"torch": "torch.distributed", "mpi": "mpi4py"}.get(work.gradients, "Horovod")


def _layers(work: Work) -> str:
    """The library of the layers' messages."""
    carrier = resolve_transport(work.transport, work.device_type)
    return {"torch": "NCCL" if work.device_type == "cuda" else "Gloo", "mpi": "MPI", "horovod": "Horovod"}[carrier]


def describe_cost(plan: JobPlan, work: Work, network: Network, source: str) -> list[str]:
    """Lines about step time and hours, with their assumptions, and the scaling table."""
    time, hours = time_of(plan, work, network), hours_of(plan, work, network)
    grown = [(images, time_of(plan, work, network, images // plan.epoch.global_batch)) for _, images in plan.updates()]
    hidden = work.hides_gradients(plan.ranks_per_statistics)
    return [
        f"assumed        {work.images_per_second:.4g} images/s on one rank ({source})",
        f"assumed        network {network}",
        f"assumed        {'GPUs with NCCL' if work.device_type == 'cuda' else 'CPUs'}: gradients "
        + ("hide behind 2/3 of a pass" if hidden else "travel after the backward pass")
        + f" (solver.overlap {str(work.overlap).lower()}), over {_carrier(work)},",
        f"               CGBN's messages over {_layers(work)} behind nothing; equal ranks; slow data not in it",
        f"step           {time.total * 1e3:.4g} ms = {time.compute * 1e3:.4g} compute + {time.gradients * 1e3:.3g} "
        f"gradients not hidden + {time.cgbn * 1e3:.3g} CGBN + {time.losses * 1e3:.2g} losses",
        *(f"               {later.total:.4g} s with {images} images" for images, later in grown[1:]),
        f"training       {hours:.3g} h at {plan.total_images / hours / 3600:.4g} images/s; "
        f"efficiency {time.efficiency:.1%}",
        "",
        *_scaling_table(plan, work, network),
    ]


def _plan_on(config: Config, nodes: Nodes, training_set: TrainingSet) -> JobPlan:
    """The plan of a run on other nodes. If norm.size does not divide, all ranks share statistics."""
    try:
        return plan_job(config, nodes, training_set)
    except UserError:
        return plan_job(replace(config, norm=replace(config.norm, size=0)), nodes, training_set)


def _scaling_table(plan: JobPlan, work: Work, network: Network) -> list[str]:
    per_node = plan.nodes.ranks_per_node
    lines = [
        f"{'ranks':>6} {'batch':>6} {'rate':>8} {'BN size':>8} {'steps':>8} {'hours':>8} {'efficiency':>10} "
        f"{'images/s':>8} {'CGBN':>6}"
    ]
    config = replace(plan.config, emulate=replace(plan.config.emulate, ranks=0))
    for ranks in sorted({math.ceil(ranks / per_node) * per_node for ranks in _SCALING_RANKS}):
        nodes = Nodes(ranks, per_node)
        try:
            other = _plan_on(config, nodes, plan.training_set)
        except UserError as error:
            lines.append(f"{ranks:>6} cannot be: {error}")
            continue
        time = time_of(other, work, network)
        size = other.groups.images if config.norm.kind == "cgbn" else 0
        hours, share = hours_of(other, work, network), time.cgbn / time.total
        lines.append(
            f"{ranks:>6} {other.epoch.global_batch:>6} {other.schedule.peak_lr:>8.3g} {size or '-':>8} "
            f"{other.total_steps:>8} {hours:>8.3g} {time.efficiency:>10.1%} "
            f"{other.total_images / hours / 3600:>8.4g} {share:>6.1%}"
        )
    return [
        *lines,
        "(CGBN: its messages' share of a step; where norm.size does not divide, all ranks share statistics)",
    ]
