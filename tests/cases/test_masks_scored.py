"""Masks from the pack to the score and back: polygons, several polygons, both kinds of run lengths, crowd regions."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from megdet_hpc.config import Config, DataConfig, FasterRcnnConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.categories import match_labels
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.masks import decode_masks, encode_masks, mask_areas
from megdet_hpc.data.pack_masks import masks_of
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.engine.build import _open_data
from megdet_hpc.errors import UserError
from megdet_hpc.evaluation.coco import average_precision, class_table, metric_lines, result_line, score, what_is_missing
from megdet_hpc.evaluation.detections import DetectionTable, objects
from megdet_hpc.evaluation.inference import SetDetection
from megdet_hpc.evaluation.results import read_results, write_results
from megdet_hpc.models.detector import Detections
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.threads import run_ranks
from tests.cases.scoring_sets import SIZE, coco, pack
from tests.conftest import REAL_DATA, run

HEIGHT, WIDTH = SIZE[1], SIZE[0]
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def ring(x: float, y: float, width: float, height: float, points: int = 24) -> list[float]:
    """An ellipse in a box, [x0, y0, x1, y1, ...]."""
    angles = 2 * math.pi * np.arange(points) / points
    outline = np.stack(
        [np.cos(angles) * width / 2 + x + width / 2, np.sin(angles) * height / 2 + y + height / 2], axis=1
    )
    return [float(value) for value in outline.ravel()]


def rectangle(x: int, y: int, width: int, height: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    mask = np.zeros((1, HEIGHT, WIDTH), np.bool_)
    mask[0, y : y + height, x : x + width] = True
    return mask


def plain_runs(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> dict[str, Any]:
    flat = mask[0].ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *changes, flat.size]).tolist()}


def compressed(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> dict[str, Any]:
    (rle,) = encode_masks(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def segmented() -> dict[str, Any]:
    """The four boxes of `coco` on three images, each with another kind of segmentation; image 3 has a crowd region."""
    source = coco([1, 2, 3])
    kinds = [
        lambda x, y, w, h: [ring(x, y, w, h)],
        lambda x, y, w, h: [ring(x, y, w / 2, h), ring(x + w / 2, y, w / 2, h)],
        lambda x, y, w, h: plain_runs(rectangle(x, y, w, h)),
        lambda x, y, w, h: compressed(rectangle(x, y, w, h)),
    ]
    for place, record in enumerate(source["annotations"]):
        record["segmentation"] = kinds[(place + record["image_id"]) % 4](*record["bbox"])
    crowds = [record for record in source["annotations"] if record["image_id"] == 3][2:]
    for record, make in zip(crowds, (plain_runs, compressed), strict=True):
        record.update(iscrowd=1, segmentation=make(rectangle(*record["bbox"])))
    return source


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(segmented(), tmp_path_factory.mktemp("masks"))


def truth_as_detections(packed: PackedCoco) -> DetectionTable:
    """Every single object with its box and mask, scores falling."""
    parts = []
    for index, image_id in enumerate(packed.image_ids.tolist()):
        own, masks = packed.annotations(index), objects(masks_of(packed, index))
        ids = np.full(len(own.ids), image_id, np.int64)
        found = DetectionTable(
            ids, own.boxes_xywh, 0.9 - index / 10 - np.arange(len(ids)) / 100, own.category_ids, masks
        )
        parts.append(found.rows(~own.iscrowd))
    return DetectionTable.joined(parts)


def test_ground_truth_found_again_is_1(packed: Path, tmp_path: Path) -> None:
    """Also from the file, and with detections in the crowd regions, which count for nothing."""
    of_pack = PackedCoco(packed)
    found = truth_as_detections(of_pack)
    assert len(found) == 10
    metrics = average_precision(of_pack, found)
    assert list(metrics) == [*NAMES, *(f"segm_{name}" for name in NAMES)]
    assert metrics["segm_AP"] == metrics["AP"] == pytest.approx(1.0, abs=1e-12)
    write_results(tmp_path / "results.json", found)
    again = read_results(tmp_path / "results.json", of_pack)
    assert again.masks is not None and again.masks.tolist() == found.masks.tolist()  # type: ignore[union-attr]
    crowd = of_pack.annotations(2).iscrowd
    inside = [
        rectangle(x + 3, y + 3, w - 6, h - 6)
        for x, y, w, h in of_pack.annotations(2).boxes_xywh[crowd].astype(int).tolist()
    ]
    extra = DetectionTable(
        np.full(2, 3),
        of_pack.annotations(2).boxes_xywh[crowd],
        np.array([0.99, 0.98]),
        of_pack.annotations(2).category_ids[crowd],
        objects(encode_masks(np.concatenate(inside))),
    )
    with_crowd = average_precision(of_pack, DetectionTable.joined([again, extra]))
    assert with_crowd["segm_AP"] == with_crowd["AP"] == pytest.approx(1.0, abs=1e-12)


def eroded(found: DetectionTable) -> DetectionTable:
    """The same detections with masks of which the right part is missing, more of each."""
    assert found.masks is not None
    masks = decode_masks(found.masks.tolist(), HEIGHT, WIDTH)
    for number, mask in enumerate(masks):
        columns = np.flatnonzero(mask.any(axis=0))
        mask[:, columns[len(columns) - len(columns) * number // 20 :]] = False
    return replace(found, masks=objects(encode_masks(masks)))


def test_masks_score_as_pycocotools_scores_the_file(packed: Path, tmp_path: Path) -> None:
    """Without boxes in its rows: with them, loadRes takes the box's area for the mask's."""
    of_pack = PackedCoco(packed)
    found = eroded(truth_as_detections(of_pack))
    write_results(tmp_path / "results.json", found)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    (tmp_path / "masks.json").write_text(json.dumps([{k: v for k, v in row.items() if k != "bbox"} for row in rows]))
    original = COCO(str(packed.parent / "annotations.json"))
    scorer = COCOeval(original, original.loadRes(str(tmp_path / "masks.json")), "segm")
    scorer.evaluate(), scorer.accumulate(), scorer.summarize()
    ours = score(of_pack, found)
    theirs = [math.nan if value == -1 else value for value in scorer.stats]
    assert [ours.metrics[f"segm_{name}"] for name in NAMES] == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    assert 0.3 < ours.metrics["segm_AP"] < 0.95 and ours.metrics["AP"] == pytest.approx(1)
    assert ours.metrics["segm_AP"] == pytest.approx(np.mean([c.segm_ap for c in ours.classes]))
    table = [line.split() for line in class_table(ours.classes).splitlines()]
    assert table[0] == ["class", "boxes", "AP", "AP50", "segm_AP", "segm_AP50"] and len(table[1]) == 6
    assert "segm_AP/red" in ours.logged()
    boxes, masks = metric_lines(ours.metrics)
    assert "segm" not in boxes and masks.startswith("segm_AP=0.") and masks.count("segm_") == 12
    assert result_line(ours.metrics).split()[3].startswith("segm_AP=")
    # the file of masks alone: its boxes are those around the masks
    alone = read_results(tmp_path / "masks.json", of_pack)
    assert average_precision(of_pack, alone)["segm_AP"] == pytest.approx(ours.metrics["segm_AP"])
    assert (alone.boxes_xywh[0, 2] * alone.boxes_xywh[0, 3]) >= mask_areas(alone.masks.tolist())[0]  # type: ignore[union-attr]


def test_the_command_line_scores_masks(packed: Path, tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", truth_as_detections(PackedCoco(packed)))
    command = [sys.executable, "-m", "megdet_hpc.evaluate", "--results", str(tmp_path / "results.json")]
    done = run([*command, "--data.val", str(packed)])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("segm_AP=1.0000 segm_AP50=1.0000") for line in lines)
    assert lines[-1] == "result: AP=1.000 AP50=1.000 segm_AP=1.000 segm_AP50=1.000 images=3"


@pytest.mark.parametrize("outlined", [True, False])
def test_an_outline_without_area_has_its_own_size(outlined: bool, tmp_path: Path) -> None:
    """A bar across its box covers a part of it, and has the size that COCO's own area gives it."""
    source = coco()
    for record in source["annotations"]:
        x, y, width, height = record["bbox"]
        record.pop("area")
        if outlined:
            record["segmentation"] = [[x, y, x + 4, y, x + width, y + height, x + width - 4, y + height]]
    packed = PackedCoco(pack(source, tmp_path))
    for index in range(len(packed)):
        found = packed.annotations(index)
        boxes = found.boxes_xywh[:, 2] * found.boxes_xywh[:, 3]
        own = mask_areas([mask for mask in masks_of(packed, index) if mask]) if outlined else boxes
        assert np.array_equal(found.areas, own) and (not outlined or (own < boxes).all())


def test_a_detector_of_boxes_has_no_numbers_of_masks(packed: Path) -> None:
    of_pack = PackedCoco(packed)
    boxes = replace(truth_as_detections(of_pack), masks=None)
    scores = score(of_pack, boxes)
    assert list(scores.metrics) == NAMES and len(metric_lines(scores.metrics)) == 1
    assert "segm" not in class_table(scores.classes) + result_line(scores.metrics) + " ".join(scores.logged())
    assert not [line for line in what_is_missing(scores, of_pack, 3) if "masks" in line]
    with pytest.raises(UserError, match="segm: the detections have no masks"):
        average_precision(of_pack, boxes, iou_types=("bbox", "segm"))


def test_masks_on_a_set_of_boxes_are_said_not_to_be_scored(tmp_path: Path) -> None:
    source = segmented()
    source["annotations"][4]["segmentation"] = []
    of_pack = PackedCoco(pack(source, tmp_path))
    found = truth_as_detections(PackedCoco(pack(segmented(), tmp_path / "other")))
    scores = score(of_pack, found)
    assert scores.metrics["AP"] == pytest.approx(1) and "segm_AP" not in scores.metrics
    text = f"of {of_pack.directory}, 1 of 10 objects have no segmentation, the first is annotation id 5 of image id 2"
    assert what_is_missing(scores, of_pack, 3)[-1] == f"masks are not scored: {text}"
    with pytest.raises(UserError, match=r"segm: of .*, 1 of 10 objects have no segmentation"):
        score(of_pack, found, iou_types=("bbox", "segm"))


ROW = {"image_id": 1, "category_id": 1, "bbox": [8, 10, 36, 28], "score": 0.9}


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [5, 5], "counts": "5"}, r"row 1 .*: its segmentation has the size \[5, 5\], the image \[90, 120\]$"),
        (
            {"size": [HEIGHT, WIDTH], "counts": "5"},
            r"its segmentation has runs of 5 pixels, the image 90 x 120 = 10800",
        ),
        ([[1, 2, 3, 4]], r"its segmentation has the polygon \[1, 2, 3, 4\], expected x, y of three points"),
        (None, r"has no segmentation, but others have one; give every row one, or none"),
    ],
)
def test_a_mask_that_cannot_be_scored_is_named(segmentation: Any, message: str, packed: Path, tmp_path: Path) -> None:
    good = {**ROW, "segmentation": compressed(rectangle(8, 10, 36, 28))}
    (tmp_path / "results.json").write_text(json.dumps([good, {**ROW, "segmentation": segmentation}]))
    with pytest.raises(UserError, match=message):
        read_results(tmp_path / "results.json", PackedCoco(packed))


class FindsMasks(nn.Module):
    """A detector that finds what the pack holds, with masks on the images' own size."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.pack = PackedCoco(folder)

    def detect(self, batch: Batch) -> list[Detections]:
        index = self.pack.image_ids.tolist().index(batch.image_ids[0])
        assert batch.own_sizes == [(HEIGHT, WIDTH)]
        own, keep = self.pack.annotations(index), ~self.pack.annotations(index).iscrowd
        boxes = torch.from_numpy(own.boxes_xywh[keep]).float()
        boxes[:, 2:] += boxes[:, :2]
        masks = [mask for mask, kept in zip(masks_of(self.pack, index), keep, strict=True) if kept and mask]
        labels = torch.from_numpy(own.category_ids[keep])  # 1 and 2, as the labels
        scores = torch.linspace(0.9, 0.5, len(labels))
        return [Detections(boxes * torch.tensor(batch.scales[0]).repeat(2), scores, labels, masks)]


@pytest.mark.parametrize("ranks", [1, 4])
def test_masks_travel_from_the_detector_over_the_ranks(packed: Path, ranks: int) -> None:
    """With 4 ranks and 3 images one rank has none."""
    config = DataConfig(short_sides=(150,), max_side=300, val_short_side=150)

    def body(world: Communicator) -> DetectionTable | None:
        dataset = DetectionDataset.open(packed, config, training=False, seed=0)
        labels = match_labels(dataset.categories, dataset.categories, "one", "the same")
        model: Any = FindsMasks(packed)
        return SetDetection(dataset, torch.device("cpu"), labels, world, num_workers=0).of_all(model)

    found, *others = run_ranks(ranks, body)
    assert found is not None and others == [None] * (ranks - 1)
    metrics = average_precision(PackedCoco(packed), found)
    assert metrics["segm_AP"] == metrics["AP"] == pytest.approx(1.0)


@dataclass(frozen=True)
class MaskedConfig(FasterRcnnConfig):
    needs_masks: ClassVar[bool] = True


@pytest.mark.parametrize(("family", "has_masks"), [(FasterRcnnConfig, False), (MaskedConfig, True)])
def test_a_family_says_whether_its_training_set_has_masks(
    family: type[FasterRcnnConfig], has_masks: bool, packed: Path
) -> None:
    data = DataConfig(train=str(packed), val=str(packed))
    train, validation = _open_data(Config(model=family(), data=data))
    assert validation is not None and validation[(0, 0)].target.masks is None  # scoring takes those of the pack
    assert (train[(0, 0)].target.masks is not None) == has_masks


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_ground_truth_of_real_coco_found_again_is_1(split: str, tmp_path: Path) -> None:
    """Polygons, several of one object, run lengths and crowd regions as COCO has them."""
    annotations = REAL_DATA / "tiny_coco" / "annotations" / f"instances_{split}.json"
    if not annotations.is_file():
        pytest.skip(f"real data not found at {annotations}")
    command = [sys.executable, "data_prep/pack_coco.py", "--annotations", str(annotations)]
    made = run([*command, "--images", str(REAL_DATA / "tiny_coco" / split), "--output", str(tmp_path / "pack")])
    assert made.returncode == 0, made.stderr
    of_pack = PackedCoco(tmp_path / "pack")
    write_results(tmp_path / "results.json", truth_as_detections(of_pack))
    metrics = average_precision(of_pack, read_results(tmp_path / "results.json", of_pack))
    assert metrics["segm_AP"] == metrics["AP"] == pytest.approx(1.0, abs=1e-12)
