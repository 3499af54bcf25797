"""Packed images and annotations as augmented samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megdet_hpc.config import DataConfig, Geometry
from megdet_hpc.data.augmentation import Augmentation
from megdet_hpc.data.categories import Categories
from megdet_hpc.data.decode import decode_rgb
from megdet_hpc.data.masks import decode_masks
from megdet_hpc.data.mixing import Mixing
from megdet_hpc.data.pack_masks import lacking_masks, masks_of
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.sample import Sample, Target
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
        self.config = config
        self.categories = Categories(pack.categories)
        self._views: tuple[Augmentation, ...] = ()
        self._augment = Augmentation.of(config, training=training, square=geometry.square)
        wanted = config.augmentation
        self._local = config.sampling == "shard_local"
        self._pastes = training and wanted.copy_paste > 0
        mixes = training and (wanted.copy_paste > 0 or wanted.mosaic > 0)
        self._mixing = Mixing(wanted, self._stored, self._others) if mixes else None
        # data.cache: images as the pack has them, or with their targets as the resize leaves them, by index
        self._images: dict[int, Tensor] = {}
        self._resized: dict[int, tuple[Tensor, Target, tuple[int, int]]] = {}

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

    def seen_in(self, views: Sequence[Augmentation]) -> DetectionDataset:
        """The same set for an evaluation in several views: key (v, index) is image `index` in view v."""
        seen = copy.copy(self)
        seen._views = tuple(views)
        return seen

    def padded_sizes(self, index: int) -> tuple[tuple[int, int], ...]:
        """The height and width of the batch that an image fills, in each view of an evaluation [pixels]."""
        own = int(self.pack.heights[index]), int(self.pack.widths[index])
        sizes = [view.size_after(*own) for view in self._views or (self._augment,)]
        return tuple((self.geometry.padded(height), self.geometry.padded(width)) for height, width in sizes)

    def check_targets(self, name: str) -> None:
        """Raises UserError where no annotation of the set can be trained on, or masks are asked for that are not there.

        Args:
            name: name of the set in the message, such as data.train.
        """
        if self.masks and (text := lacking_masks(self.pack)):
            raise UserError(f"{name} {self.pack.directory}: the detector trains on masks, and {text}")
        if self._pastes and (text := lacking_masks(self.pack)):
            raise UserError(f"{name} {self.pack.directory}: data.augmentation.copy_paste needs masks, and {text}")
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
        masks = self._masks(index, found.ids) if self.masks or self._pastes else None
        return Target(boxes, torch.tensor(labels, dtype=torch.int64), *flags, masks)

    def _masks(self, index: int, annotation_ids: NDArray[np.int64]) -> Tensor:
        """(m, H, W) bool; raises UserError for a single object without a segmentation."""
        masks = []
        for mask, annotation_id in zip(masks_of(self.pack, index), annotation_ids, strict=True):
            if mask is None:
                where = f"{self.pack.directory}: image id {self.pack.image_ids[index]}, annotation id {annotation_id}"
                asking = "the detector trains on masks" if self.masks else "data.augmentation.copy_paste needs masks"
                raise UserError(f"{where}: has no segmentation, and {asking}")
            masks.append(mask)
        size = int(self.pack.heights[index]), int(self.pack.widths[index])
        return torch.from_numpy(decode_masks(masks, *size))

    def _decoded(
        self, index: int, encoded: bytes | memoryview, decode: Callable[[bytes | memoryview, bool], Tensor]
    ) -> Tensor:
        try:
            return decode(encoded, self.pack.upright)
        except OSError as error:
            name = f"{self.pack.directory}: image id {self.pack.image_ids[index]} ({self.pack.file_name(index)})"
            raise UserError(f"{name} does not decode: {error}") from error

    def _stored(self, index: int) -> tuple[Tensor, Target]:
        """An image as the pack has it, and its annotations; raises as `__getitem__`."""
        return self._image(index), self.target(index)

    def _image(self, index: int) -> Tensor:
        """An image as the pack has it, from memory if data.cache keeps it; not to be written to."""
        image = self._images.get(index)
        if image is None:
            image = self._decoded(index, self.pack.read_image_bytes(index), decode_rgb)
            if self.config.cache == "decoded":
                self._images[index] = image
        return image

    def _begun(self, index: int) -> tuple[Tensor, Target, tuple[int, int]]:
        """An image and its target after the resize, and (height, width) before it, from memory after the first time."""
        if index not in self._resized:
            image, target = self._stored(index)
            self._resized[index] = (*self._augment.begin(image, target), (image.shape[1], image.shape[2]))
        return self._resized[index]

    def _others(self, index: int) -> tuple[int, int]:
        """First index and number of the images that an image may be mixed with.

        With shard-local sampling they are those of its shard, which its node reads at about that time.
        """
        if not self._local:
            return 0, len(self.pack)
        ends = np.cumsum(self.pack.images_per_shard)
        shard = int(np.searchsorted(ends, index, side="right"))
        return int(ends[shard] - self.pack.images_per_shard[shard]), self.pack.images_per_shard[shard]

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, index).

        Raises:
            PackError: the stored bytes cannot be read or are damaged; names the shard and the image.
            UserError: they do not decode; names the image.
        """
        if self.config.cache == "resized" and not self._views:
            image, target, size = self._begun(key[1])
            return self._augmented(key, image, target, size, begun=True)
        image, target = self._stored(key[1])
        return self._augmented(key, image, target, (image.shape[1], image.shape[2]))

    def sample(
        self,
        key: tuple[int, int],
        encoded: bytes | memoryview,
        decode: Callable[[bytes | memoryview, bool], Tensor] = decode_rgb,
    ) -> Sample:
        """The sample of (epoch, index) from the bytes of its image file; raises UserError if they do not decode."""
        image, target = self._decoded(key[1], encoded, decode), self.target(key[1])
        return self._augmented(key, image, target, (image.shape[1], image.shape[2]))

    def _augmented(
        self, key: tuple[int, int], image: Tensor, target: Target, size: tuple[int, int], *, begun: bool = False
    ) -> Sample:
        """The sample of (epoch, index) from its image and target, of which nothing is written to.

        Args:
            key: epoch, or view, and index.
            image, target: the image and its annotations, as the pack has them or as the first step leaves them.
            size: (height, width) of the image as the pack has it [pixels].
            begun: whether the first step is made.
        """
        epoch, index = key
        image_id = int(self.pack.image_ids[index])
        height, width = size
        seed = derived_seed("augment", self.seed, epoch, image_id)
        if self._mixing:
            image, target = self._mixing(image, target, index, seed)
            target = target if self.masks else replace(target, masks=None)
        augment = self._views[epoch] if self._views else self._augment
        image, target = augment(image, target, seed, begun=begun)
        if self.training:
            target = target.rows((target.boxes[:, 2:] - target.boxes[:, :2] >= _MIN_SIDE).all(dim=1))
        scale = (image.shape[2] / width, image.shape[1] / height)
        return Sample(image, scale, image_id, target)
