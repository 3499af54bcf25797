"""Train a detector: `horovodrun -np 128 python -m megdet_hpc.train --config megdet_r50_fpn_256`."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import yaml

from megdet_hpc.command_line import config_parser, named_configs, parse_config
from megdet_hpc.config import Config, to_dict
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launch import is_first_process
from megdet_hpc.parallel.runtime import Runtime, started

DESCRIPTION = """Train a Faster R-CNN with cross-GPU batch normalization on packed COCO data.

Start one process per GPU with horovodrun, mpirun or srun; plain python trains on one process. Data comes from
data_prep/pack_coco.py. Every key below can stand in a YAML file (--config) or on the command line (--norm.size 32)."""

NEEDS = """python -m megdet_hpc.train found no data to train on: {missing} does not exist.

What it needs:
  1. COCO packed once:   python data_prep/pack_coco.py --annotations instances_train2017.json \\
                             --images train2017/ --output packed/train        (the same for packed/val)
  2. a configuration:    --config NAME_OR_PATH, one of: {names}
                         (files in {folder}; without --config: {default})
  3. for example:        horovodrun -np 128 python -m megdet_hpc.train --config {default} \\
                             --data.train packed/train --data.val packed/val --output runs/first

No data at hand? `make demo` generates some and trains on it. All keys: python -m megdet_hpc.train --help"""

DEFAULT_CONFIG = "megdet_r50_fpn_256"


def build_training(config: Config, runtime: Runtime) -> tuple[Any, Any]:
    """Build the objects of a run and bring them to the state it continues from. Collective of the world.

    Returns:
        The Training and the evaluation callable (None without validation set).

    Raises:
        UserError: data, configuration, checkpoint or rank arithmetic do not fit.
    """
    import numpy as np
    import torch

    from megdet_hpc.data.dataset import DetectionDataset
    from megdet_hpc.data.packed_coco import PackedCoco
    from megdet_hpc.data.sampler import EpochPlan
    from megdet_hpc.engine.loop import Training
    from megdet_hpc.engine.state import check_same_state
    from megdet_hpc.models.factory import build_detector
    from megdet_hpc.parallel.groups import BnGroups
    from megdet_hpc.solver.lr_schedule import resolve_schedule
    from megdet_hpc.solver.optimizer import build_optimizer

    torch.manual_seed(config.seed)
    world = runtime.world
    groups = BnGroups(world.size, config.data.images_per_rank, config.norm.size)
    device = runtime.device(config.device)
    output = Path(config.output)
    resumed = world.broadcast_object(_find_state(config, output) if world.rank == 0 else None, name="resume")
    dataset = DetectionDataset(PackedCoco(config.data.train), config.data, training=True, seed=config.seed)
    portrait = dataset.pack.heights > dataset.pack.widths
    if not config.data.group_by_aspect_ratio:
        portrait = np.zeros_like(portrait)
    plan = EpochPlan(portrait, config.data.images_per_rank, world.size, config.solver.accumulate, config.seed)
    schedule = resolve_schedule(config.solver, global_batch=plan.global_batch, steps_per_epoch=plan.steps_per_epoch)
    group = world.split(groups.group_of(world.rank), name="bn_groups") if groups.num_groups > 1 else world
    model = build_detector(config, num_categories=len(dataset.categories), group=group, world=world).to(device)
    optimizer = runtime.distribute(
        build_optimizer(model, config.solver, decay_norm=config.norm.parameters == "decay"),
        model,
        config.solver.accumulate,
    )
    run = Training(config, world, device, model, optimizer, schedule, dataset, plan, output)
    if resumed:
        run.restore(resumed[1], resumed[0])
    runtime.broadcast_model(model)
    digest = check_same_state(model, world)
    if world.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        _print_plan(run, runtime, groups, digest, resumed[0] if resumed else None)
    return run, _evaluation(run) if config.data.val else None


def _find_state(config: Config, output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue, by config.resume; refuses to start anew over an earlier run."""
    from megdet_hpc.engine.checkpoint import load_checkpoint, load_newest

    if config.resume not in ("never", "auto"):
        if not Path(config.resume).is_file():
            raise UserError(f"resume is {config.resume!r}; accepted: never, auto, or a checkpoint file")
        return Path(config.resume), load_checkpoint(Path(config.resume))
    if config.resume == "auto":
        return load_newest(output / "checkpoints")
    if (output / "metrics.jsonl").exists() or (output / "checkpoints").exists():
        raise UserError(
            f"output {output} holds a run already; continue it with --resume auto, or name another --output"
        )
    return None


def _evaluation(run: Any) -> Any:
    """The collective that scores the model on the validation set and leaves its files on rank 0."""
    from megdet_hpc.data.dataset import DetectionDataset
    from megdet_hpc.data.packed_coco import PackedCoco
    from megdet_hpc.evaluation.coco import average_precision, write_results
    from megdet_hpc.evaluation.inference import detect_all
    from megdet_hpc.report.pictures import draw_predictions

    config, world = run.config, run.world
    dataset = DetectionDataset(PackedCoco(config.data.val), config.data, training=False, seed=0)
    dataset.categories.check_same(run.dataset.categories, "data.val", "data.train")

    def evaluate() -> dict[str, float]:
        detections = detect_all(run.model, dataset, run.device, world, num_workers=config.data.num_workers)
        metrics = None
        if detections is not None:
            metrics = average_precision(dataset.pack, detections)
            write_results(run.output / "detections.json", detections)
            if run.step == run.last_step:
                draw_predictions(dataset, detections, run.output / "predictions.png")
        result: dict[str, float] = world.broadcast_object(metrics, name="metrics")
        return result

    return evaluate


def _print_plan(run: Any, runtime: Runtime, groups: Any, digest: str, source: Path | None) -> None:
    plan, config = run.plan, run.config
    text = yaml.safe_dump(to_plain(config), sort_keys=False)
    (run.output / "config.yaml").write_text(text)
    print(text)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lines = {
        "ranks": runtime.description,
        "device": f"{run.device} on {socket.gethostname()}",
        "data": f"{plan.num_images} images, {len(run.dataset.categories)} categories in {config.data.train}",
        "global batch": f"{plan.num_ranks} ranks x {plan.images_per_rank} images x {plan.accumulate} passes = "
        f"{plan.global_batch} images, {plan.steps_per_epoch} steps an epoch",
        "learning rate": f"{config.solver.base_lr} x ({plan.global_batch} / {config.solver.reference_batch}) ** "
        f"{config.solver.scaling_exponent:g} = {run.schedule.peak_lr:.4g}",
        "schedule": str(run.schedule),
        "normalization": f"{config.norm.kind} in {', '.join(config.norm.where)}; "
        + (f"{groups}, {run.world.transport}" if config.norm.kind == "cgbn" else "no messages"),
        "weights": f"{trained:,} trained, sha256 {digest[:12]} on every rank",
        "start": f"step {run.step} of {run.last_step}" + (f", from {source}" if source else ""),
    }
    for key, value in lines.items():
        print(f"{key + ':':15s}{value}")
    sys.stdout.flush()


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration with lists for tuples, as YAML writes them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    result: dict[str, Any] = plain(to_dict(config))
    return result


def _explain_missing_data(config: Config) -> None:
    missing = next((d for d in (config.data.train, config.data.val) if d and not Path(d).exists()), None)
    if missing is None:
        return
    if is_first_process():
        names = named_configs()
        folder = next(iter(names.values())).parent
        text = NEEDS.format(missing=missing, names=", ".join(names), folder=folder, default=DEFAULT_CONFIG)
        print(text, file=sys.stderr)
    raise SystemExit(2)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not any(argument.split("=")[0] in ("--config", "-h", "--help") for argument in arguments):
        arguments = ["--config", DEFAULT_CONFIG, *arguments]
    config, _ = parse_config(config_parser("megdet_hpc.train", DESCRIPTION), arguments)
    _explain_missing_data(config)
    with started() as runtime:
        from megdet_hpc.engine.loop import train
        from megdet_hpc.evaluation.coco import result_line
        from megdet_hpc.report.curves import draw_curves

        run, evaluate = build_training(config, runtime)
        train(run, evaluate)
        if runtime.world.rank == 0:
            draw_curves(run.output / "metrics.jsonl", run.output / "curves.png", str(run.output))
            print(f"trained {run.step} steps; checkpoints, metrics and pictures are in {run.output}")
            if run.metrics:
                print(result_line(run.metrics, output=run.output))


if __name__ == "__main__":
    main()
