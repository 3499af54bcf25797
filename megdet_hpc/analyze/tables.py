"""The figures of an analysis as CSV files and one JSON file. What does not exist is `none` there and null here."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from megdet_hpc.analyze.analysis import Analysis, Rows


def _plain(value: Any) -> Any:
    """A number of numpy as Python's, and NaN as None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _csv(rows: Iterable[dict[str, Any]], columns: list[str]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = {key: _plain(value) for key, value in row.items()}
        writer.writerow({key: "none" if value is None else value for key, value in plain.items()})
    return file.getvalue().encode()


def curve_rows(analysis: Analysis) -> Rows:
    """A row for each class with boxes and each of the 101 recalls."""
    curves, rows = analysis.curves, []
    for place, row in enumerate(analysis.classes):
        if row["boxes"]:
            columns = (curves["recall"], *(curves[key][place] for key in ("precision50", "precision75", "precision")))
            for recall, at50, at75, mean, score in zip(*columns, curves["score50"][place], strict=True):
                rows.append({"class": row["class"], "recall": round(float(recall), 2), "precision_IoU50": at50})
                rows[-1] |= {"precision_IoU75": at75, "precision_IoU50_to_95": mean, "score_IoU50": score}
    return rows


def confusion_rows(analysis: Analysis) -> Rows:
    """The matrix's cells that are not 0: the box's class, what it was found as, how many."""
    names = analysis.subject.truth.names
    truth, found = [*names, "background"], [*names, "missed"]
    cells = zip(*np.nonzero(analysis.confusion), strict=True)
    return [{"box": truth[i], "found_as": found[j], "count": int(analysis.confusion[i, j])} for i, j in cells]


def csv_files(analysis: Analysis) -> dict[str, bytes]:
    """The CSV files by their names."""
    tables = {
        "classes.csv": analysis.classes,
        "pr_curves.csv": curve_rows(analysis),
        "confusion.csv": confusion_rows(analysis),
        "errors.csv": analysis.errors,
        "sizes_and_aspects.csv": analysis.ranges,
        "calibration.csv": analysis.bins,
        "images.csv": analysis.images,
    }
    heads = {
        "pr_curves.csv": [
            "class",
            "recall",
            "precision_IoU50",
            "precision_IoU75",
            "precision_IoU50_to_95",
            "score_IoU50",
        ],
        "confusion.csv": ["box", "found_as", "count"],
    }
    return {
        name: _csv(rows, heads.get(name) or list(rows[0]) if rows else heads.get(name, []))
        for name, rows in tables.items()
    }


def json_file(analysis: Analysis, source: dict[str, Any]) -> bytes:
    """All figures in one object; curves and images are in the CSV files alone.

    Args:
        analysis: the figures.
        source: what was scored.
    """
    threshold = analysis.threshold
    found = {
        "source": source,
        "metrics": analysis.metrics,
        "threshold": {
            "score": threshold.score,
            "precision": threshold.precision,
            "recall": threshold.recall,
            "F1": threshold.f1,
            "chosen_for_highest_F1": threshold.chosen,
        },
        "classes": analysis.classes,
        "errors": analysis.errors,
        "sizes_and_aspects": analysis.ranges,
        "calibration": {**analysis.calibration, "bins": analysis.bins},
        "confusion": confusion_rows(analysis),
    }
    return (json.dumps(_deep(found), indent=1, allow_nan=False) + "\n").encode()


def _deep(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _deep(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_deep(item) for item in value]
    return _plain(value)
