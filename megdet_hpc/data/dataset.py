"""Packed images and annotations as augmented samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megdet_hpc.config import DataConfig, Geometry
from megdet_hpc.data.categories import Categories
from megdet_hpc.data.decode import decode_rgb
from megdet_hpc.data.masks import decode_masks
from megdet_hpc.data.pack_masks import lacking_masks, masks_of
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.sample import Sample, Target
from megdet_hpc.data.transforms import Augmentation
from megdet_hpc.errors import UserError
from megdet_hpc.seeds import derived_seed

# Boxes thinner than this after the resize teach nothing and make the box coder's logarithm infinite at 0 [pixels].
_MIN_SIDE = 1.0
_USUAL = Geometry()


class DetectionDataset(Dataset[Sample]):
    """Samples by (epoch, index). Picklable, so that loader workers may be started in any way.

    Args:
        pack: the packed set.
        config: sizes and augmentation.
        training: augment, and drop boxes without area from the targets.
        masks: put masks into the targets, for a detector that needs them.
        seed: seed of the augmentation, which depends on (seed, epoch, image id) alone.
    """

    def __init__(
        self,
        pack: PackedCoco,
        config: DataConfig,
        *,
        training: bool,
        seed: int,
        masks: bool = False,
        geometry: Geometry = _USUAL,
    ) -> None:
        self.pack, self.training, self.seed, self.masks, self.geometry = pack, training, seed, masks, geometry
        self.categories = Categories(pack.categories)
        self._augment = Augmentation.of(config, training=training, square=geometry.square)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        config: DataConfig,
        *,
        training: bool,
        seed: int,
        masks: bool = False,
        geometry: Geometry = _USUAL,
    ) -> DetectionDataset:
        """The set of a packed folder, read as the configuration says; raises PackError as PackedCoco."""
        pack = PackedCoco(folder, memory_map=config.memory_map)
        return cls(pack, config, training=training, seed=seed, masks=masks, geometry=geometry)

    def __len__(self) -> int:
        return len(self.pack)

    def check_targets(self, name: str) -> None:
        """Raises UserError where no annotation of the set can be trained on, or masks are asked for that are not there.

        Args:
            name: name of the set in the message, such as data.train.
        """
        if self.masks and (text := lacking_masks(self.pack)):
            raise UserError(f"{name} {self.pack.directory}: the detector trains on masks, and {text}")
        crowds = outside = thin = 0
        for index in range(len(self)):
            found = self.pack.annotations(index)
            height, width = int(self.pack.heights[index]), int(self.pack.widths[index])
            low, high = found.boxes_xywh[:, :2], found.boxes_xywh[:, :2] + found.boxes_xywh[:, 2:]
            sides = np.clip(high, 0, [width, height]) - np.clip(low, 0, [width, height])
            large = (sides * self._augment.largest_scale(height, width) >= _MIN_SIDE).all(axis=1)
            if (large & ~found.iscrowd).any():
                return
            crowds += int(found.iscrowd.sum())
            beyond = ((high <= 0) | (low >= [width, height])).any(axis=1) & ~found.iscrowd
            outside += int(beyond.sum())
            thin += int((~beyond & ~found.iscrowd).sum())
        kinds = {
            "crowd regions (iscrowd 1), which training leaves out": crowds,
            "boxes outside their image": outside,
            "boxes thinner than a pixel once resized (are they fractions of the image's sides?)": thin,
        }
        what = " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count) or "no annotation"
        raise UserError(f"{name} {self.pack.directory} has no box to train on: its {len(self)} images hold {what}")

    def target(self, index: int) -> Target:
        """All annotations of an image, in pixels of the image as the pack has it."""
        found = self.pack.annotations(index)
        boxes = torch.from_numpy(found.boxes_xywh.astype(np.float32))
        boxes[:, 2:] += boxes[:, :2]
        labels = [self.categories.label(category) for category in found.category_ids.tolist()]
        flags = torch.from_numpy(found.iscrowd.copy()), torch.from_numpy(found.difficult.copy())
        masks = self._masks(index, found.ids) if self.masks else None
        return Target(boxes, torch.tensor(labels, dtype=torch.int64), *flags, masks)

    def _masks(self, index: int, annotation_ids: NDArray[np.int64]) -> Tensor:
        """(m, H, W) bool; raises UserError for a single object without a segmentation."""
        masks = []
        for mask, annotation_id in zip(masks_of(self.pack, index), annotation_ids, strict=True):
            if mask is None:
                where = f"{self.pack.directory}: image id {self.pack.image_ids[index]}, annotation id {annotation_id}"
                raise UserError(f"{where}: has no segmentation, and the detector trains on masks")
            masks.append(mask)
        size = int(self.pack.heights[index]), int(self.pack.widths[index])
        return torch.from_numpy(decode_masks(masks, *size))

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, index).

        Raises:
            PackError: the stored bytes cannot be read or are damaged; names the shard and the image.
            UserError: they do not decode; names the image.
        """
        return self.sample(key, self.pack.read_image_bytes(key[1]))

    def sample(
        self,
        key: tuple[int, int],
        encoded: bytes | memoryview,
        decode: Callable[[bytes | memoryview, bool], Tensor] = decode_rgb,
    ) -> Sample:
        """The sample of (epoch, index) from the bytes of its image file; raises UserError if they do not decode."""
        epoch, index = key
        image_id = int(self.pack.image_ids[index])
        try:
            image = decode(encoded, self.pack.upright)
        except OSError as error:
            raise UserError(f"image {image_id} ({self.pack.file_name(index)}) does not decode: {error}") from error
        height, width = image.shape[1:]
        seed = derived_seed("augment", self.seed, epoch, image_id)
        image, target = self._augment(image, self.target(index), seed)
        if self.training:
            target = target.rows((target.boxes[:, 2:] - target.boxes[:, :2] >= _MIN_SIDE).all(dim=1))
        scale = (image.shape[2] / width, image.shape[1] / height)
        return Sample(image, scale, image_id, target)
