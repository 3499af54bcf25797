"""Score a checkpoint: `python -m megdet_hpc.evaluate --checkpoint FILE --data.val DIR`, alone or under horovodrun."""

from __future__ import annotations

import sys
from pathlib import Path

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config, flatten, to_dict
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.runtime import Runtime, started

DESCRIPTION = """Score a checkpoint on a packed validation set with pycocotools.

The configuration is the checkpoint's; any key may be overridden. Detections are written as a COCO results file.
Every image is scored exactly once, and on its own, so the AP is the same at any number of ranks."""


def _checkpoint_argument(arguments: list[str]) -> Path | None:
    """The value of --checkpoint, which is needed before the other keys can have their defaults."""
    for index, argument in enumerate(arguments):
        if argument == "--checkpoint" and index + 1 < len(arguments):
            return Path(arguments[index + 1])
        if argument.startswith("--checkpoint="):
            return Path(argument.split("=", 1)[1])
    return None


def run_evaluation(config: Config, checkpoint: Path, results: Path, limit: int | None, runtime: Runtime) -> None:
    """Load, detect, score, write. Collective of the world.

    Raises:
        UserError: the checkpoint or the data do not fit.
    """
    from megdet_hpc.data.dataset import Categories, DetectionDataset
    from megdet_hpc.engine.agreement import require_agreement
    from megdet_hpc.engine.checkpoint import load_checkpoint
    from megdet_hpc.evaluation.coco import average_precision, result_line, write_results
    from megdet_hpc.evaluation.inference import detect_all
    from megdet_hpc.models.factory import build_detector

    world = runtime.world
    device = runtime.device(config.device)
    if not config.data.val:
        raise UserError("data.val is null; name the packed set to score")
    dataset = DetectionDataset.open(config.data.val, config.data, training=False, seed=0)
    settings = {**flatten(to_dict(config)), "device": device.type, "--checkpoint": str(checkpoint), "--limit": limit}
    require_agreement(world, settings, {"data.val": dataset.pack})
    state = world.broadcast_object(load_checkpoint(checkpoint) if world.rank == 0 else None, name="checkpoint")
    named = zip(state["category_ids"], state["category_names"], strict=True)
    trained = Categories([{"id": key, "name": name} for key, name in named])
    dataset.categories.check_same(trained, "data.val", "the checkpoint")
    model = build_detector(config, num_categories=len(trained), group=world, world=world, pretrained=False)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise UserError(f"checkpoint {checkpoint} does not fit the configured model: {str(error)[:500]}") from error
    model.to(device)
    detections = detect_all(model, dataset, device, world, num_workers=config.data.num_workers, limit=limit)
    if detections is None:
        return
    num_images = min(len(dataset), limit or len(dataset))
    metrics = average_precision(dataset.pack, detections, num_images)
    try:
        write_results(results, detections)
        where = f"in {results}"
    except OSError as error:  # the scores are worth more than the file
        where = f"lost: {results} cannot be written ({error.strerror}); --results names another file"
    print(f"step {state['step']}, {world.size} rank(s), {len(detections)} detections, {where}")
    print(" ".join(f"{key}={value:.4f}" for key, value in metrics.items()))
    print(result_line(metrics, images=num_images), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = config_parser("megdet_hpc.evaluate", DESCRIPTION)
    parser.add_argument("--checkpoint", type=str, default=None, help="File written by megdet_hpc.train (required).")
    parser.add_argument(
        "--results",
        type=str,
        default=None,
        help="COCO results JSON to write (default: beside the checkpoint).",
    )
    parser.add_argument("--limit", type=int, default=None, help="Score only the first so many images.")
    checkpoint = _checkpoint_argument(arguments)
    if checkpoint is not None and not {"-h", "--help"} & set(arguments):
        from megdet_hpc.engine.checkpoint import load_checkpoint

        try:
            parser.set_defaults(flatten(load_checkpoint(checkpoint, mmap=True)["config"]))
        except UserError as error:
            parser.error(str(error))
        except KeyError as error:
            parser.error(f"checkpoint {checkpoint} was written by a version with other keys: {error}")
    config, further = parse_config(parser, arguments)
    if further.checkpoint is None:
        parser.error("name the file to score: --checkpoint RUN/checkpoints/step_*.pt --data.val DIR")
    if further.limit is not None and further.limit < 1:
        parser.error(f"--limit is {further.limit}; accepted: 1 or more")
    results = Path(further.results or Path(further.checkpoint).with_suffix(".detections.json"))
    with started() as runtime:
        run_evaluation(config, Path(further.checkpoint), results, further.limit, runtime)


if __name__ == "__main__":
    main()
