"""index.html: the figures on one page that needs no other file, with a sentence on how to read each."""

from __future__ import annotations

import math
from base64 import b64encode
from html import escape
from typing import Any

from megdet_hpc.analyze import charts
from megdet_hpc.analyze.analysis import Analysis, Rows
from megdet_hpc.analyze.scoring import MATCH_IOU
from megdet_hpc.analyze.worst import worst_pictures
from megdet_hpc.evaluation.coco import metric_text
from megdet_hpc.evaluation.voc import VOC_METRICS

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; } p.caption { color: #444; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 2px 9px; text-align: right; }
th { border-bottom: 1px solid #888; } td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) { background: #f4f4f4; } .note { background: #fff4d6; padding: 4px 8px; }
.scroll { overflow: auto; max-height: 28rem; } dt { font-weight: 600; float: left; min-width: 9rem; }
"""


def _image(data: bytes, kind: str, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/{kind};base64,{b64encode(data).decode()}">'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "none" if math.isnan(value) else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def _table(rows: Rows) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{escape(key.replace('_', ' '))}</th>" for key in rows[0])
    lines = ["<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _section(title: str, caption: str, *parts: str) -> str:
    return "\n".join([f"<h2>{title}</h2>", f'<p class="caption">{caption}</p>', *parts])


def page(analysis: Analysis, source: dict[str, str], notes: list[str], num_worst: int) -> bytes:
    """The page's HTML.

    Args:
        analysis: the figures.
        source: what was scored: set, checkpoint and so on, a line each.
        notes: what a reader of the numbers should know; a sentence each.
        num_worst: worst images to show.
    """
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in source.items())
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    body = [f"<h1>What is wrong with these detections</h1><dl>{facts}</dl>{said}", _scores(analysis)]
    if analysis.num_boxes:
        body += [_classes(analysis), _curves(analysis), _errors(analysis), _ranges(analysis)]
    body += [_confusion(analysis), _calibration(analysis), _worst(analysis, num_worst)]
    head = f'<meta charset="utf-8"><title>Analysis of detections</title><style>{_STYLE}</style>'
    text = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{text}\n</body></html>\n'.encode()


def threshold_text(analysis: Analysis) -> str:
    """The threshold in a sentence, with what comes of it."""
    threshold = analysis.threshold
    text = f"detections of score {threshold.score:.3f} and more"
    if threshold.chosen:
        text += ", the score at which the F1 over all classes is highest"
    numbers = {"precision": threshold.precision, "recall": threshold.recall, "F1": threshold.f1}
    return f"{text} ({', '.join(f'{key} {metric_text(value)}' for key, value in numbers.items())})"


def _scores(analysis: Analysis) -> str:
    caption = (
        "COCO's metrics, from 0 to 1, more is better. AP50 asks for half the overlap (IoU 0.5) and tells "
        "whether objects "
        "are found at all. AP, the mean over IoU 0.50 to 0.95, also asks for exact boxes. AR is the recall "
        "with so many "
        "detections an image. s, m and l are small, medium and large objects. <b>none</b> means that there "
        "is no box to "
        "find."
    )
    if set(VOC_METRICS.values()) & set(analysis.metrics):
        caption += " AP50_voc07 and AP50_voc12 are Pascal VOC's AP at IoU 0.5; they ignore difficult objects."
    return _section("Scores", caption, _table([dict(analysis.metrics)]))


def _classes(analysis: Analysis) -> str:
    have = sum(1 for row in analysis.classes if row["boxes"])
    shown = f" The chart has the worst {charts.WORST_CLASSES} of {have}." if have > charts.WORST_CLASSES else ""
    caption = (
        "The number in brackets is that of boxes to find: a low AP of few boxes may be chance. A long light bar with a "
        f"short dark one is a class that is found, but with boxes that are not exact.{shown} Best F1 is the highest "
        "balance of precision and recall at IoU 0.5, and the score of it is a good threshold for the class."
    )
    chart = _image(charts.class_chart(analysis), "png", "AP of each class")
    rows = sorted(analysis.classes, key=lambda row: (math.isnan(row["AP"]), row["AP"]))
    return _section("AP of each class", caption, chart, _table(rows))


def _curves(analysis: Analysis) -> str:
    caption = (
        "From left to right weaker and weaker detections count: recall, the share of boxes found, grows, and "
        "precision, "
        "the share of detections that are right, falls. A curve that ends early at the bottom is a class whose other "
        f"boxes are never found. Black is the mean of all classes; colours are the worst {charts.WORST_CURVES} classes "
        "at IoU 0.5. pr_curves.csv has all classes, with the score at each recall."
    )
    chart = _image(charts.curve_chart(analysis), "png", "precision-recall curves")
    return _section("Precision and recall", caption, chart)


def _errors(analysis: Analysis) -> str:
    caption = (
        "Each detection that is not right is of one type, after TIDE (Bolya et al., ECCV 2020): by its "
        "overlap with the "
        f"nearest box, {MATCH_IOU} or more being right and below 0.1 nothing. The bar is what AP50 would gain if all "
        "errors of the type were mended and all others stayed, so the longest bar is what to work on first. All "
        "detections count, however low their score. The gains do not add up to 1 - AP50."
    )
    parts = [_image(charts.error_chart(analysis), "png", "error types"), _table(analysis.errors)]
    if unfound := analysis.unfound:
        text = (
            f"Of {len(unfound)} class(es) nothing was found ({', '.join(unfound[:8])}{', ...' * (len(unfound) > 8)}): "
            "missed boxes of these are counted, but not in the cost of Miss."
        )
        parts.insert(0, f'<p class="note">{escape(text)}</p>')
    return _section("Types of error, and what each costs", caption, *parts)


def _ranges(analysis: Analysis) -> str:
    caption = (
        "AP of the boxes of one size or shape alone; the others are left out of the score, found or not. A low bar of "
        "small boxes asks for larger images, one of an aspect for other anchors. Size is the annotation's area, aspect "
        "the box's width by height."
    )
    chart = _image(charts.range_chart(analysis), "png", "AP by size and aspect")
    return _section("AP by size and by aspect", caption, chart, _table(analysis.ranges))


def _confusion(analysis: Analysis) -> str:
    count = len(analysis.subject.truth.names)
    shown = f" The chart has the {charts.WORST_CONFUSED} most confused of {count} classes." * (
        count > charts.WORST_CONFUSED
    )
    caption = (
        "A row is the class of the boxes, a column what they were found as; each box and detection counts once, the "
        f"surest first, at IoU {MATCH_IOU} whatever the class. The diagonal is right. The last column is boxes missed, "
        f"the last row detections where there is no box. Counted are {escape(threshold_text(analysis))}.{shown} "
        "confusion.csv has all cells that are not 0."
    )
    return _section(
        "Confusion of classes", caption, _image(charts.confusion_chart(analysis), "png", "confusion matrix")
    )


def _calibration(analysis: Analysis) -> str:
    expected = metric_text(analysis.calibration["ECE"])
    caption = (
        "Whether a score can be read as a chance: of detections with score 0.8 eight in ten should be right (IoU "
        f"{MATCH_IOU}). A curve below the dashed line is a detector too sure of itself. The mean distance, weighted by "
        f"detections, is {expected} (expected calibration error), the largest "
        f"{metric_text(analysis.calibration['MCE'])}."
        " Detections below the evaluation's lowest score were dropped before, and low scores are many."
    )
    return _section("Calibration", caption, _image(charts.calibration_chart(analysis), "png", "calibration"))


def _worst(analysis: Analysis, count: int) -> str:
    caption = (
        "The lowest F1 first. Left the boxes of the set: green found, orange missed, grey crowd regions, which do not "
        f"count. Right {escape(threshold_text(analysis))}: blue right, red wrong. Red where you see an object "
        "is often a "
        "box that the annotations lack. images.csv has all images."
    )
    parts = []
    for row, picture in worst_pictures(analysis, count):
        text = f"image {row['image_id']}, {row['file_name']}"
        numbers = f"{row['found']} of {row['boxes']} boxes found, {row['wrong']} wrong"
        shown = f'<p class="note">{escape(picture)}</p>' if isinstance(picture, str) else _image(picture, "jpeg", text)
        parts.append(f"<h3>{escape(text)}: {numbers}</h3>{shown}")
    return _section("The worst images", caption, *(parts or ["<p>No image has an error at this score.</p>"]))
