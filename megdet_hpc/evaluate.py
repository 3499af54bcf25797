"""Score a checkpoint, or a results file of any program, on a packed set. It runs alone or under horovodrun.

`python -m megdet_hpc.evaluate --checkpoint FILE --data.val DIR`
`python -m megdet_hpc.evaluate --results FILE --data.val DIR`
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megdet_hpc.command_line import Parser, config_parser, parse_config
from megdet_hpc.config import Config, flatten
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.start import started

DESCRIPTION = """Score a checkpoint on a packed set with pycocotools, or the COCO results file of any program.

--checkpoint FILE detects and scores; the configuration is the checkpoint's, any key may be overridden, and the
detections are written as a COCO results file. RUN/best.json stands for the run's checkpoint of the highest AP.
--results FILE without --checkpoint scores the boxes and masks in FILE, whoever made them; nothing is written.
Every image is scored exactly once, and on its own, so the AP is the same at any number of ranks."""

USAGE = (
    "name what to score: --checkpoint RUN/checkpoints/step_NNNNNNNN.pt --data.val DIR, or "
    "--results FILE.json --data.val DIR for the detections of another program"
)


@dataclass(frozen=True)
class Task:
    """The task that the command line names."""

    config: Config
    checkpoint: Path | None
    results: Path
    """Results file. With a checkpoint it is written, without one it is read."""
    limit: int | None
    report: Path | None = None
    """Folder for the analysis; None for no analysis."""


def _parser() -> Parser:
    parser = config_parser("megdet_hpc.evaluate", DESCRIPTION)
    parser.add_argument(
        "--checkpoint",
        type=str,
        default=None,
        help="Checkpoint that megdet_hpc.train wrote, or best.json, which names one.",
    )
    parser.add_argument(
        "--results",
        type=str,
        default=None,
        help="COCO results file. With --checkpoint it is written (default: beside the checkpoint); "
        "without, its boxes are scored.",
    )
    parser.add_argument(
        "--report",
        type=str,
        default=None,
        help="Folder for a page of what is wrong with the detections, as megdet_hpc.analyze writes it.",
    )
    parser.add_argument("--limit", type=int, default=None, help="Number of images to score, the first of the set.")
    return parser


def _read_task(arguments: list[str], state: dict[str, Any] | None) -> Task:
    """The task of a command line, with the checkpoint's configuration as defaults.

    Raises:
        SystemExit: status 2 after one line that names the bad option; 0 after --help and --print_config.
        UserError: the checkpoint's configuration has keys that this version does not have.
    """
    parser = _parser()
    if state is not None:
        try:
            parser.use_detector(state["config"]["model"]["detector"])
            parser.set_defaults(flatten(state["config"]))
        except KeyError as error:
            raise UserError(f"the checkpoint was written by a version with other keys: {error}") from error
    config, further = parse_config(parser, arguments)
    checkpoint = Path(further.checkpoint) if further.checkpoint else None
    results = Path(further.results) if further.results else (checkpoint or Path()).with_suffix(".detections.json")
    report = Path(further.report) if further.report else None
    return Task(config, checkpoint, results, further.limit, report)


def _first_look(arguments: list[str]) -> str | None:
    """The checkpoint's name. It is needed first, since the checkpoint holds the defaults of the other keys.

    Ranges that depend on the checkpoint's values are checked later.

    Raises:
        SystemExit: status 2 where the command line itself is wrong, before anything starts; 0 after --help and
            --print_config.
    """
    parser = _parser()
    shown = [argument for argument in arguments if argument.split("=")[0] in ("-h", "--help", "--print_config")]
    try:
        namespace = parser.parse_named([argument for argument in arguments if argument not in shown])
        if shown:  # the parser with the checkpoint's configuration prints it
            from megdet_hpc.engine.checkpoint import load_checkpoint

            path = namespace.checkpoint
            _read_task(arguments, load_checkpoint(Path(path), mmap=True) if path else None)
    except UserError as error:
        parser.error(str(error))
    if namespace.checkpoint is None and namespace.results is None:
        parser.error(USAGE)
    if namespace.limit is not None and namespace.limit < 1:
        parser.error(f"--limit is {namespace.limit}; accepted: 1 or more")
    if namespace.report is not None:
        from megdet_hpc.analyze.output import check_output

        try:
            check_output(Path(namespace.report), "--report")
        except UserError as error:
            parser.error(str(error))
    checkpoint: str | None = namespace.checkpoint
    return checkpoint


def run_evaluation(task: Task, state: dict[str, Any] | None, command: str, runtime: Runtime) -> None:
    """Detect objects or read results, score them, and write. Collective of the world.

    Args:
        task: task of the command line.
        state: content of the checkpoint; None to score task.results.
        command: command line of this rank, which must be the same on all ranks.
        runtime: runtime of this process.

    Raises:
        UserError: the checkpoint, the results or the data do not fit.
    """
    from megdet_hpc.data.dataset import DetectionDataset
    from megdet_hpc.engine.agreement import require_agreement
    from megdet_hpc.evaluation.results import read_results

    config, world = task.config, runtime.world
    if not config.data.val:
        raise UserError("data.val is null; name the packed set to score")
    geometry = config.model.geometry
    dataset = DetectionDataset.open(config.data.val, config.data, training=False, seed=0, geometry=geometry)
    require_agreement(world, {"the command line": command}, {"data.val": dataset.pack})
    num_images = min(len(dataset), task.limit or len(dataset))
    if state is None:
        if world.rank == 0:
            found = read_results(task.results, dataset.pack)
            heading = f"{len(found)} detections of {task.results}"
            _print_scores(dataset.pack, found, num_images, task, heading, {"results": str(task.results)})
        return
    detections = _detect(task, state, dataset, runtime)
    if detections is not None:
        where = _write(task.results, detections)
        heading = f"step {state['step']}, {world.size} rank(s), {len(detections)} detections, {where}"
        source = {"checkpoint": f"{task.checkpoint}, step {state['step']}"}
        _print_scores(dataset.pack, detections, num_images, task, heading, source)


def _detect(task: Task, state: dict[str, Any], dataset: Any, runtime: Runtime) -> Any:
    """The detections of the checkpoint's model on rank 0; None elsewhere. Collective of the world."""
    from megdet_hpc.data.categories import Categories, match_labels
    from megdet_hpc.engine.deterministic import make_deterministic
    from megdet_hpc.evaluation.inference import detect_all
    from megdet_hpc.models.factory import restored_detector

    config, world = task.config, runtime.world
    if config.deterministic:
        make_deterministic()
    device = runtime.device(config.device)
    trained = Categories.of_checkpoint(state, dataset.categories)
    labels = match_labels(trained, dataset.categories, "the checkpoint", "data.val")
    if labels.note and world.rank == 0:
        print(labels.note, flush=True)
    weights, source = state["model"], str(task.checkpoint)
    model = restored_detector(config, weights, source, num_categories=len(trained), group=world).to(device)
    return detect_all(model, dataset, device, labels, world, num_workers=config.data.num_workers, limit=task.limit)


def _write(results: Path, detections: Any) -> str:
    """Write the results file. Returns its path, or why it could not be written: the scores matter more."""
    from megdet_hpc.evaluation.results import write_results

    try:
        write_results(results, detections)
        return f"in {results}"
    except OSError as error:
        return f"lost: {results} cannot be written ({error.strerror}); --results names another file"


def _print_scores(
    pack: Any, detections: Any, num_images: int, task: Task, heading: str, source: dict[str, str]
) -> None:
    """Score detections and print the heading, notes on the numbers, classes, COCO's metrics and the result line.

    The analysis that task.report asks for is written before the result line. `source` says in it what was scored.

    Raises:
        UserError: the analysis cannot be written; the scores are printed before.
    """
    from megdet_hpc.evaluation.coco import (
        class_table,
        metric_lines,
        result_line,
        score,
        what_is_missing,
        what_is_scored,
    )

    limit = task.config.evaluation.max_detections
    scores = score(pack, detections, num_images, max_detections=limit)
    lines = [heading, *what_is_scored(pack, num_images, limit)]
    if scores.boxes:
        lines.append(class_table(scores.classes))
        lines += metric_lines(scores.metrics)
    lines += what_is_missing(scores, pack, num_images)
    print("\n".join(lines), flush=True)
    if task.report is not None:
        from megdet_hpc.analyze.output import PAGE, write_analysis

        write_analysis(task.report, pack, detections, source, num_images=num_images, max_detections=limit)
        print(f"wrote {task.report / PAGE}")
    print(result_line(scores.metrics, images=num_images), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    arguments = sys.argv[1:] if arguments is None else arguments
    path = _first_look(arguments)
    with started() as runtime:
        from megdet_hpc.engine.checkpoint import load_checkpoint

        state = load_checkpoint(Path(path)) if path and runtime.world.rank == 0 else None
        # rank 0 alone opens the checkpoint and reads the command line with its configuration
        asked = (state, _read_task(arguments, state)) if runtime.world.rank == 0 else None
        state, task = runtime.world.broadcast_object(asked, name="checkpoint")
        run_evaluation(task, state, shlex.join(arguments), runtime)


if __name__ == "__main__":
    main()
