"""Detections over a data set that the ranks share out. The numbers do not depend on how many ranks there are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from megdet_hpc.config import EvaluationConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.categories import LabelIds
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.loader import make_loader
from megdet_hpc.devices import is_gpu
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.views import Seen, merged_batch, see, views_of
from megdet_hpc.log import progress_bar
from megdet_hpc.models.detector import Detector
from megdet_hpc.parallel.communicator import Communicator


@torch.no_grad()
def detect_batch(model: Detector, batch: Batch, device: torch.device, labels: LabelIds) -> DetectionTable:
    """The detections of the images of a batch, in their order, in pixels of each image as it is stored.

    Args:
        model: detector in evaluation mode.
        batch: images, on the CPU.
        device: device of the model.
        labels: category ids by the model's labels.
    """
    return DetectionTable.of_detector(model.detect(batch.to(device)), batch.image_ids, batch.scales, labels)


def equal_sizes(dataset: DetectionDataset, count: int, images_per_batch: int) -> list[list[int]]:
    """The images of a set in batches whose images are padded to one size in every view.

    What is in a batch depends on the set alone. So the detections of an image do not depend on the number of ranks.

    Args:
        dataset: a set opened with training=False.
        count: number of images, the first of the set.
        images_per_batch: most images of a batch.
    """
    if images_per_batch == 1:
        return [[index] for index in range(count)]
    groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for index in range(count):
        groups.setdefault(dataset.padded_sizes(index), []).append(index)
    return [
        group[first : first + images_per_batch]
        for group in groups.values()
        for first in range(0, len(group), images_per_batch)
    ]


class SetDetection:
    """The detection of all images of a set, for as many evaluations as there are. The loader is kept between them.

    Each image is padded as if it were alone: a batch has images of one padded size. So its detections depend neither on
    the other images nor on the number of ranks.

    Args:
        dataset: a set opened with training=False.
        device: device of the model.
        labels: the set's category ids by the model's labels; what it has no id for is left out.
        world: all ranks.
        num_workers: loader processes.
        evaluation: views of each image, soft-NMS and images of a batch; None: what the detector gives for the plain
            image, one at a time.
        autocast: context of each pass, which gives its type (Precision.autocast).
        limit: number of images, the first of the set; None for all.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        device: torch.device,
        labels: LabelIds,
        world: Communicator,
        *,
        num_workers: int,
        evaluation: EvaluationConfig | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        limit: int | None = None,
    ) -> None:
        self._device, self._labels, self._world = device, labels, world
        self._pack, self._autocast, self._padded = dataset.pack, autocast, dataset.geometry.padded
        self._merging = evaluation if evaluation is not None and evaluation.merges else None
        self._views = views_of(dataset.config, self._merging, square=dataset.geometry.square) if self._merging else ()
        seen = dataset.seen_in([view.augmentation for view in self._views])
        size = evaluation.batch_on(device.type) if evaluation is not None else 1
        batches = equal_sizes(seen, min(len(dataset), limit or len(dataset)), size)[world.rank :: world.size]
        self._loader = make_loader(
            seen,
            [[(view, index) for index in batch] for batch in batches for view in range(max(len(self._views), 1))],
            num_workers=num_workers,
            pin_memory=is_gpu(device),
            again=True,
        )

    @torch.no_grad()
    def of_rank(self, model: Detector, moved: Callable[[], None] = lambda: None) -> DetectionTable:
        """What the model finds in the images of this rank; it is left in the mode it was in. Not a collective.

        Args:
            model: a detector.
            moved: called before each batch in each view.
        """
        was_training = model.training
        model.eval()
        parts: list[DetectionTable] = []
        seen: list[list[Seen]] = []
        unit = "batch of a view" if len(self._views) > 1 else "batch"
        for batch in progress_bar(self._loader, desc="evaluate", unit=unit, disable=self._world.rank != 0, leave=False):
            moved()
            padded = {(self._padded(height), self._padded(width)) for height, width in batch.sizes}
            assert len(padded) == 1, f"images {batch.image_ids} would be padded to {padded}"
            with self._autocast():
                if self._merging is None:
                    parts.append(detect_batch(model, batch, self._device, self._labels))
                    continue
                seen.append(see(model, batch, self._device, flipped=self._views[len(seen)].flipped))
            if len(seen) == len(self._views):
                parts += merged_batch(seen, batch, self._merging, self._labels)
                seen.clear()
        model.train(was_training)
        return DetectionTable.joined(parts)

    def of_all(self, model: Detector, moved: Callable[[], None] = lambda: None) -> DetectionTable | None:
        """Detections of every image exactly once, ordered by image, on rank 0. Collective of the world; blocks.

        Args:
            model: a detector with the same weights on all ranks.
            moved: called before each batch of this rank in each view.

        Returns:
            None on other ranks than 0.
        """
        parts = self._world.gather_object(self.of_rank(model, moved), name="detections")
        if parts is None:
            return None
        everything = DetectionTable.joined(parts)
        order = {image_id: index for index, image_id in enumerate(self._pack.image_ids.tolist())}
        position = np.array([order[image_id] for image_id in everything.image_ids.tolist()], dtype=np.int64)
        return everything.rows(np.argsort(position, kind="stable"))
