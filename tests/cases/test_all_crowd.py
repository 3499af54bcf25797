"""Sets that cannot be trained on, in part or at all: the packer's summary says so in numbers and names the cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megdet_hpc.config import DataConfig
from megdet_hpc.data.dataset import DetectionDataset
from tests.cases.records import BOXES, HEIGHT, WIDTH, RecordSet
from tests.conftest import Launch

KINDS = ("trainable_boxes", "crowd", "zero_size_boxes", "thin_boxes", "boxes_outside")


def test_all_crowd(records: RecordSet) -> None:
    records.each("annotations", iscrowd=1, segmentation={"size": [90, 120], "counts": [900, 1000, 8900]})
    assert records.pack() == 0
    assert records.printed("crowd regions") == 4
    assert records.printed("trainable boxes") == 0
    assert records.printed("images without a trainable box") == 2
    assert "no annotation can be trained on" in records.out
    assert "4 of 4 (100 %) of the annotations are crowd regions (iscrowd 1)" in records.out
    assert records.verify() == 0


def test_no_annotation(records: RecordSet) -> None:
    records.coco["annotations"] = []
    assert records.pack() == 0
    assert records.printed("annotations") == records.printed("trainable boxes") == 0
    assert "there is no annotation: a set without ground truth" in records.out


def test_a_right_set_has_no_warning(records: RecordSet) -> None:
    assert records.pack() == 0
    assert records.summary["warnings"] == []
    assert "WARNING" not in records.out
    assert records.rebuilt == records.source


def normalized(x: float, y: float, width: float, height: float) -> list[float]:
    return [x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT]


def corners(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y + height]


def centred(x: float, y: float, width: float, height: float) -> list[float]:
    return [x + width / 2, y + height / 2, width, height]


# how boxes are written, the numbers of KINDS, and what is said
FORMS: dict[str, tuple[Callable[..., list[float]], tuple[int, ...], str]] = {
    "normalized": (normalized, (0, 0, 0, 4, 0), "4 of 4 (100 %) of the boxes lie within 0..1: they look normalized"),
    "normalized centres": (lambda *box: normalized(*centred(*box)), (0, 0, 0, 4, 0), "YOLO wrote them, as centre"),
    "normalized corners": (lambda *box: normalized(*corners(*box)), (0, 0, 0, 4, 0), "they look normalized"),
    "corners": (corners, (4, 0, 0, 0, 0), "2 of 4 (50 %) of the boxes leave their image as x, y, width, height; they "
        "look like corners x1, y1, x2, y2"),
    "corners, y first": (lambda x, y, w, h: [y, x, y + h, x + w], (4, 0, 0, 0, 0), "corners"),
    "larger image": (lambda *box: [2 * side for side in box], (2, 0, 0, 0, 2), "were they drawn at another resolution"),
    "all outside": (lambda x, y, w, h: [x + 1000, y + 700, w, h], (0, 0, 0, 0, 4), "4 lie wholly outside"),
    "negative": (lambda x, y, w, h: [x - 500, y, w, h], (0, 0, 0, 0, 4), "4 lie wholly outside"),
    "rounded": (lambda *box: [0, 0, 0, 0], (0, 0, 4, 0, 0), "4 of 4 (100 %) of the boxes have no width or no height"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_boxes_in_another_form(form: str, records: RecordSet) -> None:
    write, numbers, text = FORMS[form]
    records.each("annotations", bbox=lambda box: write(*box))
    assert records.pack() == 0
    assert tuple(records.summary[kind] for kind in KINDS) == numbers
    assert any(text in warning for warning in records.summary["warnings"]), records.summary["warnings"]
    assert text in records.out
    assert records.verify() == 0


def test_corners_that_stay_in_the_image(records: RecordSet) -> None:
    """Nothing leaves the image, but the areas are those of other boxes."""
    del records.coco["annotations"][1::2]
    for record in records.coco["annotations"]:
        record["area"] = record["bbox"][2] * record["bbox"][3]
    assert records.pack() == 0
    assert records.summary["warnings"] == []
    records.each("annotations", bbox=lambda box: corners(*box))
    assert records.pack() == 0
    assert "2 of 2 (100 %) of the boxes have the area that the file gives if they are read as corners" in records.out
    assert records.verify() == 0


def test_categories(records: RecordSet) -> None:
    """79 of 80 without a box, one of them the background, two of one name."""
    more = [{"id": k, "name": f"class {k}"} for k in range(3, 80)]
    records.coco["categories"] += [*more, {"id": 0, "name": "__Background__"}]
    records.coco["categories"][5]["name"] = "blue"
    records.each("annotations", category_id=1)
    assert records.pack() == 0
    assert records.printed("categories without such a box") == 79
    assert "79 of 80 (99 %) of the categories have no box to train on (blue, class 3" in records.out
    assert "category id 0 is named '__Background__': label 0 is the background here already" in records.out
    assert "trained as a class like any other, with 0 boxes" in records.out
    assert "2 categories have the name 'blue' (ids 2, 6)" in records.out
    assert records.summary["first_categories_without_box"] == ["blue", "class 3", "class 4", "class 5", "blue"]


MIXED: list[tuple[list[float], int, str]] = [
    ([10, 10, 20, 20], 0, "trainable_boxes"),
    ([-10, 10, 20, 20], 0, "trainable_boxes"),  # cut at the edge
    ([119, 89, 50, 50], 0, "trainable_boxes"),  # one pixel of it is inside
    ([119.5, 10, 50, 50], 0, "thin_boxes"),  # half a pixel
    ([10, 10, 0.9, 20], 0, "thin_boxes"),
    ([10, 10, 1, 1], 0, "trainable_boxes"),
    ([120, 10, 20, 20], 0, "boxes_outside"),  # begins where the image ends
    ([-20, 10, 20, 20], 0, "boxes_outside"),
    ([10, 10, 0, 20], 0, "zero_size_boxes"),
    ([300, 10, 0, 20], 0, "zero_size_boxes"),
    ([300, 10, 10, 20], 1, "crowd"),
    ([10, 10, 10, 20], 1, "crowd"),
]


def mix(records: RecordSet) -> dict[str, int]:
    """Boxes of every kind in both images; the numbers of each."""
    boxes = [(image, box, crowd) for image in (1, 2) for box, crowd, _ in MIXED]
    records.coco["annotations"] = [
        {"id": k, "image_id": image, "category_id": 1, "bbox": box, "iscrowd": crowd}
        for k, (image, box, crowd) in enumerate(boxes)
    ]
    return {kind: 2 * sum(expected == kind for _, _, expected in MIXED) for kind in KINDS}


def test_the_summary_agrees_with_training(records: RecordSet) -> None:
    """At the images' own size the trainer takes as many boxes as the summary says; no annotation is counted twice."""
    expected = mix(records)
    assert records.pack() == 0
    assert {kind: records.summary[kind] for kind in KINDS} == expected
    assert sum(records.summary[kind] for kind in KINDS) == records.summary["annotations"] == 24
    assert records.summary["boxes_partly_outside"] == 2 * 3
    config = DataConfig(short_sides=(HEIGHT,), max_side=1000, flip_probability=0.0)
    dataset = DetectionDataset.open(records.output, config, training=True, seed=0)
    boxes = torch.cat([dataset[0, index].target.without_crowds().boxes for index in range(2)])
    assert len(boxes) == records.summary["trainable_boxes"]
    assert float(boxes.min()) >= 0 and float(boxes[:, 2].max()) <= WIDTH and float(boxes[:, 3].max()) <= HEIGHT
    assert records.verify() == 0


def test_the_summary_is_the_same_on_ranks_and_after_a_resumption(records: RecordSet, launch: Launch) -> None:
    """The bad image's boxes are not counted, whoever left it out and when."""
    mix(records)
    records.coco["images"].append({**records.coco["images"][0], "id": 3, "file_name": "im2.jpg"})
    records.coco["annotations"].append({"id": 99, "image_id": 3, "category_id": 2, "bbox": list(BOXES[0])})
    (records.images / "im2.jpg").write_bytes(b"no image")
    skip = ["--shard-mib", "0.0005", "--on-error", "skip"]
    assert records.pack(*skip) == 0
    one = records.summary
    assert one["categories_without_box"] == 1 and one["skipped"]["annotations"] == {"unsupported_image": 1}
    done = launch(2, "data_prep/pack_coco.py", *records.command(*skip))
    assert done.returncode == 0, done.stderr
    assert records.summary == one
    records.output.rename(records.folder / "old")
    assert records.pack("--shard-mib", "0.0005") == 1  # keeps the good shards
    assert records.pack(*skip) == 0
    assert "kept from an earlier run" in records.out and records.printed("shards") > 1
    assert records.summary == one


def test_one_form_beside_another(records: RecordSet) -> None:
    """Half of a merged set is corners: the count is of those that show it."""
    turned: list[Any] = [corners(60, 42, 32, 26), corners(60, 44, 32, 26), corners(70, 50, 30, 30)]
    first = records.coco["annotations"][0]
    records.coco["annotations"] += [{**first, "id": 10 + k, "bbox": box} for k, box in enumerate(turned)]
    assert records.pack() == 0
    assert "3 of 7 (43 %) of the boxes leave their image as x, y, width, height; these look like corners" in records.out
