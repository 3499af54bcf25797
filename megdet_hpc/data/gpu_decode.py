"""Decoding in the training process, by its GPU: loader processes read and check the bytes, nvJPEG decodes the batch.

It is meant for nodes whose cores cannot decode fast enough for their GPUs. Pixels may differ from libjpeg-turbo's by
rounding, and the resize by the GPU's arithmetic. So a run that changes the place of decoding does not repeat the bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg

from megdet_hpc.data.batch import Batch, collate
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.decode import decode_rgb, turn
from megdet_hpc.data.image_header import read_header
from megdet_hpc.devices import stream_of
from megdet_hpc.errors import UserError

Encoded = tuple[tuple[int, int], bytes]
"""An (epoch, index) key and the image's file."""


class EncodedImages(Dataset[Any]):
    """The bytes of a list of keys, checked. The PackError of a damaged shard takes their place."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Encoded] | UserError:
        try:
            return [(key, bytes(self._dataset.pack.read_image_bytes(key[1]))) for key in keys]
        except UserError as error:
            return error


def decode_batch(encoded: list[bytes], device: torch.device, upright: bool = False) -> list[Tensor]:
    """Decode image files to a device: usual JPEGs on a GPU by nvJPEG in one call, all else as `decode_rgb`.

    Args:
        encoded: the files' bytes.
        device: device of the tensors.
        upright: whether to turn the pictures, see `decode_rgb`.

    Returns:
        Per file (3, H, W) uint8 RGB; a file that does not decode gives an empty tensor.
    """
    images: dict[int, Tensor] = {}
    if device.type == "cuda":
        headers = [read_header(data) for data in encoded]
        plain = [index for index, header in enumerate(headers) if header.plain]  # nvJPEG would misread the others
        files = [torch.frombuffer(bytearray(encoded[index]), dtype=torch.uint8) for index in plain]
        # torchvision decodes on a stream of its own, into memory of this one, whose earlier kernels may still read it
        stream_of(device).synchronize()
        try:
            decoded: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device=device) if files else []
        except RuntimeError:
            decoded = []  # a file that nvJPEG does not take: none of the batch is lost
        for index, image in zip(plain, decoded, strict=False):
            images[index] = turn(image, headers[index].orientation) if upright else image
    return [images[k] if k in images else _decode_one(data, upright).to(device) for k, data in enumerate(encoded)]


def _decode_one(data: bytes, upright: bool) -> Tensor:
    try:
        return decode_rgb(data, upright)
    except OSError:
        return torch.empty(0)


class DecodedBatches:
    """The batches of a loader over `EncodedImages`, decoded, augmented and padded on a device.

    Args:
        loader: gives lists of `Encoded`.
        dataset: source of targets and augmentation.
        device: device of the images; targets follow with Batch.to.
        side: side of the padded square, see `collate`.
    """

    def __init__(
        self, loader: Iterable[Any], dataset: DetectionDataset, device: torch.device, side: int | None
    ) -> None:
        self._loader, self._dataset, self._device, self._side = loader, dataset, device, side

    def __iter__(self) -> Iterator[Batch]:
        for encoded in self._loader:
            if isinstance(encoded, UserError):
                raise encoded
            images = decode_batch([data for _, data in encoded], self._device, self._dataset.pack.upright)
            samples = [
                self._dataset.sample(key, data, decode=lambda *_, image=image: _whole(image))
                for (key, data), image in zip(encoded, images, strict=True)
            ]
            yield collate(samples, self._side, self._dataset.geometry)


def _whole(image: Tensor) -> Tensor:
    if not image.numel():
        raise OSError("not an image, or cut off")
    return image
