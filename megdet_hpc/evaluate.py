"""Score a checkpoint, or a results file of any program, on a packed set. It runs alone or under horovodrun.

`python -m megdet_hpc.evaluate --checkpoint FILE --data.val DIR`
`python -m megdet_hpc.evaluate --results FILE --data.val DIR`
`python -m megdet_hpc.evaluate --follow RUN`
"""

from __future__ import annotations

import errno
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megdet_hpc.command_line import Parser, config_parser, parse_config, refuse_output
from megdet_hpc.config import Config, flatten
from megdet_hpc.errors import UserError, file_error

if TYPE_CHECKING:
    from megdet_hpc.evaluation.columns import Truth
    from megdet_hpc.evaluation.detections import DetectionTable
    from megdet_hpc.evaluation.scorer import Measured
    from megdet_hpc.parallel.runtime import Runtime

DESCRIPTION = """Score a checkpoint on a packed set as pycocotools does, or the COCO results file of any program.

--checkpoint FILE detects and scores; the configuration is the checkpoint's, any key may be overridden, and the
detections are written as a COCO results file. RUN/best.json stands for the run's checkpoint of the highest AP.
--results FILE without --checkpoint scores the boxes and masks in FILE, whoever made them; nothing is written.
--follow RUN scores the checkpoints of a run with evaluation.mode deferred as they appear, until the run has ended.
Every image is scored exactly once, and on its own, so the AP is the same at any number of ranks."""

USAGE = (
    "name what to score: --checkpoint RUN/checkpoints/step_NNNNNNNN.pt --data.val DIR, or "
    "--results FILE.json --data.val DIR for the detections of another program, or --follow RUN for those of a run"
)
_INTERVALS = (0.1, 3600.0)


@dataclass(frozen=True)
class Task:
    """The task that the command line names."""

    config: Config
    checkpoint: Path | None
    results: Path
    """Results file. With a checkpoint it is written, without one it is read."""
    results_named: bool
    """Whether the command line names it. Otherwise it lies beside the checkpoint."""
    limit: int | None
    report: Path | None = None
    """Folder for the analysis; None for no analysis."""
    weights: str | None = None
    """Weights of the checkpoint that are scored: raw or ema; None: ema where it has them."""


def _parser() -> Parser:
    parser = config_parser("megdet_hpc.evaluate", DESCRIPTION)
    parser.add_argument(
        "--checkpoint",
        type=str,
        default=None,
        help="Checkpoint that megdet_hpc.train wrote, or best.json, which names one.",
    )
    parser.add_argument(
        "--weights",
        choices=("raw", "ema"),
        default=None,
        help="Weights of the last update, or their moving average; default: ema where the checkpoint has it.",
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
    parser.add_argument(
        "--follow",
        type=str,
        default=None,
        metavar="RUN",
        help="Folder of a run whose checkpoints are scored as they appear; it need not exist yet.",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        help="Time without a sign of the run after which --follow ends with status 75 [minutes].",
    )
    parser.add_argument("--interval", type=float, default=5.0, help="Time between two looks of --follow [seconds].")
    parser.add_argument(
        "--limit",
        type=int,
        default=None,
        help="Number of images to score, the first of the set; their detections become *.limitN.detections.json.",
    )
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
    # other weights and a part of the set have a file of their own, so that neither takes the place of all detections
    parts = [further.weights, further.limit and f"limit{further.limit}"]
    suffix = ".".join(["", *filter(None, parts), "detections.json"])
    results = Path(further.results) if further.results else _beside(checkpoint or Path(), suffix)
    report = Path(further.report) if further.report else None
    return Task(config, checkpoint, results, bool(further.results), further.limit, report, further.weights)


def _beside(checkpoint: Path, suffix: str) -> Path:
    """The results file of a checkpoint: beside it, in the folder of a run as that of its best.json."""
    from megdet_hpc.engine.checkpoint import BEST

    return (checkpoint / BEST if checkpoint.is_dir() else checkpoint).with_suffix(suffix)


def _first_look(arguments: list[str]) -> Any:
    """The options by name. The checkpoint's is needed first, since the checkpoint holds the defaults of the other keys.

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
            _read_task(arguments, _settings_of(namespace.checkpoint) if namespace.checkpoint else None)
        instead = "--results FILE names the detections' file, --report DIR a page of them"
        refuse_output(arguments, namespace.output, instead)
    except UserError as error:
        parser.error(str(error))
    if namespace.follow is not None:
        _check_follow(parser, namespace)
    elif namespace.checkpoint is None and namespace.results is None:
        parser.error(USAGE)
    if namespace.weights is not None and namespace.checkpoint is None:
        parser.error(f"--weights {namespace.weights} chooses among those of a --checkpoint, and none is named")
    if namespace.limit is not None and namespace.limit < 1:
        parser.error(f"--limit is {namespace.limit}; accepted: 1 or more")
    if namespace.report is not None:
        from megdet_hpc.analyze.output import check_output

        try:
            check_output(Path(namespace.report), "--report")
        except UserError as error:
            parser.error(str(error))
    return namespace


def _check_follow(parser: Parser, namespace: Any) -> None:
    """Check the options beside --follow. Raises SystemExit with status 2 where one does not fit."""
    for other in ("checkpoint", "results", "report", "weights", "limit"):
        if getattr(namespace, other) is not None:
            parser.error(f"--{other} {getattr(namespace, other)} does not go with --follow, which scores whole runs")
    if not namespace.patience > 0:
        parser.error(f"--patience {namespace.patience:g}; accepted: more than 0 minutes")
    if not _INTERVALS[0] <= namespace.interval <= _INTERVALS[1]:
        parser.error(f"--interval {namespace.interval:g}; accepted: 0.1 to 3600 seconds")
    if Path(namespace.follow).exists() and not Path(namespace.follow).is_dir():
        parser.error(f"--follow {namespace.follow}: is no folder; accepted: the folder of a run, its --output")


def _follow(arguments: list[str], options: Any, runtime: Runtime) -> bool:
    """Score a run's checkpoints until it has ended. Collective of the world. Returns whether all are scored."""
    from megdet_hpc.validation.follower import follow

    return follow(
        Path(options.follow),
        runtime,
        lambda state: _read_task(arguments, state).config,
        patience=60 * options.patience,
        interval=options.interval,
        command=shlex.join(arguments),
    )


def _settings_of(checkpoint: str) -> dict[str, Any]:
    from megdet_hpc.engine.checkpoint import load_checkpoint

    return load_checkpoint(Path(checkpoint), mmap=True)


def run_evaluation(task: Task, state: dict[str, Any] | None, command: str, runtime: Runtime) -> None:
    """Detect objects or read results, score them, and write. Collective of the world.

    Args:
        task: task of the command line.
        state: content of the checkpoint; None to score task.results.
        command: command line of this rank, which must be the same on all ranks.
        runtime: runtime of this process.

    Raises:
        UserError: the checkpoint, the results or the data do not fit; or the results file could not be written, which
            is raised once the scores are printed.
    """
    from megdet_hpc.data.dataset import DetectionDataset
    from megdet_hpc.engine.agreement import require_agreement
    from megdet_hpc.evaluation.coco import measure_together
    from megdet_hpc.evaluation.columns import Truth
    from megdet_hpc.evaluation.results import read_results

    config, world = task.config, runtime.world
    if not config.data.val:
        raise UserError("data.val is null; name the packed set to score")
    geometry = config.model.geometry
    dataset = DetectionDataset.open(config.data.val, config.data, training=False, seed=0, geometry=geometry)
    require_agreement(world, {"the command line": command}, {"data.val": dataset.pack})
    truth = Truth(dataset.pack, task.limit)
    detections = None
    if state is not None:
        detections = _detect(task, state, dataset, runtime)
    elif world.rank == 0:
        detections = read_results(task.results, dataset.pack)
    measured = measure_together(truth, detections, config.evaluation.max_detections, world)
    if detections is None:
        return
    heading, source = f"{len(detections)} detections of {task.results}", {"results": str(task.results)}
    lost: OSError | None = None
    if state is not None:
        lost = _write(task.results, detections)
        where = f"lost: {task.results} cannot be written ({lost.strerror})" if lost else f"in {task.results}"
        heading = f"step {state['step']}, {world.size} rank(s), {len(detections)} detections, {where}"
        kind = f", {state['weights']} weights" if state["has_ema"] else ""
        source = {"checkpoint": f"{task.checkpoint}, step {state['step']}{kind}"}
    _print_scores(truth, detections, measured, task, heading, source)
    # of another user's run, whose folder may only be read, one may want the scores alone
    if lost and (task.results_named or lost.errno not in (errno.EACCES, errno.EPERM, errno.EROFS)):
        why = f"{task.results}: cannot be written ({lost.strerror})"
        raise file_error(lost, f"{why}, so the detections are lost; --results names another file")


def _detect(task: Task, state: dict[str, Any], dataset: Any, runtime: Runtime) -> Any:
    """The detections of the checkpoint's model on rank 0; None elsewhere. Collective of the world."""
    from megdet_hpc.data.categories import Categories, match_labels
    from megdet_hpc.engine.arithmetic import set_arithmetic
    from megdet_hpc.evaluation.inference import SetDetection
    from megdet_hpc.evaluation.views import what_is_merged
    from megdet_hpc.models.factory import restored_detector
    from megdet_hpc.solver.precision import Precision, keep_coordinates_float32

    config, world = task.config, runtime.world
    set_arithmetic(config)
    device = runtime.device(config.device)
    trained = Categories.of_checkpoint(state, dataset.categories)
    labels = match_labels(trained, dataset.categories, "the checkpoint", "data.val")
    if labels.note and world.rank == 0:
        print(labels.note, flush=True)
    weights, source = state["model"], str(task.checkpoint)
    model = restored_detector(config, weights, source, num_categories=len(trained), group=world).to(device)
    keep_coordinates_float32(model)
    if world.rank == 0:
        print("".join(f"{line}\n" for line in what_is_merged(config.data, config.evaluation)), end="", flush=True)
    detection = SetDetection(
        dataset,
        device,
        labels,
        world,
        num_workers=config.data.num_workers,
        evaluation=config.evaluation,
        autocast=Precision(config.solver.precision, device).autocast,
        limit=task.limit,
    )
    return detection.of_all(model)


def _write(results: Path, detections: Any) -> OSError | None:
    """Write the results file. Returns why it could not be written, which is raised after the scores are printed."""
    from megdet_hpc.evaluation.results import write_results

    try:
        write_results(results, detections)
    except OSError as error:
        return error
    return None


def _print_scores(
    truth: Truth,
    detections: DetectionTable,
    measured: dict[str, Measured] | None,
    task: Task,
    heading: str,
    source: dict[str, str],
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

    evaluation, pack, num_images = task.config.evaluation, truth.pack, truth.num_images
    limit, metric = evaluation.max_detections, evaluation.metric
    scores = score(truth, detections, max_detections=limit, measured=measured, metric=metric)
    lines = [heading, *what_is_scored(pack, num_images, limit)]
    if scores.boxes:
        lines.append(class_table(scores.classes))
        lines += metric_lines(scores.metrics)
    lines += what_is_missing(scores, pack, num_images)
    print("\n".join(lines), flush=True)
    if task.report is not None:
        from megdet_hpc.analyze.output import PAGE, write_analysis

        write_analysis(
            task.report, pack, detections, source, num_images=num_images, max_detections=limit, metric=metric
        )
        print(f"wrote {task.report / PAGE}")
    print(result_line(scores.metrics, images=num_images), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _first_look(arguments)
    # imported late: torch takes seconds to load, which --help and a wrong option need not wait for
    from megdet_hpc.engine.stop import EXIT_UNFINISHED
    from megdet_hpc.parallel.launch import note_status
    from megdet_hpc.parallel.start import started

    with started() as runtime:
        if options.follow is not None:
            complete = _follow(arguments, options, runtime)
        else:
            complete = _evaluate(arguments, options.checkpoint, runtime)
    if not complete:
        note_status(EXIT_UNFINISHED)
        raise SystemExit(EXIT_UNFINISHED)


def _evaluate(arguments: list[str], path: str | None, runtime: Runtime) -> bool:
    """Score a checkpoint or a results file. Collective of the world."""
    from megdet_hpc.engine.checkpoint import load_checkpoint, weights_line, with_weights

    # rank 0 alone opens the checkpoint and reads the command line with its configuration
    asked = None
    if runtime.world.rank == 0:
        state = load_checkpoint(Path(path)) if path else None
        task = _read_task(arguments, state)
        if state is not None and path:
            state = with_weights(state, task.weights, path)
            print(weights_line(state), end="", flush=True)
        asked = state, task
    state, task = runtime.world.broadcast_object(asked, name="checkpoint")
    run_evaluation(task, state, shlex.join(arguments), runtime)
    return True


if __name__ == "__main__":
    main()
