"""What is wrong with a run's detections, or with any results file: `python -m megdet_hpc.analyze RUN`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megdet_hpc.analyze.inputs import WEIGHTS, AnalysisInputs, inputs_of_run, other_evaluation, same_classes
from megdet_hpc.analyze.output import PAGE, WORST_IMAGES, check_output, write_analysis
from megdet_hpc.config.outcome import SCORE_NAMES
from megdet_hpc.errors import UserError
from megdet_hpc.programs import ProgramParser, called_as, errors_in_one_line

_MODULE = "megdet_hpc.analyze"
DESCRIPTION = """Write what is right and wrong in the detections of a run's last evaluation, or of any COCO results
file: AP of each class, precision-recall curves, confusion of classes, types of error and what each costs, AP by size
and aspect, calibration, and the worst images. One page, index.html, and all figures as CSV and JSON. One process."""


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(prog=called_as(_MODULE), description=DESCRIPTION)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="folder of a run, its --output")
    parser.add_argument("--results", type=Path, metavar="FILE", help="COCO results file in place of a run's")
    parser.add_argument(
        "--data.val", dest="data_val", type=Path, metavar="DIR", help="packed set (default: that of the run)"
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="whose detections (default: ema where the run has averaged weights, else raw)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write (default: RUN/analysis)")
    parser.add_argument("--overwrite", action="store_true", help="replace an analysis that is there")
    parser.add_argument(
        "--score",
        type=float,
        metavar="X",
        help="least score of the detections in pictures and confusion matrix [0 to 1] (default: of the highest F1)",
    )
    parser.add_argument(
        "--max-detections",
        type=int,
        metavar="N",
        help="detections of an image and class that count (default: the run's evaluation.max_detections, or 100)",
    )
    parser.add_argument(
        "--metric",
        choices=tuple(SCORE_NAMES),
        help="VOC's AP beside COCO's scores (default: the run's evaluation.metric, or coco)",
    )
    parser.add_argument(
        "--worst", type=int, default=WORST_IMAGES, metavar="N", help="worst images shown (default: %(default)s)"
    )
    return parser


def _inputs(options: argparse.Namespace) -> AnalysisInputs:
    """The files that the command line names, its numbers checked.

    Raises:
        UserError: too many, too few, a value out of range, or a run that cannot be analysed.
    """
    if options.score is not None and not 0 <= options.score <= 1:
        raise UserError(f"--score {options.score:g}; accepted: 0 to 1")
    if options.max_detections is not None and options.max_detections < 1:
        raise UserError(f"--max-detections {options.max_detections}; accepted: 1 or more")
    if not 0 <= options.worst <= 200:
        raise UserError(f"--worst {options.worst}; accepted: 0 to 200, the page holds them all")
    if (options.run is None) == (options.results is None):
        raise UserError("name one: RUN, the folder of a run, or --results FILE with --data.val DIR")
    if options.run is not None:
        return inputs_of_run(options.run, options.data_val, options.max_detections, options.weights)
    if options.weights is not None:
        raise UserError(f"--weights {options.weights} chooses among those of a RUN, and none is named")
    if options.data_val is None:
        raise UserError(f"--results {options.results}: --data.val DIR must name the packed set it was made on")
    source = {"results": str(options.results), "checkpoint": "not known, a results file names none"}
    return AnalysisInputs(options.results, options.data_val, options.max_detections or 100, source)


def run_analysis(options: argparse.Namespace) -> list[str]:
    """Analyse, write, and say in lines what was written and scored.

    Raises:
        UserError: bad options, files or data.
    """
    inputs = _inputs(options)
    output = options.output or (options.run / "analysis" if options.run else inputs.results.with_suffix(".analysis"))
    check_output(output, "--output", overwrite=options.overwrite)

    from megdet_hpc.data.packed_coco import PackedCoco
    from megdet_hpc.evaluation.coco import result_line
    from megdet_hpc.evaluation.results import read_results

    pack = PackedCoco(inputs.data_val)
    same_classes(inputs, pack)
    found = read_results(inputs.results, pack)
    metrics = write_analysis(
        output,
        pack,
        found,
        inputs.source,
        num_images=len(pack),
        max_detections=inputs.max_detections,
        score=options.score,
        num_worst=options.worst,
        metric=options.metric or inputs.metric,
    )
    said = other_evaluation(inputs, metrics["AP"])
    where = f" ({inputs.source['checkpoint']})" if options.run else ""
    heading = f"{len(found)} detections of {inputs.results}{where}"
    return [heading, *said, f"wrote {output / PAGE}", result_line(metrics, images=len(pack))]


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    with errors_in_one_line(_MODULE):
        lines = run_analysis(options)
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
