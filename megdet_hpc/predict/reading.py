"""Pictures read ahead by loader processes, a batch at a time; what cannot be read is a fault of one file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megdet_hpc.data.augmentation import Augmentation
from megdet_hpc.data.image_header import read_header
from megdet_hpc.data.loader import prepare_worker, start_server
from megdet_hpc.data.pixels import open_image, swaps_sides
from megdet_hpc.data.sample import Sample
from megdet_hpc.errors import UserError
from megdet_hpc.predict.detector import read_picture, view_samples
from megdet_hpc.predict.sources import InputFile


@dataclass(frozen=True)
class Picture:
    """A file that was read, or the reason why it was not.

    Attributes:
        index: its place among the sources.
        pixels: (3, H, W) uint8; None where it was not read.
        samples: picture as the detector takes it, one of each view; none likewise.
        fault: reason; "" where it was read.
    """

    index: int
    pixels: Tensor | None = None
    samples: Sequence[Sample] = ()
    fault: str = ""


class Pictures(Dataset[Picture]):
    """The pictures among the sources, by their place.

    Args:
        sources: all of them.
        views: views of the detector, in which each picture is resized.
        upright: whether to turn pictures by their EXIF orientation.
    """

    def __init__(self, sources: Sequence[InputFile], views: Sequence[Augmentation], upright: bool) -> None:
        self._sources, self._views, self._upright = sources, views, upright

    def __getitem__(self, index: int) -> Picture:
        try:
            pixels = read_picture(self._sources[index].path, upright=self._upright)
        except UserError as error:
            return Picture(index, fault=str(error))
        return Picture(index, pixels, view_samples(pixels, self._views, index))


def read_batches(pictures: Pictures, batches: Sequence[list[int]], num_workers: int) -> Iterator[list[Picture]]:
    """The pictures of each batch, in the order of the batches.

    Args:
        pictures: pictures by their place.
        batches: places of the pictures of each.
        num_workers: processes that read ahead; 0: none.
    """
    if not batches:
        return
    loader: DataLoader[Any] = DataLoader(
        pictures,
        batch_sampler=batches,
        collate_fn=list,
        num_workers=num_workers,
        worker_init_fn=prepare_worker,
        # a process in which MPI runs must not be forked
        multiprocessing_context=start_server(__name__) if num_workers else None,
    )
    yield from loader


def picture_size(source: InputFile, upright: bool) -> tuple[int, int]:
    """Height and width of a picture by its header [pixels]; zeros where it cannot be read."""
    try:
        encoded = source.path.read_bytes()
        with open_image(encoded) as image:
            width, height = image.size
    except Exception:  # decoders raise what they like; the picture is read, and its fault told, later
        return 0, 0
    turned = upright and swaps_sides(read_header(encoded).orientation)
    return (width, height) if turned else (height, width)


def batches_of_equal_size(sizes: dict[int, tuple[int, int]], batch: int) -> list[list[int]]:
    """The pictures of each size in batches, so that none is padded for the sake of another.

    Args:
        sizes: size of each picture by its place.
        batch: most pictures of a batch.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in sizes.items():
        groups.setdefault(size, []).append(index)
    return [group[first : first + batch] for group in groups.values() for first in range(0, len(group), batch)]
