"""One file in several image records: counted, and the first is shown."""

from __future__ import annotations

import pytest

from tests.cases.records import RecordSet


@pytest.mark.parametrize("other", ["im0.jpg", "./im0.jpg"])
def test_is_counted(other: str, records: RecordSet) -> None:
    records.coco["images"][1]["file_name"] = other
    assert records.pack() == 0
    assert records.printed("file names that occur repeatedly") == 1
    assert records.summary["images_of_repeated_file_names"] == 2
    assert "file names that occur in several image records: 1, the first 'im0.jpg' in image ids 1, 2;" in records.out
    assert records.verify() == 0


def test_the_same_name_in_two_folders_is_two_files(records: RecordSet) -> None:
    (records.images / "b").mkdir()
    (records.images / "im1.jpg").rename(records.images / "b" / "im0.jpg")
    records.coco["images"][1]["file_name"] = "b/im0.jpg"
    assert records.pack() == 0
    assert records.printed("file names that occur repeatedly") == 0
    assert records.summary["warnings"] == []


def test_repeated_annotation_ids_are_kept_and_counted(records: RecordSet) -> None:
    """Merged sets number their annotations alike; nothing refers to the ids, and scoring numbers them anew."""
    records.each("annotations", id=lambda number: number % 2 - 1)
    assert records.pack() == 0
    assert records.printed("repeated annotation ids") == 2
    assert records.rebuilt == records.coco
    assert records.verify() == 0


def test_records_that_are_the_same_word_for_word_count_once(records: RecordSet) -> None:
    records.coco["images"].append(dict(records.coco["images"][0]))
    records.coco["annotations"].append(dict(records.coco["annotations"][0]))
    assert records.pack() == 0
    assert records.rebuilt == records.source
    assert records.summary["skipped"] == {"images": {"identical_record": 1}, "annotations": {"identical_record": 1}}
    assert records.verify() == 0


def test_another_image_under_the_same_id_is_refused(records: RecordSet) -> None:
    """Whose boxes are whose is unknown, so neither image stays where bad input is left out."""
    records.each("images", id=1)
    records.each("annotations", image_id=1)
    records.coco["images"].append({**records.source["images"][0], "id": 3})
    assert records.pack() == 1
    assert "images[1] (image id 1, file 'im1.jpg'): an image with this id occurs before it" in records.err
    assert records.pack("--on-error", "skip") == 0
    assert [image["id"] for image in records.rebuilt["images"]] == [3]
    expected = {"images": {"duplicate_image_id": 2}, "annotations": {"duplicate_image_id": 4}}
    assert records.summary["skipped"] == expected
    assert records.verify() == 0


def test_repairs_of_images_that_are_left_out_do_not_count(records: RecordSet) -> None:
    records.each("images", id=lambda number: "1" if number < 3 else number)
    records.coco["images"].append({**records.source["images"][0], "id": "3"})
    assert records.pack("--on-error", "skip") == 0
    assert [image["id"] for image in records.rebuilt["images"]] == [3]
    assert records.summary["repaired"] == {"images": {"number_from_text": 1}}
