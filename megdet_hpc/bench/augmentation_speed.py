"""What each augmentation costs the loader."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from megdet_hpc.bench.loader_speed import LoaderPass, run_once
from megdet_hpc.config import AugmentationConfig, DataConfig, Geometry
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.pack_masks import lacking_masks
from megdet_hpc.data.packed_coco import PackedCoco

_PLAIN = "resize and flip"
_SSD = AugmentationConfig(photometric=0.5, expand=0.5, iou_crop=True)
# What is measured, and the side of the squares where the detector takes them.
_MEASURED = {
    _PLAIN: (AugmentationConfig(), None),
    "photometric 0.5": (AugmentationConfig(photometric=0.5), None),
    "large_scale_jitter 0.1 to 2": (AugmentationConfig(large_scale_jitter=(0.1, 2.0)), None),
    "expand 0.5": (AugmentationConfig(expand=0.5), None),
    "iou_crop": (AugmentationConfig(iou_crop=True), None),
    "mosaic 1": (AugmentationConfig(mosaic=1.0), None),
    "copy_paste 1": (AugmentationConfig(copy_paste=1.0), None),
    "resize to a square of 300, flip": (AugmentationConfig(), 300),
    "photometric, expand, iou_crop, square of 300": (_SSD, 300),
}


def augmentation_rows(
    pack: PackedCoco, config: DataConfig, num_images: int, images: int, workers: list[int], repeats: int
) -> list[dict[str, Any]]:
    """Measure the loader with each augmentation, taking turns.

    Args:
        pack: the images.
        config: sizes.
        num_images: images of the pack that are used.
        images: images of one pass.
        workers: numbers of worker processes.
        repeats: passes of each.

    Returns:
        A row for each augmentation and number of workers. cpu_ms is the processor time of an image, without workers;
        copy_paste is left out where the pack has no masks.
    """
    runs: dict[tuple[str, int], list[LoaderPass]] = {}
    datasets = {}
    for name, (keys, square) in _MEASURED.items():
        if keys.copy_paste and lacking_masks(pack):
            continue
        wanted = replace(config, augmentation=keys)
        if square:
            wanted = replace(wanted, short_sides=(square,))
        geometry = Geometry(square=square is not None)
        datasets[name] = DetectionDataset(pack, wanted, training=True, seed=0, geometry=geometry)
    for _ in range(repeats):
        for name, dataset in datasets.items():
            for count in workers:
                runs.setdefault((name, count), []).append(run_once(dataset, num_images, images, count))
    return [
        {
            "augmentation": name,
            "workers": count,
            "images_per_s": statistics.median(run.images_per_s for run in found),
            "least": min(run.images_per_s for run in found),
            "most": max(run.images_per_s for run in found),
            "cpu_ms": None if count else statistics.median(run.cpu_ms for run in found),
            "to_plain": statistics.median(run.images_per_s for run in found)
            / statistics.median(run.images_per_s for run in runs[_PLAIN, count]),
        }
        for (name, count), found in runs.items()
    ]
