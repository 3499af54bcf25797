"""Train a detector: `horovodrun -np 128 python -m megdet_hpc.train --config megdet_r50_fpn_256`."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megdet_hpc.command_line import config_parser, named_configs, parse_config
from megdet_hpc.config import Config, flatten, to_dict
from megdet_hpc.engine.stop import EXIT_UNFINISHED, StopRequests
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launch import is_first_process, note_status
from megdet_hpc.programs import as_called_here

if TYPE_CHECKING:
    from megdet_hpc.parallel.runtime import Runtime

DESCRIPTION = """Train a Faster R-CNN with cross-GPU batch normalization on packed COCO data.

Start one process per GPU with horovodrun, mpirun or srun; plain python trains on one process. Data comes from
data_prep/pack_coco.py. Every key below can stand in a YAML file (--config) or on the command line (--norm.size 32)."""

NEEDS = """python -m megdet_hpc.train did not find its data: {missing} does not exist.

What it needs:
  1. COCO packed once:   python data_prep/pack_coco.py            (coco/{{train,val}}2017 to packed/{{train,val}})
                         or any set: --annotations FILE.json --images DIR --output DIR
  2. a configuration:    --config NAME_OR_PATH, one of: {names}
                         (files in {folder}; without --config: {default})
  3. for example:        horovodrun -np 128 python -m megdet_hpc.train --config {default} \\
                             --data.train packed/train --data.val packed/val --output runs/first

No data at hand? `make demo` in a checkout trains on images that it draws; alone they are drawn by
python data_prep/make_shapes.py. All keys: python -m megdet_hpc.train --help"""

Check = Callable[[], None]
DEFAULT_CONFIG = "megdet_r50_fpn_256"


def build_training(config: Config, runtime: Runtime, watchdog: Any, check: Check = lambda: None) -> tuple[Any, Any]:
    """Build the objects of a run and bring them to the state it continues from. Collective of the world.

    The watchdog is told of each image that is evaluated, and of the scoring; `check` raises where the output is another
    run's by now.

    Returns:
        The Training and the evaluation callable (None without validation set).

    Raises:
        UserError: data, configuration, checkpoint or rank arithmetic do not fit.
    """
    import numpy as np
    import torch

    from megdet_hpc.data.sampler import EpochPlan
    from megdet_hpc.engine.agreement import require_agreement
    from megdet_hpc.engine.emulate import VirtualRanks
    from megdet_hpc.engine.first_lines import print_first_lines
    from megdet_hpc.engine.loop import Training
    from megdet_hpc.engine.state import check_same_state
    from megdet_hpc.models.factory import build_detector
    from megdet_hpc.models.weights import check_constants, scratch_warning
    from megdet_hpc.parallel.groups import BnGroups
    from megdet_hpc.parallel.transports import hides_gradients
    from megdet_hpc.solver.agvm import ModulatedOptimizer
    from megdet_hpc.solver.lr_schedule import resolve_schedule
    from megdet_hpc.solver.optimizer import build_optimizer
    from megdet_hpc.solver.precision import Precision, keep_coordinates_float32

    torch.manual_seed(config.seed)
    world = runtime.world
    device = runtime.device(config.device)
    dataset, validation = _open_data(config)
    packs = {"data.train": dataset.pack, **({"data.val": validation.pack} if validation else {})}
    require_agreement(world, {**flatten(to_dict(config)), "device": device.type}, packs)
    images_per_unit = config.data.images_per_rank if config.norm.unit == "ranks" else 1
    bn_size = config.norm.size * images_per_unit if config.norm.kind == "cgbn" else 0
    num_ranks = config.emulate.ranks or world.size
    if num_ranks != world.size and world.size > 1:
        raise UserError(f"emulate.ranks {num_ranks}: {world.size} ranks were started; emulate in a single process")
    groups = BnGroups(num_ranks, config.data.images_per_rank, bn_size)
    if config.data.decode_on_gpu and device.type != "cuda":
        raise UserError(f"data.decode_on_gpu is true, but this rank's device is {device}; accepted on GPUs only")
    output = Path(config.output)
    resumed, weights = world.broadcast_object(_begin(config, output) if world.rank == 0 else None, name="resume")
    asked, config = config, replace(config, model=weights)
    portrait = dataset.pack.heights > dataset.pack.widths
    if not config.data.group_by_aspect_ratio:
        portrait = np.zeros_like(portrait)
    local = _shard_local(config, runtime, dataset.pack.images_per_shard)
    plan = EpochPlan(portrait, config.data.images_per_rank, num_ranks, config.solver.accumulate, config.seed, local)
    schedule = resolve_schedule(config.solver, global_batch=plan.global_batch, steps_per_epoch=plan.steps_per_epoch)
    if resumed is None:
        check_constants(asked, weights.backbone_weights)
        steps = min(schedule.total_steps, config.max_steps or schedule.total_steps)
        warning = scratch_warning(asked.model, steps * plan.global_batch)
        if warning and world.rank == 0:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    group = _bn_group(config, runtime, groups, device)
    pretrained = resumed is None and world.rank == 0  # the others are given rank 0's weights
    model = build_detector(config, num_categories=len(dataset.categories), group=group, pretrained=pretrained).to(
        device
    )
    keep_coordinates_float32(model)
    overlap = hides_gradients(
        config.solver.overlap,
        device_type=device.type,
        transport=config.norm.transport,
        layers_send=config.norm.kind == "cgbn" and groups.ranks_per_group > 1,
        gradients_over_nccl=runtime.gradients_over_nccl,
    )
    optimizer = runtime.distribute(
        build_optimizer(model, config.solver, decay_norm=config.norm.parameters == "decay", parts=model.parts()),
        model,
        config.solver.accumulate,
        compression=config.solver.compression,
        overlap=overlap,
    )
    if config.solver.agvm:
        carrier = runtime.communicator(config.norm.transport, device)
        optimizer = ModulatedOptimizer(optimizer, carrier, first_step=schedule.warmup_steps)
    precision = Precision(config.solver.precision, device)
    run = Training(config, world, device, model, optimizer, schedule, dataset, plan, output, precision, check=check)
    if resumed:
        run.restore(resumed[1], resumed[0])
    runtime.broadcast_model(model)
    if config.emulate.ranks:
        run.ranks = VirtualRanks(model, groups, precision)
    digest = check_same_state(model, optimizer.optimizer, world)
    evaluate, notes = _evaluation(run, validation, watchdog) if validation else (None, [])
    if world.rank == 0:
        print_first_lines(
            run, runtime.description, groups, group.transport, overlap, digest, resumed[0] if resumed else None
        )
        for line in notes:
            print(line, flush=True)
    return run, evaluate


def _open_data(config: Config) -> tuple[Any, Any]:
    """The training set, and the validation set or None.

    Raises:
        PackError: a pack cannot be used.
        UserError: the training set has no box to train on.
    """
    from megdet_hpc.data.dataset import DetectionDataset

    train = DetectionDataset.open(config.data.train, config.data, training=True, seed=config.seed)
    train.check_targets("data.train")
    if not config.data.val:
        return train, None
    return train, DetectionDataset.open(config.data.val, config.data, training=False, seed=0)


def _shard_local(config: Config, runtime: Runtime, images_per_shard: tuple[int, ...]) -> Any:
    """Nodes and shards for shard-local sampling, else None. Collective of the world (`hosts`) for the former."""
    from megdet_hpc.data.shard_local import ShardLocal, number_nodes

    if config.data.sampling != "shard_local":
        return None
    hosts = runtime.world.allgather_object(socket.gethostname(), name="hosts")
    return ShardLocal(number_nodes(hosts), images_per_shard, config.data.shuffle_buffer)


def _bn_group(config: Config, runtime: Runtime, groups: Any, device: Any) -> Any:
    """The communicator of this rank's BN group, on the configured transport. Collective of the world."""
    from megdet_hpc.parallel.serial import SerialCommunicator

    if config.norm.kind != "cgbn":
        return runtime.world
    if config.emulate.ranks:
        return SerialCommunicator()
    carrier = runtime.communicator(config.norm.transport, device)
    if groups.num_groups == 1:
        return carrier
    return carrier.split(groups.group_of(runtime.world.rank), name="bn_groups")


def _begin(config: Config, output: Path) -> tuple[tuple[Path, dict[str, Any]] | None, Any]:
    """What rank 0 decides for all: the checkpoint to continue, if any, and the model with its weights resolved."""
    from megdet_hpc.models.weights import resolve_weights, resumed_weights

    found = _find_state(config, output)
    return found, resumed_weights(config.model, found[1]["config"]["model"]) if found else resolve_weights(config.model)


def _find_state(config: Config, output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue, by config.resume; refuses to start anew over an earlier run."""
    from megdet_hpc.engine.checkpoint import (
        checkpoint_files,
        load_checkpoint,
        load_newest,
        remove_unfinished,
        step_of,
    )

    remove_unfinished(output / "checkpoints")
    newest = max(map(step_of, checkpoint_files(output / "checkpoints")), default=0)
    if config.resume not in ("never", "auto"):
        if not Path(config.resume).is_file():
            raise UserError(f"resume is {config.resume!r}; accepted: never, auto, or a checkpoint file")
        state = load_checkpoint(Path(config.resume))
        if state["step"] < newest:
            raise UserError(
                f"resume {config.resume} is at step {state['step']}, but output {output} holds step {newest}; "
                "name another --output, so that nothing is overwritten"
            )
        return Path(config.resume), state
    if config.resume == "auto":
        return load_newest(output / "checkpoints")
    if (output / "metrics.jsonl").exists() or (output / "checkpoints").exists():
        raise UserError(
            f"output {output} holds a run already; continue it with --resume auto, or name another --output"
        )
    return None


def _evaluation(run: Any, dataset: Any, watchdog: Any) -> tuple[Any, list[str]]:
    """The collective that scores the model on the validation set and leaves its files on rank 0; what to say of it."""
    from megdet_hpc.data.categories import match_labels
    from megdet_hpc.evaluation.coco import score, what_is_missing, what_is_scored
    from megdet_hpc.evaluation.inference import detect_all
    from megdet_hpc.evaluation.results import write_results
    from megdet_hpc.report.pictures import draw_predictions

    config, world = run.config, run.world
    labels = match_labels(run.dataset.categories, dataset.categories, "data.train", "data.val")
    limit, pack = config.evaluation.max_detections, dataset.pack
    said = [labels.note, *what_is_scored(pack, len(pack), limit)]

    def on_rank_0(detections: Any) -> dict[str, float]:
        scores = score(pack, detections, max_detections=limit)
        run.check()
        write_results(run.output / "detections.json", detections)
        if run.step == run.last_step:
            draw_predictions(dataset, detections, run.output / "predictions.png")
            for line in what_is_missing(scores, pack, len(pack)):
                print(line, flush=True)
        return scores.logged()

    def evaluate() -> dict[str, float]:
        watchdog.tick()  # what follows is no step
        detections = detect_all(
            run.model, dataset, run.device, labels, world, num_workers=config.data.num_workers, moved=watchdog.tick
        )
        metrics: dict[str, float] = watchdog.alone(lambda: on_rank_0(detections), name="metrics")
        return metrics

    return evaluate, [line for line in said if line]


def _explain_missing_data(config: Config) -> None:
    if not Path(config.data.train).exists():
        missing, advice = f"data.train {config.data.train}", ""
    elif config.data.val and not Path(config.data.val).exists():
        missing, advice = f"data.val {config.data.val}", " (--data.val null trains without validation)"
    else:
        return
    if not is_first_process():
        # where only this host lacks the folder, rank 0 will not say so
        time.sleep(1)
        print(f"megdet_hpc: error: {missing} does not exist on {socket.gethostname()}", file=sys.stderr)
    else:
        names = named_configs()
        folder = next(iter(names.values())).parent
        text = as_called_here(NEEDS).format(
            missing=missing + advice, names=", ".join(names), folder=folder, default=DEFAULT_CONFIG
        )
        print(text, file=sys.stderr)
    note_status(2)
    raise SystemExit(2)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not any(argument.split("=")[0] in ("--config", "-h", "--help") for argument in arguments):
        arguments = ["--config", DEFAULT_CONFIG, *arguments]
    config, _ = parse_config(config_parser("megdet_hpc.train", as_called_here(DESCRIPTION)), arguments)
    _explain_missing_data(config)
    stop, stopped = StopRequests(config.max_minutes, Path(config.output)), ""
    # not before: they import torch, which takes long where many ranks read it from one file system
    from megdet_hpc.engine.ownership import owned
    from megdet_hpc.parallel.runtime import started

    world = started(config.norm.transport, config.device, deterministic=config.deterministic)
    with world as runtime, owned(Path(config.output), runtime.world) as folder:
        from megdet_hpc.engine.checkpoint import read_best
        from megdet_hpc.engine.deterministic import make_deterministic, naming_operators
        from megdet_hpc.engine.loop import train
        from megdet_hpc.engine.watchdog import Watchdog
        from megdet_hpc.evaluation.coco import result_line
        from megdet_hpc.report.curves import draw_curves

        if runtime.world.rank == 0:
            stop.remove_old_file()
        reports = folder.path / "watchdog"
        watchdog = Watchdog(config.watchdog_minutes, reports, runtime.world, runtime.abort, folder.check)
        if config.deterministic:
            make_deterministic()
        run, evaluate = build_training(config, runtime, watchdog, folder.check)
        with naming_operators(config.deterministic):
            stopped = train(run, evaluate, stop, watchdog)
        watchdog.close()
        if runtime.world.rank == 0:
            folder.check()
            draw_curves(run.output / "metrics.jsonl", run.output / "curves.png", str(run.output))
        if runtime.world.rank == 0 and stopped:
            stop.tell(
                f"stopped after step {run.step} of {run.last_step}: {stopped}; the state is saved",
                f"--resume auto with the same output {run.output} goes on; exit status {EXIT_UNFINISHED}",
            )
        elif runtime.world.rank == 0:
            print(f"trained {run.step} steps; checkpoints, metrics and pictures are in {run.output}")
            if best := read_best(run.output).file:
                print(f"highest AP so far: {run.best_ap:.3f}, checkpoint {run.output / best}")
            if evaluate and run.metrics:
                print(result_line(run.metrics, output=run.output))
    if stopped:
        note_status(EXIT_UNFINISHED)
        raise SystemExit(EXIT_UNFINISHED)


if __name__ == "__main__":
    main()
