"""Detections over a data set that the ranks share out. The numbers do not depend on how many ranks there are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from megdet_hpc.data.batch import Batch
from megdet_hpc.data.categories import LabelIds
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.loader import make_loader
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.log import progress_bar
from megdet_hpc.models.detector import Detector
from megdet_hpc.parallel.communicator import Communicator


@torch.no_grad()
def detect_batch(model: Detector, batch: Batch, device: torch.device, labels: LabelIds) -> list[DetectionTable]:
    """The detections of each image of a batch, in pixels of the image as it is stored.

    Args:
        model: detector in evaluation mode.
        batch: images, on the CPU.
        device: device of the model.
        labels: category ids by the model's labels.
    """
    found = model.detect(batch.to(device))
    columns = (found, batch.image_ids, batch.scales)
    return [DetectionTable.of_detector(*image, labels) for image in zip(*columns, strict=True)]


@torch.no_grad()
def detect(
    model: Detector,
    dataset: DetectionDataset,
    indices: list[int],
    device: torch.device,
    labels: LabelIds,
    *,
    num_workers: int,
    show: bool,
    moved: Callable[[], None] = lambda: None,
) -> DetectionTable:
    """Run the detector on some images, one at a time.

    Each image is padded on its own, so its detections depend on nothing else. In a batch they would depend on the
    sizes of the other images.

    Args:
        model: a detector; it is left in the mode it was in.
        dataset: a set opened with training=False.
        indices: positions in the data set.
        device: device of the model.
        labels: the data set's category ids by the model's labels; what it has no id for is left out.
        num_workers: loader processes.
        show: draw a progress bar.
        moved: called before each image.

    Returns:
        What was found, in the order of the indices.
    """
    was_training = model.training
    model.eval()
    parts = []
    loader = make_loader(
        dataset,
        [[(0, index)] for index in indices],
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    for batch in progress_bar(loader, desc="evaluate", unit="image", disable=not show, leave=False):
        moved()
        parts += detect_batch(model, batch, device, labels)
    model.train(was_training)
    return DetectionTable.joined(parts)


def detect_all(
    model: Detector,
    dataset: DetectionDataset,
    device: torch.device,
    labels: LabelIds,
    world: Communicator,
    *,
    num_workers: int,
    limit: int | None = None,
    moved: Callable[[], None] = lambda: None,
) -> DetectionTable | None:
    """Detections of every image exactly once, ordered by image, on rank 0. Collective of the world; blocks.

    Args:
        model, dataset, device, labels, num_workers: see `detect`.
        world: all ranks.
        limit: only the first so many images.
        moved: called before each image of this rank.

    Returns:
        None on other ranks than 0.
    """
    count = min(len(dataset), limit or len(dataset))
    indices = list(range(world.rank, count, world.size))
    mine = detect(model, dataset, indices, device, labels, num_workers=num_workers, show=world.rank == 0, moved=moved)
    parts = world.gather_object(mine, name="detections")
    if parts is None:
        return None
    everything = DetectionTable.joined(parts)
    order = {image_id: index for index, image_id in enumerate(dataset.pack.image_ids.tolist())}
    position = np.array([order[image_id] for image_id in everything.image_ids.tolist()], dtype=np.int64)
    return everything.rows(np.argsort(position, kind="stable"))
