"""Detections of several detectors merged into one results file: `python -m megdet_hpc.ensemble A B C --output FILE`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from megdet_hpc.config.outcome import SCORE_NAMES
from megdet_hpc.ensemble.method import METHODS, Fusion, require_library
from megdet_hpc.errors import UserError
from megdet_hpc.programs import ProgramParser, as_called_here, called_as, errors_in_one_line

if TYPE_CHECKING:
    from megdet_hpc.data.packed_coco import PackedCoco
    from megdet_hpc.evaluation.detections import DetectionTable

_MODULE = "megdet_hpc.ensemble"
DESCRIPTION = """Merge the detections of several detectors into one COCO results file, image by image and class by
class, and score each and the ensemble if --data.val names the packed set. A, B and C are folders of runs, whose
detections.json is taken; RUN/best.json with RUN/best.detections.json beside it, which `python -m megdet_hpc.evaluate`
writes; or results files of any program. One process; no detector runs."""

# Two files of one set have detections in mostly the same images; of two sets, in few.
_LEAST_SHARED = 0.5


@dataclass(frozen=True)
class Input:
    """A results file of the ensemble."""

    named: Path
    """What the command line has."""
    results: Path
    """The file that is read."""
    own_val: Path | None
    """The packed set that a run was evaluated on, if it can be seen from here."""
    metric: str | None = None
    """A run's evaluation.metric."""


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(prog=called_as(_MODULE), description=as_called_here(DESCRIPTION))
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="A", help="run, RUN/best.json or results file; 2 or more"
    )
    parser.add_argument(
        "--data.val", dest="data_val", type=Path, metavar="DIR", help="packed set to score on; gives the images' sizes"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="weighted boxes fusion, NMS, Gaussian soft-NMS, or non-maximum weighted (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="trust in each file, above 0, behind the files (default: 1)",
    )
    parser.add_argument(
        "--iou",
        type=float,
        default=0.55,
        help="IoU above which two boxes are of one object; soft_nms does without [0 to 1] (default: %(default)s)",
    )
    parser.add_argument(
        "--sigma",
        type=float,
        default=0.5,
        help="width of the factor of soft_nms, exp(-IoU^2 / sigma) (default: %(default)s)",
    )
    parser.add_argument(
        "--max-detections",
        type=int,
        default=100,
        metavar="N",
        help="detections kept of an image, and those of an image and class that are scored (default: %(default)s)",
    )
    parser.add_argument(
        "--metric",
        choices=tuple(SCORE_NAMES),
        help="VOC's AP before COCO's scores (default: the runs' evaluation.metric where all have the same, else coco)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="COCO results file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that are out of their range, before anything is read."""
    count = len(options.sources)
    if count < 2:
        raise UserError(f"{options.sources[0]} alone is no ensemble; name 2 or more")
    double = [one for one, other in combinations(options.sources, 2) if one.resolve() == other.resolve()]
    if double:
        raise UserError(f"{double[0]}: is named twice; --weights gives a file more weight")
    weights = options.weights
    if weights is not None and len(weights) != count:
        raise UserError(f"--weights has {len(weights)} numbers for {count} files; accepted: one each")
    if weights is not None and not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"--weights {' '.join(f'{weight:g}' for weight in weights)}; accepted: finite numbers above 0")
    if not 0 <= options.iou <= 1:
        raise UserError(f"--iou {options.iou:g}; accepted: 0 to 1")
    if not 0 < options.sigma < float("inf"):
        raise UserError(f"--sigma {options.sigma:g}; accepted: a finite number above 0")
    if options.max_detections < 1:
        raise UserError(f"--max-detections {options.max_detections}; accepted: 1 or more")
    if options.output.is_dir():
        raise UserError(f"--output {options.output}: is a folder; accepted is a file")
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output}: exists already; give another --output or --overwrite")


def _source(named: Path, data_val: Path | None) -> Input:
    """The results file that a word of the command line means.

    Raises:
        UserError: there is none.
    """
    if named.is_dir():
        from megdet_hpc.analyze.inputs import inputs_of_run

        inputs = inputs_of_run(named, data_val, None)
        own = inputs.own_val or (None if data_val else inputs.data_val)
        return Input(named, inputs.results, own, inputs.metric)
    if named.name == "best.json":
        results = named.with_suffix(".detections.json")
        if named.is_file() and not results.is_file():
            raise UserError(
                f"{named}: there is no {results.name} beside it; "
                f"`{called_as('megdet_hpc.evaluate')} --checkpoint {named} --data.val DIR` writes it"
            )
        return Input(named, results, None)
    return Input(named, named, None)


def _check_categories(sources: list[Input], pack: PackedCoco | None) -> None:
    """Raise UserError where the category ids of two runs, or of a run and the set, mean different things."""
    from megdet_hpc.data.categories import Categories
    from megdet_hpc.data.packed_coco import PackedCoco

    known = [(str(pack.directory), Categories(pack.categories))] if pack is not None else []
    for source in sources:
        if source.own_val is not None:
            own = Categories(PackedCoco(source.own_val).categories)
            name = f"{source.own_val} of {source.named}"
            if known:
                known[0][1].check_same(own, known[0][0], name)
            else:
                known.append((name, own))


def _check_same_set(sources: list[Input], tables: list[DetectionTable]) -> None:
    """Raise UserError where two files are of different images or categories."""
    for (one, first), (other, second) in combinations(zip(sources, tables, strict=True), 2):
        if not len(first) or not len(second):
            continue
        for what, ours, theirs in (
            ("images", first.image_ids, second.image_ids),
            ("categories", first.category_ids, second.category_ids),
        ):
            here, there = set(ours.tolist()), set(theirs.tolist())
            shared, fewer = len(here & there), min(len(here), len(there))
            if shared < _LEAST_SHARED * fewer:
                raise UserError(
                    f"{one.results} has detections in {len(here)} {what}, {other.results} in {len(there)}, and only "
                    f"{shared} are the same; an ensemble needs files of one set of images and categories"
                )


def _read(sources: list[Input], pack: PackedCoco | None) -> list[DetectionTable]:
    """The detections of each file.

    Raises:
        UserError: a file is damaged, or a score is no probability.
    """
    from megdet_hpc.evaluation.results import read_results

    tables = []
    for source in sources:
        table = read_results(source.results, pack)
        if len(table) and not (table.scores.min() >= 0 and table.scores.max() <= 1):
            worst = table.scores.max() if table.scores.max() > 1 else table.scores.min()
            raise UserError(f"results {source.results}: has the score {worst:g}; accepted for an ensemble: 0 to 1")
        tables.append(table)
    return tables


def _merge(tables: list[DetectionTable], fusion: Fusion, pack: PackedCoco | None) -> tuple[DetectionTable, list[str]]:
    """The merged detections, and what a reader should know of them."""
    from megdet_hpc.ensemble.fusion import fuse

    sizes = None
    if pack is not None:
        both = zip(pack.heights.tolist(), pack.widths.tolist(), strict=True)
        sizes = dict(zip(pack.image_ids.tolist(), both, strict=True))
    merged, left_out = fuse(tables, fusion, sizes)
    said = [f"{left_out} detections without area or with the score 0 were left out"] if left_out else []
    if merged.masks is None and any(table.masks is not None for table in tables):
        said.append("masks were left out: only nms and soft_nms keep them, where every file has them")
    return merged, said


def run_ensemble(options: argparse.Namespace) -> list[str]:
    """Merge, write, and score; the lines to print.

    Raises:
        UserError: bad options, files or data.
    """
    _check(options)

    from megdet_hpc.data.packed_coco import PackedCoco
    from megdet_hpc.evaluation.coco import class_table, metric_lines, result_line, score, score_text, what_is_scored
    from megdet_hpc.evaluation.columns import Truth
    from megdet_hpc.evaluation.results import write_results

    require_library(options.method)
    sources = [_source(named, options.data_val) for named in options.sources]
    if options.output.resolve() in [source.results.resolve() for source in sources]:
        raise UserError(f"--output {options.output}: is one of the files to merge; give another one")
    pack = PackedCoco(options.data_val) if options.data_val is not None else None
    _check_categories(sources, pack)
    tables = _read(sources, pack)
    _check_same_set(sources, tables)
    weights = tuple(options.weights or [1.0] * len(sources))
    limit = options.max_detections
    fusion = Fusion(options.method, weights, options.iou, options.sigma, limit)
    merged, said = _merge(tables, fusion, pack)
    try:
        write_results(options.output, merged)
    except OSError as error:
        raise UserError(f"--output {options.output}: cannot be written ({error.strerror})") from error
    heads = [
        f"{len(table)} detections of {source.results}, weight {weight:g}"
        for source, table, weight in zip(sources, tables, weights, strict=True)
    ]
    last = f"{options.method}: {len(merged)} detections, in {options.output}"
    if pack is None:
        return [*heads, *said, last]
    truth, metrics = Truth(pack), {source.metric for source in sources}
    metric = options.metric or (metrics.pop() if len(metrics) == 1 else None) or "coco"
    heads = [
        f"{head}: {score_text(score(truth, table, max_detections=limit, metric=metric).metrics)}"
        for head, table in zip(heads, tables, strict=True)
    ]
    scores = score(truth, merged, max_detections=limit, metric=metric)
    table = [class_table(scores.classes), *metric_lines(scores.metrics)] if scores.boxes else []
    return [
        *heads,
        *said,
        last,
        *what_is_scored(pack, len(pack), limit),
        *table,
        result_line(scores.metrics, images=len(pack)),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    with errors_in_one_line(_MODULE):
        lines = run_ensemble(options)
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
