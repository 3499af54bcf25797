"""The lines that a run prints before its first step, and its config.yaml."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import yaml

from megdet_hpc.config import Config, to_dict
from megdet_hpc.data.sampler import EpochPlan
from megdet_hpc.engine.training import Training
from megdet_hpc.files import atomic_write
from megdet_hpc.log import config_files
from megdet_hpc.parallel.groups import BnGroups


def store_configuration(folder: Path, step: int, text: str) -> None:
    """Write the configuration of a start into the run's folder, and remove those of later steps.

    A run goes on from an older checkpoint where the newest is damaged. Its steps are repeated, so their rows and their
    configurations go; what is read as the newest start's would else be an older one's.

    Args:
        folder: folder of the run.
        step: updates that are done.
        text: configuration as YAML.

    Raises:
        OSError: the folder cannot be written.
    """
    first = folder / "config.yaml"
    with atomic_write(first.with_name(f"config-{step:08d}.yaml") if first.exists() else first) as file:
        file.write(text.encode())
    for since, later in config_files(folder):
        if since > step:
            later.unlink(missing_ok=True)


def print_first_lines(
    run: Training,
    ranks: str,
    groups: BnGroups,
    transport: str,
    gradients: tuple[str, bool],
    digest: str,
    source: Path | None,
) -> None:
    """Write the resolved configuration into the run's folder, and print it with its consequences. For rank 0.

    Args:
        run: training that is about to start.
        ranks: the processes of the job, as text.
        groups: groups of ranks that share batch statistics.
        transport: transport of their messages.
        gradients: what carries the gradients, and whether they are sent during the backward pass.
        digest: hash of the state, the same on every rank.
        source: checkpoint from which the run continues.

    Raises:
        OSError: the folder cannot be written.
    """
    plan, config = run.plan, run.config
    text = yaml.safe_dump(to_plain(config), sort_keys=False)
    run.check()
    store_configuration(run.output, run.step, text)
    print(text)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lines = {
        "ranks": ranks + (f"; emulates {plan.num_ranks} ranks" if config.emulate.ranks else ""),
        "device": f"{run.device} on {socket.gethostname()}",
        "data": f"{plan.num_images} images, {len(run.dataset.categories)} categories in {config.data.train}",
        "global batch": f"{plan.num_ranks} ranks x {plan.images_per_rank} images x {plan.accumulate} passes = "
        f"{plan.global_batch} images, {plan.steps_per_epoch} steps an epoch"
        + "".join(
            f"; {plan.global_batch * stage.factor} images, {stage.steps_per_epoch} steps, from epoch {stage.epoch} on"
            for stage in plan.stages[1:]
        ),
        "learning rate": f"{config.solver.base_lr}, times the gain of each update, 1 to {run.scaled.scale:g}"
        if run.scaled
        else f"{config.solver.base_lr} x ({plan.global_batch} / {config.solver.reference_batch}) ** "
        f"{config.solver.scaling_exponent:g} = {run.schedule.peak_lr:.4g}",
        "schedule": f"{run.schedule}"
        + ("; an update counts for as many of these steps as its gain" if run.scaled else ""),
        "normalization": f"{config.norm.kind} in {', '.join(config.norm.where)}; "
        + (f"{groups}, {config.norm.exchange} over {transport}" if config.norm.kind == "cgbn" else "no messages"),
        "gradients": f"averaged by {gradients[0]} {'during' if gradients[1] else 'after'} the backward pass "
        f"(solver.overlap {str(config.solver.overlap).lower()})"
        if run.world.size > 1
        else "of one process",
        "weights": f"{trained:,} trained, sha256 {digest[:12]} on every rank",
        "first weights": _describe_weights(config, source),
        "order": _describe_order(plan),
        "index": f"{run.dataset.pack.index_bytes / 2**20:.1f} MiB, {run.dataset.pack.index.origin}",
        **({"evaluation": _describe_deferred(run)} if run.deferred else {}),
        "start": f"step {run.step} of {run.last_step}"
        + (f", from {source}" if source else "")
        + ("; nothing left to do" if run.step >= run.last_step else ""),
    }
    for key, value in lines.items():
        print(f"{key + ':':15s}{value}")
    sys.stdout.flush()


def _describe_deferred(run: Training) -> str:
    """The way of deferred evaluations, and the most disk that they need."""
    bound = run.config.evaluation.max_waiting
    left = sum(map(run.evaluation_due, range(run.step + 1, run.last_step + 1)))
    # weights and momentum, and averaged weights if there are any
    tensors = [*run.model.parameters(), *run.model.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors) * (3 if run.average else 2) / 2**20
    most = min(left, bound) if bound else left
    return (
        f"deferred, {left} to come; at most {most} checkpoints of about {size:,.0f} MiB wait for "
        f"megdet evaluate --follow {run.output}, besides checkpoints.keep"
    )


def _describe_weights(config: Config, source: Path | None) -> str:
    model = config.model
    file, digest = model.backbone_weights, model.backbone_sha256
    if model.weights:
        file, digest = model.weights, model.weights_sha256
    began = f"{file}, sha256 {(digest or 'unknown')[:12]}" if file else "random weights, from scratch"
    return f"began with {began}; now the checkpoint's" if source else began


def _describe_order(plan: EpochPlan) -> str:
    if not plan.local:
        return "uniform, new every epoch"
    nodes, shards = max(plan.local.node_of_rank) + 1, len(plan.local.images_per_shard)
    return f"shard_local, {shards} shard(s) over {nodes} node(s), buffer of {plan.local.shuffle_buffer} images"


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration with lists for tuples, as YAML writes them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    result: dict[str, Any] = plain(to_dict(config))
    return result
