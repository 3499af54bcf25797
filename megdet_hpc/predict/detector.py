"""A trained detector in Python: `megdet_hpc.load("runs/x")("a.jpg").plot()`."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from megdet_hpc.config import Config, from_dict
from megdet_hpc.data.augmentation import Augmentation
from megdet_hpc.data.batch import collate
from megdet_hpc.data.categories import Categories, match_labels
from megdet_hpc.data.decode import decode_rgb
from megdet_hpc.data.image_header import UPRIGHT
from megdet_hpc.data.pixels import rgb_pixels, turned
from megdet_hpc.data.sample import Sample, Target
from megdet_hpc.engine.checkpoint import checkpoint_of, load_checkpoint, with_weights
from megdet_hpc.engine.deterministic import make_deterministic
from megdet_hpc.errors import UserError
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.inference import detect_batch
from megdet_hpc.evaluation.views import merged_batch, see, views_of
from megdet_hpc.models.factory import restored_detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.predict.found import Found

DEFAULT_SCORE = 0.5
_ORIENTATION_TAG = 0x0112  # of EXIF
_NOT_IN_PNG = ("CMYK", "YCbCr", "LAB", "F")
Picture = str | Path | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class Asked:
    """What a caller asks of a detector in place of its checkpoint's configuration.

    Attributes:
        score: least score of a detection [0 to 1].
        max_detections: most detections of a picture; None: as the checkpoint says.
        scales: short sides at which each picture is seen [pixels]; None likewise.
        flip: see each picture flipped too; None likewise.
        soft_nms: none, linear or gaussian; None likewise.
    """

    score: float
    max_detections: int | None = None
    scales: tuple[int, ...] | None = None
    flip: bool | None = None
    soft_nms: Literal["none", "linear", "gaussian"] | None = None


def predicting(state: dict[str, Any], asked: Asked) -> Config:
    """The configuration of a checkpoint with other limits of what is kept.

    Args:
        state: content of the checkpoint.
        asked: what replaces its values.

    Raises:
        UserError: a value is out of its range, or the checkpoint is of a version with other keys.
    """
    config = from_dict(state["config"])
    given = {key: value for key, value in dataclasses.asdict(asked).items() if value is not None}
    given["score_threshold"] = given.pop("score")
    # what soft-NMS lowers below the least score is no detection either
    lowest = max(config.evaluation.soft_nms_score, asked.score)
    limits = dataclasses.replace(config.evaluation, **given, soft_nms_score=lowest)
    return dataclasses.replace(config, evaluation=limits)


def view_samples(pixels: torch.Tensor, views: Sequence[Augmentation], number: int) -> list[Sample]:
    """A picture in each view; see resized_sample."""
    return [resized_sample(pixels, view, number) for view in views]


def resized_sample(pixels: torch.Tensor, augmentation: Augmentation, number: int) -> Sample:
    """A picture as a detector takes it, without a target.

    Args:
        pixels: (3, H, W) uint8.
        augmentation: resize of the evaluation, or a view of it.
        number: stands for its image id.
    """
    nothing = Target.ordinary(torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64))
    height, width = pixels.shape[1:]
    image, target = augmentation(pixels, nothing, seed=0)
    return Sample(image, (image.shape[2] / width, image.shape[1] / height), number, target)


class TrainedDetector:
    """A detector with the categories and the picture size of its training.

    Args:
        state: content of a checkpoint, with the weights to use under `model` (engine.checkpoint.with_weights).
        source: name of the checkpoint in messages.
        config: configuration, as `predicting` gives it.
        device: device to run on.
        group: ranks of the job; nothing is sent.
    """

    def __init__(
        self, state: dict[str, Any], source: str, config: Config, device: torch.device, group: Communicator
    ) -> None:
        self.categories = Categories.of_checkpoint(state, Categories([]))
        self.category_names = dict(zip(self.categories.ids, self.categories.names, strict=True))
        self.device = device
        self.geometry = config.model.geometry
        self.evaluation = config.evaluation
        self._seen = views_of(config.data, config.evaluation, square=self.geometry.square)
        self.views = [view.augmentation for view in self._seen]
        self._labels = match_labels(self.categories, self.categories, source, source)
        count = len(self.categories)
        self.model = restored_detector(config, state["model"], source, num_categories=count, group=group)
        self.model.to(device).eval()
        if config.deterministic:
            make_deterministic()

    def detect(self, pictures: Sequence[Sequence[Sample]]) -> list[DetectionTable]:
        """The detections of some pictures, which are padded to one size; image ids are the samples'.

        Args:
            pictures: the samples of each picture, one of each of `views`; each picture has its own image id.
        """
        batches = [collate(list(view), geometry=self.geometry) for view in zip(*pictures, strict=True)]
        if not self.evaluation.merges:
            table = detect_batch(self.model, batches[0], self.device, self._labels)
            return [table.of_image(number) for number in batches[0].image_ids]
        seen = [
            see(self.model, batch, self.device, flipped=view.flipped)
            for batch, view in zip(batches, self._seen, strict=True)
        ]
        return merged_batch(seen, batches[0], self.evaluation, self._labels)

    def __call__(self, picture: Picture) -> Found:
        """The objects in a picture.

        Args:
            picture: file, PIL image, or (H, W, 3) uint8 RGB array. Files and PIL images are turned upright by their
                EXIF orientation.

        Raises:
            UserError: a file is missing, damaged or no picture, or an array has another shape or type.
        """
        pixels = _pixels(picture)
        table = self.detect([view_samples(pixels, self.views, 0)])[0]
        name = str(picture) if isinstance(picture, str | Path) else ""
        return Found(name, pixels.permute(1, 2, 0).contiguous().numpy(), table, self.category_names)


def read_picture(path: str | Path, *, upright: bool = True) -> torch.Tensor:
    """The pixels of a file, (3, H, W) uint8, by the same rules as in packing (docs/data_format.md, "Pixels").

    Raises:
        UserError: it is missing, damaged or no picture; the message says which, without the name.
    """
    try:
        return decode_rgb(Path(path).read_bytes(), upright)
    except UnidentifiedImageError as error:
        raise UserError("no picture, or of a format that Pillow does not read") from error
    except OSError as error:
        raise UserError(error.strerror.lower() if error.strerror else f"does not decode: {error}") from error


def _pixels(picture: Any) -> torch.Tensor:
    if isinstance(picture, str | Path):
        try:
            return read_picture(picture)
        except UserError as error:
            raise UserError(f"{picture}: {error}") from error
    if isinstance(picture, Image.Image):
        return _of_pillow(picture)
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UserError(f"an array of {array.dtype} and shape {array.shape}; accepted: uint8 (H, W, 3) in RGB")
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def _of_pillow(picture: Image.Image) -> torch.Tensor:
    """The pixels of a PIL image, through a file, so that depth, palette and transparency follow the one rule."""
    file = io.BytesIO()
    orientation = picture.getexif().get(_ORIENTATION_TAG, UPRIGHT)
    try:
        picture.save(file, "TIFF" if picture.mode in _NOT_IN_PNG else "PNG", exif=Image.Exif())
        pixels = rgb_pixels(file.getvalue())
    except (OSError, ValueError) as error:
        raise UserError(f"a PIL image of mode {picture.mode}: {error}") from error
    return torch.from_numpy(turned(pixels, orientation if orientation in range(1, 9) else UPRIGHT)).permute(2, 0, 1)


def load(
    checkpoint: str | Path,
    *,
    device: str = "auto",
    score: float = DEFAULT_SCORE,
    max_detections: int | None = None,
    weights: str | None = None,
    scales: tuple[int, ...] | None = None,
    flip: bool | None = None,
    soft_nms: Literal["none", "linear", "gaussian"] | None = None,
) -> TrainedDetector:
    """A trained detector, to be called with pictures.

    Args:
        checkpoint: folder of a run, whose best checkpoint is taken, else its newest; or a file.
        device: auto, cpu, cuda or xpu.
        score: least score of a detection [0 to 1].
        max_detections: most detections of a picture; None: as the run's configuration says.
        weights: raw or ema, the moving average; None: ema where the checkpoint has one.
        scales, flip, soft_nms: views of each picture and soft-NMS, as the keys of evaluation; None: as the run's
            configuration says.

    Raises:
        UserError: no checkpoint is there, it is damaged, or a value is out of its range.
    """
    file = checkpoint_of(Path(checkpoint))
    state = with_weights(load_checkpoint(file), weights, str(file))
    world = SerialCommunicator()
    config = predicting(state, Asked(score, max_detections, scales, flip, soft_nms))
    return TrainedDetector(state, str(file), config, Runtime(world).device(device), world)
