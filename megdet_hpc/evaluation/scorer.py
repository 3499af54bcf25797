"""pycocotools' scorer over a packed set; the only place where detections become its records."""

from __future__ import annotations

from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from megdet_hpc.data.masks import mask_areas
from megdet_hpc.data.pack_masks import masks_of
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.detections import DetectionTable

# Recall is also given for so few detections.
_FEWER = (1, 10)


def truth_of(pack: PackedCoco, images: range, *, with_masks: bool) -> COCO:
    """The ground truth of some images.

    Raises:
        PackError, UserError: a segmentation is damaged, or none of COCO's; with masks only.
    """
    return _indexed(pack, images, _annotations(pack, images, with_masks=with_masks))


def run_scorer(
    pack: PackedCoco, images: range, truth: COCO, table: DetectionTable, kind: str, max_detections: int
) -> COCOeval:
    """pycocotools' scorer after its work.

    Args:
        pack: the ground truth.
        images: those to score.
        truth: the ground truth that `truth_of` gave.
        table: what was found, in these images or in others.
        kind: what is compared, bbox or segm.
        max_detections: the best so many of an image and class count.
    """
    scorer = COCOeval(truth, _indexed(pack, images, _found(table, kind)), kind)
    scorer.params.maxDets = sorted({*(few for few in _FEWER if few < max_detections), max_detections})
    scorer.evaluate()
    scorer.accumulate()
    return scorer


def _indexed(pack: PackedCoco, images: range, annotations: list[dict[str, Any]]) -> COCO:
    rows = zip(pack.image_ids.tolist(), pack.heights.tolist(), pack.widths.tolist(), strict=True)
    every = [{"id": image_id, "height": height, "width": width} for image_id, height, width in rows]
    coco = COCO()
    coco.dataset = {
        "images": [every[index] for index in images],
        "categories": pack.categories,
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _annotations(pack: PackedCoco, images: range, *, with_masks: bool) -> list[dict[str, Any]]:
    """The annotations of some images, numbered anew from 1.

    pycocotools takes a match with annotation id 0 for none, and of annotations with one id it keeps the last.
    """
    records: list[dict[str, Any]] = []
    for index in images:
        own, image_id = pack.annotations(index), int(pack.image_ids[index])
        masks = masks_of(pack, index) if with_masks else [None] * len(own.ids)
        columns = (own.boxes_xywh.tolist(), own.category_ids.tolist(), own.iscrowd.tolist(), own.areas.tolist(), masks)
        for box, category, crowd, area, mask in zip(*columns, strict=True):
            record = {"id": len(records) + 1, "image_id": image_id, "category_id": category}
            record |= {"bbox": box, "iscrowd": int(crowd), "area": area}
            records.append({**record, "segmentation": mask} if with_masks else record)
    return records


def _found(table: DetectionTable, kind: str) -> list[dict[str, Any]]:
    """pycocotools' records of what was found; the area by which it sorts sizes is that of what is compared.

    COCO.loadRes would take a box's area for a mask whose row has a box too.
    """
    columns: list[Any] = [table.image_ids.tolist(), table.boxes_xywh.tolist(), table.scores.tolist()]
    columns.append(table.category_ids.tolist())
    if kind == "segm" and table.masks is not None:
        masks = table.masks.tolist()
        columns += [masks, mask_areas(masks).tolist()]
    else:
        columns += [[None] * len(table), (table.boxes_xywh[:, 2] * table.boxes_xywh[:, 3]).tolist()]
    return [
        {"id": number, "image_id": image_id, "category_id": category, "bbox": box, "score": value}
        | {"area": area, "iscrowd": 0, "segmentation": mask}
        for number, (image_id, box, value, category, mask, area) in enumerate(zip(*columns, strict=True), start=1)
    ]
