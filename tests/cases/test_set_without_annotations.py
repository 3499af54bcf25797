"""A test set, without annotations, packs as a set without ground truth, and every tool reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import rebuild_coco, show_pack, stage_pack
from megdet_hpc.data.packed_coco import PackedCoco
from tests.cases.records import RecordSet

FORMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no key": lambda coco: coco.pop("annotations"),
    "null": lambda coco: coco.update(annotations=None),
    "empty": lambda coco: coco.update(annotations=[]),
}


@pytest.mark.parametrize("form", FORMS)
def test_packs_without_ground_truth(form: str, records: RecordSet, tmp_path: Path) -> None:
    FORMS[form](records.coco)
    assert records.pack() == 0
    assert (records.printed("images"), records.printed("annotations")) == (2, 0)
    assert "there is no annotation: a set without ground truth" in records.out
    pack = PackedCoco(records.output)
    assert (len(pack), pack.num_annotations, len(pack.categories)) == (2, 0, 2)
    assert records.verify() == 0
    assert rebuild_coco.main([str(records.output), "--output", str(tmp_path / "back.json")]) == 0
    assert json.loads((tmp_path / "back.json").read_bytes()) == {**records.source, "annotations": []}
    if form == "no key":
        assert stage_pack.main([str(records.output), str(tmp_path / "copy")]) == 0
        assert len(PackedCoco(tmp_path / "copy")) == 2
        assert show_pack.main([str(records.output), "--output", str(tmp_path / "pictures")]) == 0
        assert (tmp_path / "pictures" / "images.png").stat().st_size > 1000
