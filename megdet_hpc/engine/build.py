"""Construction of the objects of a training run, up to the state from which it continues."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from megdet_hpc.config import Config, flatten, to_dict
from megdet_hpc.data.categories import match_labels
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.sampler import aspect_groups
from megdet_hpc.data.shard_local import ShardLocal, number_nodes
from megdet_hpc.devices import is_gpu
from megdet_hpc.engine.agreement import require_agreement
from megdet_hpc.engine.compiled import compile_dense
from megdet_hpc.engine.emulate import VirtualPasses
from megdet_hpc.engine.first_lines import print_first_lines
from megdet_hpc.engine.resume import begin, begin_average, restore
from megdet_hpc.engine.state import check_same_state
from megdet_hpc.engine.training import Training
from megdet_hpc.errors import UserError
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.factory import build_detector, first_detector
from megdet_hpc.models.weights import check_constants, scratch_warning
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.cores import cores_here
from megdet_hpc.parallel.runtime import HOROVOD, Runtime, SynchronizedOptimizer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.solver.adascale import ScaledOptimizer
from megdet_hpc.solver.agvm import EmulatedHalves, Halves, ModulatedOptimizer, RankHalves
from megdet_hpc.solver.gradient_noise import GradientNoise
from megdet_hpc.solver.optimizer import build_optimizer
from megdet_hpc.solver.precision import Precision, ready_for_half_precision
from megdet_hpc.solver.run_plan import RunPlan

Check = Callable[[], None]


def build_training(
    config: Config, runtime: Runtime, check: Check = lambda: None
) -> tuple[Training, DetectionDataset | None]:
    """Build the objects of a run, and restore the state from which it continues. Collective of the world.

    Args:
        config: the run's configuration.
        runtime: this process in the world.
        check: raises if another start has taken the output folder.

    Returns:
        The run and its validation set, if it has one.

    Raises:
        UserError: data, configuration, checkpoint or rank arithmetic do not fit.
    """
    torch.manual_seed(config.seed)
    world, device = runtime.world, runtime.device(config.device)
    dataset, validation = _open_data(config)
    packs = {"data.train": dataset.pack, **({"data.val": validation.pack} if validation else {})}
    require_agreement(world, {**flatten(to_dict(config)), "device": device.type}, packs)
    _check_runtime(config, world.size, device)
    output = Path(config.output)
    first = begin(config, output, check) if world.rank == 0 else None
    resumed, weights = world.broadcast_object(first, name="resume")
    asked, config = config, replace(config, model=weights)
    plan = _plan_of(config, runtime, dataset.pack)
    if resumed is None:
        _check_first_weights(asked, weights.backbone_weights, plan, show=world.rank == 0)
    group = _bn_group(plan, runtime, device)
    model, began = _detector(config, dataset, group, first=resumed is None and world.rank == 0)
    ready_for_half_precision(model.to(device))
    if config.model.compile:
        compile_dense(model)
    noise = _noise(plan, model)
    halves = _halves(plan, runtime, model, device)
    optimizer, overlap = _optimizer(plan, runtime, model, device, noise, halves)
    precision = Precision(config.solver.precision, device)
    run = Training(
        config, world, device, model, optimizer, plan.schedule, dataset, plan.epoch, output, precision, check=check
    )
    if resumed:
        restore(run, resumed[1], resumed[0])
    runtime.broadcast_model(model)
    began |= begin_average(run, resumed)
    run.noise = noise
    if config.emulate.ranks:
        keep = config.emulate.keep_graphs
        half = halves if isinstance(halves, EmulatedHalves) else None
        run.passes = VirtualPasses(model, plan.groups, precision, keep_graphs=keep, noise=run.noise, halves=half)
    digest = check_same_state(model, optimizer.optimizer, world)
    if world.rank == 0:
        print_first_lines(
            run,
            runtime.description,
            plan.groups,
            group.transport,
            (runtime.carrier, overlap),
            digest,
            resumed[0] if resumed else None,
        )
        if line := _shared_core(runtime, device):
            began["cores"] = line
        for key, line in began.items():
            print(f"{key + ':':15s}{line}", flush=True)
    return run, validation


def _shared_core(runtime: Runtime, device: torch.device) -> str:
    """What a rank of CPUs loses that has no core beside Horovod's thread; "" for all others."""
    if runtime.world.size == 1 or runtime.carrier != HOROVOD or is_gpu(device):
        return ""
    cores = cores_here(runtime.local_size)
    if cores >= 2:
        return ""
    return f"{cores:g} a rank, which Horovod's thread takes a share of; --solver.gradients mpi has no such thread"


def _open_data(config: Config) -> tuple[DetectionDataset, DetectionDataset | None]:
    """The training set, and the validation set or None.

    Raises:
        PackError: a pack cannot be used.
        UserError: the training set has no box to train on, or the sets have different categories.
    """

    train = DetectionDataset.open(
        config.data.train,
        config.data,
        training=True,
        seed=config.seed,
        masks=config.model.needs_masks,
        geometry=config.model.geometry,
    )
    train.check_targets("data.train")
    if not config.data.val:
        return train, None
    geometry = config.model.geometry
    validation = DetectionDataset.open(config.data.val, config.data, training=False, seed=0, geometry=geometry)
    match_labels(train.categories, validation.categories, "data.train", "data.val")
    return train, validation


def _detector(
    config: Config, dataset: DetectionDataset, group: Communicator, *, first: bool
) -> tuple[Detector, dict[str, str]]:
    """The detector, and a text about its first weights.

    Args:
        config: the run's configuration.
        dataset: training set.
        group: ranks that share batch statistics.
        first: whether this rank reads files of weights. The others get its weights, unless a checkpoint replaces all.
    """
    if not first:
        return build_detector(config, num_categories=len(dataset.categories), group=group, pretrained=False), {}
    model, taken = first_detector(config, dataset.categories, group)
    return model, taken.lines() if taken else {}


def _check_runtime(config: Config, num_ranks: int, device: torch.device) -> None:
    """Raise UserError if the ranks or the device do not fit the configuration."""
    if config.emulate.ranks and num_ranks > 1:
        raise UserError(
            f"emulate.ranks {config.emulate.ranks}: {num_ranks} ranks were started; emulate in a single process"
        )
    if config.data.decode_on_gpu and device.type != "cuda":
        raise UserError(f"data.decode_on_gpu is true, but this rank's device is {device}; accepted on GPUs only")


def _plan_of(config: Config, runtime: Runtime, pack: PackedCoco) -> RunPlan:
    """The run's arithmetic. Collective of the world (`hosts`) with shard-local sampling."""

    local = _shard_local(config, runtime, pack.images_per_shard)
    return RunPlan.of(config, runtime.world.size, aspect_groups(pack, config.data), local)


def _check_first_weights(asked: Config, file: str | None, plan: RunPlan, *, show: bool) -> None:
    """Refuse constant parts on random weights, and warn of a start from scratch that nobody asked for.

    Args:
        asked: the configuration as it was given.
        file: the backbone's weights; None: from scratch.
        plan: the run's arithmetic.
        show: whether this rank prints.
    """

    check_constants(asked, file)
    warning = scratch_warning(asked.model, plan.total_images)
    if warning and show:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _optimizer(
    plan: RunPlan,
    runtime: Runtime,
    model: Detector,
    device: torch.device,
    noise: GradientNoise | None,
    halves: Halves | None,
) -> tuple[SynchronizedOptimizer, bool]:
    """The optimizer over all ranks, and whether its gradients travel during the backward pass.

    Collective of the world with solver.gradients torch.
    """

    config, solver = plan.config, plan.config.solver
    overlap = runtime.overlaps(
        solver.overlap,
        device=device,
        transport=config.norm.transport,
        layers_send=plan.ranks_per_statistics > 1,
    )
    inner = build_optimizer(model, solver, decay_norm=config.norm.parameters == "decay", parts=model.parts())
    optimizer = runtime.distribute(inner, model, solver.accumulate, compression=solver.compression, overlap=overlap)
    if noise and solver.adascale:
        optimizer = ScaledOptimizer(optimizer, noise, scale=plan.epoch.global_batch / solver.reference_batch)
    if halves:
        optimizer = ModulatedOptimizer(optimizer, halves, first_step=plan.schedule.warmup_steps)
    return optimizer, overlap


def _halves(plan: RunPlan, runtime: Runtime, model: Detector, device: torch.device) -> Halves | None:
    """What AGVM compares, if the run has it. Collective of the world with solver.agvm."""
    config = plan.config
    if not config.solver.agvm:
        return None
    if config.emulate.ranks:
        return EmulatedHalves(config.emulate.ranks, model.parameters())
    return RankHalves(runtime.communicator(config.norm.transport, device), model.parameters())


def _noise(plan: RunPlan, model: Detector) -> GradientNoise | None:
    """The measuring of the gradient noise scale, if the run asks for it; raises UserError if it has one rank."""
    every, epoch = 1 if plan.config.solver.adascale else plan.config.solver.noise_every, plan.epoch
    if not every:
        return None
    return GradientNoise(
        model,
        every,
        ranks=epoch.num_ranks,
        images=epoch.images_per_rank,
        accumulate=epoch.accumulate,
        emulated=plan.config.emulate.ranks > 0,
    )


def _shard_local(config: Config, runtime: Runtime, images_per_shard: tuple[int, ...]) -> ShardLocal | None:
    """Nodes and shards for shard-local sampling; None without it. With it, a collective of the world (`hosts`)."""

    if config.data.sampling != "shard_local":
        return None
    hosts = runtime.world.allgather_object(socket.gethostname(), name="hosts")
    return ShardLocal(number_nodes(hosts), images_per_shard, config.data.shuffle_buffer)


def _bn_group(plan: RunPlan, runtime: Runtime, device: torch.device) -> Communicator:
    """The communicator of this rank's BN group, on the configured transport. Collective of the world."""

    config, groups = plan.config, plan.groups
    if config.norm.kind != "cgbn":
        return runtime.world
    if config.emulate.ranks:
        return SerialCommunicator()
    carrier = runtime.communicator(config.norm.transport, device)
    if groups.num_groups == 1:
        return carrier
    return carrier.split(groups.group_of(runtime.world.rank), name="bn_groups")
