"""Detect objects in pictures and videos of one's own: `megdet predict --checkpoint runs/x photos --output found`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megdet_hpc.command_line import Parser
from megdet_hpc.config.outcome import LARGEST_SIDE, SIDES
from megdet_hpc.devices import DEVICES
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launch import note_status
from megdet_hpc.programs import as_called_here, called_as

if TYPE_CHECKING:
    from megdet_hpc.parallel.runtime import Runtime

DESCRIPTION = """Detect objects in pictures and videos, with a checkpoint of python -m megdet_hpc.train.

INPUT is a file, a folder with all below it, or a pattern in quotes; videos need the package av. --output gets pictures/
with boxes and names, detections.json (COCO results; images.json says which id is which file), detections.csv and
counts.csv. A file that is missing or damaged is named, the others go on, and the status is 2. Under a launcher the
ranks share the files; the results are those of one process."""

_SHOWN_FAULTS = 20


def _parser() -> Parser:
    parser = Parser(prog=called_as("megdet_hpc.predict"), description=as_called_here(DESCRIPTION))
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="Pictures, videos, folders or patterns.")
    named = "The same, for those who name it."
    parser.add_argument("--input", action="extend", nargs="+", default=[], metavar="INPUT", help=named)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN",
        help="Folder of a run, whose best or newest checkpoint counts, or file.",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="New folder for the results.")
    parser.add_argument("--score", type=float, default=0.5, help="Least score of a detection [0 to 1].")
    parser.add_argument("--max-detections", type=int, help="Most detections of a picture; default: the checkpoint's.")
    parser.add_argument(
        "--weights",
        choices=("raw", "ema"),
        help="Weights of the last update, or their moving average; default: ema where the checkpoint has it.",
    )
    parser.add_argument(
        "--scales",
        type=int,
        action="extend",
        nargs="+",
        metavar="SIDE",
        help="Short sides at which each picture is seen, merged; default: the checkpoint's [pixels].",
    )
    parser.add_argument("--flip", action="store_true", help="See each picture from left to right too, and merge.")
    parser.add_argument(
        "--soft-nms",
        choices=("none", "linear", "gaussian"),
        help="Soft-NMS in place of NMS; default: the checkpoint's.",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="Device of each rank.")
    parser.add_argument(
        "--batch", type=int, default=1, help="Most pictures of one size that are detected at once [pictures]."
    )
    parser.add_argument("--workers", type=int, default=2, help="Processes of each rank that read ahead [processes].")
    parser.add_argument(
        "--orientation",
        choices=("upright", "stored"),
        default="upright",
        help="Pictures turned by their EXIF orientation, or as they are stored.",
    )
    parser.add_argument("--every", type=int, default=1, help="Distance of the frames of a video to look at [frames].")
    parser.add_argument("--no-pictures", action="store_true", help="Results alone, nothing drawn.")
    parser.add_argument("--overwrite", action="store_true", help="Earlier results in --output are replaced.")
    return parser


def _checked(parser: Parser, arguments: list[str]) -> Any:
    """The options; ends with status 2 and one line where they are wrong."""
    options = parser.parse_args(arguments)
    least = {"max_detections": 1, "batch": 1, "workers": 0, "every": 1}
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} is {value}; accepted: {low} or more")
    if not 0 <= options.score <= 1:
        parser.error(f"--score is {options.score:g}; accepted: 0 to 1")
    sides = options.scales or (1,)
    if not 1 <= min(sides) <= max(sides) <= LARGEST_SIDE or len(set(sides)) < len(sides):
        parser.error(f"--scales {' '.join(map(str, sides))}; accepted: {SIDES}, each side once")
    if not options.inputs + options.input:
        parser.error("no INPUT; name pictures, videos, folders or patterns")
    return options


def _asked(options: Any) -> Any:
    """What the command line asks of the detector."""
    from megdet_hpc.predict.detector import Asked

    return Asked(
        options.score,
        options.max_detections,
        None if options.scales is None else tuple(options.scales),
        options.flip or None,
        options.soft_nms,
    )


def _prepare(options: Any) -> tuple[Any, str, Any]:
    """Rank 0's part before the work: what is to be done, and the checkpoint.

    Returns:
        The work, the checkpoint's name, its content.

    Raises:
        UserError: an input, the checkpoint or the output folder does not do.
    """
    from megdet_hpc.engine.checkpoint import checkpoint_of, load_checkpoint, with_weights
    from megdet_hpc.predict.detector import predicting
    from megdet_hpc.predict.outputs import make_folder
    from megdet_hpc.predict.run import PredictTask
    from megdet_hpc.predict.sources import find_sources
    from megdet_hpc.predict.video import import_av

    output = Path(options.output)
    sources = find_sources(options.inputs + options.input, output)
    if video := next((source.path for source in sources if source.is_video), None):
        import_av(video)
    checkpoint = checkpoint_of(Path(options.checkpoint))
    state = with_weights(load_checkpoint(checkpoint), options.weights, str(checkpoint))
    predicting(state, _asked(options))  # refuses before the folder is made or an earlier output removed
    make_folder(output, options.overwrite)
    draw, upright = not options.no_pictures, options.orientation == "upright"
    work = PredictTask(sources, output, draw, upright, options.batch, options.workers, options.every)
    return work, str(checkpoint), state


def predict(options: Any, command: str, runtime: Runtime) -> int:
    """Detect, write and print. Collective of the world.

    Args:
        options: options of the command line.
        command: this rank's own command line, which must be that of all.
        runtime: world of this process.

    Returns:
        Number of files that failed, on every rank.

    Raises:
        UserError: an input, the checkpoint or the output folder does not do.
    """
    from megdet_hpc.engine.agreement import require_agreement
    from megdet_hpc.engine.checkpoint import weights_line
    from megdet_hpc.log import progress_bar
    from megdet_hpc.predict.detector import TrainedDetector, predicting
    from megdet_hpc.predict.run import detect_sources

    world = runtime.world
    require_agreement(world, {"the command line": command}, {})
    prepared = _prepare(options) if world.rank == 0 else None
    work, checkpoint, state = world.broadcast_object(prepared, name="predict")
    config = predicting(state, _asked(options))
    detector = TrainedDetector(state, checkpoint, config, runtime.device(options.device), world)
    total = len(range(world.rank, len(work.sources), world.size))
    if world.rank == 0:
        print(weights_line(state), end="", flush=True)
    with progress_bar(total=total, desc="predict", unit="picture", disable=world.rank != 0, leave=False) as bar:
        share = detect_sources(work, detector, world, bar)
    if share is not None:
        _finish(work, share, detector, f"{checkpoint}, step {state['step']}, {world.size} rank(s)")
    num_failed: int = world.broadcast_object(len(share.faults) if share else None, name="failed")
    return num_failed


def _finish(work: Any, share: Any, detector: Any, heading: str) -> None:
    """Write the joint results, and print counts, failures and where all is."""
    from megdet_hpc.predict.outputs import FAILED, counts, write_outputs

    names = detector.category_names
    faults = [(str(work.sources[index].path), reason) for index, reason in share.faults]
    write_outputs(work.output, share.records, faults, [{"id": key, "name": name} for key, name in names.items()])
    rows = [row for row in counts(share.records, names) if row[1]]
    width = max([len(row[0]) for row in rows] + [8])
    print(heading)
    for name, objects, pictures in rows:
        print(f"{name:{width}}  {objects:7,} in {pictures:,} picture(s)")
    for path, reason in faults[:_SHOWN_FAULTS]:
        print(f"{called_as('megdet_hpc.predict')}: {path}: {reason}", file=sys.stderr)
    if len(faults) > _SHOWN_FAULTS:
        print(f"and {len(faults) - _SHOWN_FAULTS} more", file=sys.stderr)
    failed = f" failed={len(faults)} ({work.output / FAILED})" if faults else ""
    objects = sum(len(record.table) for record in share.records)
    print(f"result: pictures={len(share.records)} objects={objects}{failed} output={work.output}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: status 2, on every rank, where a file failed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _checked(_parser(), arguments)
    # imported late: torch takes seconds to load, which --help and a wrong option need not wait for
    from megdet_hpc.parallel.start import started

    with started(device=options.device) as runtime:
        num_failed = predict(options, shlex.join(arguments), runtime)
    if num_failed:
        note_status(UserError.status)
        raise SystemExit(UserError.status)


if __name__ == "__main__":
    main()
