"""The folder of an analysis: index.html, analysis.json and the CSV files."""

from __future__ import annotations

from pathlib import Path

from megdet_hpc.errors import UserError, file_error
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.files import atomic_write

PAGE, NUMBERS = "index.html", "analysis.json"
TABLES = ("classes", "pr_curves", "confusion", "errors", "sizes_and_aspects", "calibration", "images")
"""The CSV files that `tables.csv_files` makes, without their suffix."""
WORST_IMAGES = 12


def check_output(folder: Path, option: str, *, overwrite: bool | None = None) -> None:
    """Refuse a folder that holds an analysis, a file that an analysis would replace, or an analysis without hotcoco.

    Args:
        folder: folder to write.
        option: option that names it.
        overwrite: whether these files may be replaced; None where the program has no such option.

    Raises:
        UserError: it does, and they may not be replaced; it is a file; or hotcoco is not installed.
    """
    from megdet_hpc.evaluation.coco import has_fast_scorer

    if not has_fast_scorer():
        raise UserError(
            f"{option} {folder}: an analysis is made by hotcoco, which is not installed; pip install hotcoco, or "
            "'.[fast]' in a checkout, installs it"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder}: is a file; accepted is a folder")
    names = PAGE, NUMBERS, *(f"{table}.csv" for table in TABLES)
    there = [folder / name for name in names if (folder / name).exists()]
    if there and not overwrite:
        other = " or --overwrite" if overwrite is not None else ""
        raise UserError(f"{there[0]}: exists already; give another {option}{other}")


def write_analysis(
    folder: Path,
    pack: object,
    table: DetectionTable,
    source: dict[str, str],
    *,
    num_images: int,
    max_detections: int,
    score: float | None = None,
    num_worst: int = WORST_IMAGES,
    metric: str = "coco",
) -> dict[str, float]:
    """Analyse detections and write page and tables, the page last. Returns COCO's metrics by their names.

    Args:
        folder: made where it is missing.
        pack: the ground truth, a PackedCoco.
        table: detections in it.
        source: what was scored, a line each; the set and its numbers are added.
        num_images: score only the first so many images.
        max_detections: the best so many of an image and class count.
        score: the least score in the confusion matrix and the pictures; None: that of the highest F1.
        num_worst: worst images on the page.
        metric: evaluation.metric; voc07 or voc12 adds that AP of VOC to the scores.

    Raises:
        UserError: the folder cannot be written.
    """
    from megdet_hpc.analyze.analysis import analyze
    from megdet_hpc.analyze.page import page
    from megdet_hpc.analyze.tables import csv_files, json_file
    from megdet_hpc.data.packed_coco import PackedCoco
    from megdet_hpc.evaluation.coco import voc_mean, what_is_scored
    from megdet_hpc.evaluation.voc import VOC_METRICS, voc_average_precisions

    assert isinstance(pack, PackedCoco)
    found = analyze(pack, table, num_images=num_images, max_detections=max_detections, score=score)
    if metric != "coco":
        values = voc_average_precisions(found.subject.truth, found.subject.found, metric)
        found.metrics[VOC_METRICS[metric]] = voc_mean(values)
    crowds = int(found.subject.truth.boxes.crowd.sum())
    numbers = {
        "set": str(pack.directory),
        "images": f"{num_images:,}",
        "boxes to find": f"{found.num_boxes:,}" + (f" and {crowds:,} crowd regions" if crowds else ""),
        "detections": f"{len(found.subject.found.scores):,}",
        "classes": f"{len(found.subject.truth.names):,}",
    }
    notes = what_is_scored(pack, num_images, max_detections)
    if table.masks is not None:
        notes.append("boxes are analysed; the masks of these detections are not")
    if not found.num_boxes:
        notes.append("nothing to score: there is no box to find, so what needs one is left out")
    files = csv_files(found) | {NUMBERS: json_file(found, {**source, **numbers})}
    files[PAGE] = page(found, {**source, **numbers}, notes, num_worst)
    try:
        for name, data in files.items():
            with atomic_write(folder / name) as file:
                file.write(data)
    except OSError as error:
        raise file_error(error, f"{folder}: cannot be written ({error.strerror})") from error
    return found.metrics
