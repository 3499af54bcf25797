"""Detection over the sources of a command line, which the ranks share out; the same results however many there are."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megdet_hpc.errors import UserError
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.files import atomic_write
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.predict.detector import TrainedDetector, view_samples
from megdet_hpc.predict.found import Found
from megdet_hpc.predict.outputs import PICTURES, Record, writing
from megdet_hpc.predict.reading import Picture, Pictures, batches_of_equal_size, picture_size, read_batches
from megdet_hpc.predict.sources import InputFile
from megdet_hpc.predict.video import Video, video_writer

_QUALITY = 90  # of a JPEG, 1 to 100
_FEW = 8  # batches that are read before a process would have started


@dataclass(frozen=True)
class PredictTask:
    """What is to be done.

    Attributes:
        sources: pictures and videos.
        output: folder of the results.
        draw: whether pictures and videos are drawn.
        upright: whether pictures are turned by their EXIF orientation.
        batch: most pictures that the detector takes at once.
        workers: processes of each rank that read ahead.
        every: distance of the frames of a video that are looked at.
    """

    sources: list[InputFile]
    output: Path
    draw: bool
    upright: bool
    batch: int
    workers: int
    every: int


@dataclass
class Share:
    """What one rank has done: its records, and place and reason of each file that failed."""

    records: list[Record]
    faults: list[tuple[int, str]]


def detect_sources(work: PredictTask, detector: TrainedDetector, world: Communicator, bar: Any) -> Share | None:
    """Detect in all sources and draw them. Collective of the world; blocks.

    A batch and a video are the work of one rank. Batches do not depend on the number of ranks.

    Args:
        work: what is to be done; the same on every rank.
        detector: detector on this rank's device.
        world: all ranks.
        bar: tqdm's bar of this rank's pictures; the frames of a video are added once it is open.

    Returns:
        The work of all ranks, in the order of the sources, on rank 0; None elsewhere.
    """
    batches = _batches(work, world)
    videos = [index for index, source in enumerate(work.sources) if source.is_video]
    share = Share([], [])
    mine = batches[world.rank :: world.size]
    pictures = Pictures(work.sources, detector.views, work.upright)
    workers = work.workers if len(mine) > _FEW else 0
    for batch in read_batches(pictures, mine, workers):
        _detect_batch(batch, work, detector, share)
        bar.update(len(batch))
    for index in videos[world.rank :: world.size]:
        if reason := _detect_video(index, work, detector, share, bar):
            share.faults.append((index, reason))
    parts = world.gather_object(share, name="found")
    if parts is None:
        return None
    records = sorted((record for part in parts for record in part.records), key=lambda one: (one.source, one.frame))
    return Share(records, sorted(fault for part in parts for fault in part.faults))


def _batches(work: PredictTask, world: Communicator) -> list[list[int]]:
    """The places of the pictures of each batch. Collective of the world."""
    places = [index for index, source in enumerate(work.sources) if not source.is_video]
    sizes: dict[int, tuple[int, int]] = {}
    if work.batch > 1:
        own = places[world.rank :: world.size]
        sizes = {index: picture_size(work.sources[index], work.upright) for index in own}
    everyone = world.allgather_object(sizes, name="sizes")
    if work.batch == 1:
        return [[index] for index in places]
    known = {index: size for part in everyone for index, size in part.items()}
    return batches_of_equal_size({index: known[index] for index in places}, work.batch)


def _detect_batch(batch: list[Picture], work: PredictTask, detector: TrainedDetector, share: Share) -> None:
    share.faults += [(picture.index, picture.fault) for picture in batch if picture.fault]
    read = [(p.index, p.pixels, p.samples) for p in batch if p.pixels is not None]
    if not read:
        return
    tables = detector.detect([samples for _, _, samples in read])
    for (index, pixels, _), table in zip(read, tables, strict=True):
        source = work.sources[index]
        name, size = str(source.path), (int(pixels.shape[1]), int(pixels.shape[2]))
        share.records.append(Record(index, 0, name, size, table))
        if work.draw:
            _draw(pixels, table, detector, work.output / PICTURES / source.drawing)


def _draw(pixels: torch.Tensor, table: DetectionTable, detector: TrainedDetector, path: Path) -> None:
    found = Found("", pixels.permute(1, 2, 0).contiguous().numpy(), table, detector.category_names)
    encoded = io.BytesIO()
    found.plot().save(encoded, "JPEG", quality=_QUALITY)
    with writing(path), atomic_write(path) as file:
        file.write(encoded.getbuffer())


def _detect_video(index: int, work: PredictTask, detector: TrainedDetector, share: Share, bar: Any) -> str:
    """Detect in the frames of a video, and keep what comes before a fault.

    Returns:
        What is wrong with it; empty where nothing is.

    Raises:
        UserError: the drawn video cannot be written.
    """
    source = work.sources[index]
    try:
        video = Video(source.path, work.every)
    except UserError as error:
        return str(error)
    bar.total += max(video.num_frames - 1, 0)  # it counted as one
    path = work.output / PICTURES / source.drawing
    with ExitStack() as files:
        writer = None
        if work.draw:
            files.enter_context(writing(path))
            writer = files.enter_context(video_writer(path, video.rate))
        try:
            for found in _frames(video, index, work, detector, share):
                if writer is not None:
                    writer.write(np.asarray(found.plot()))
                bar.update()
        except UserError as error:
            return str(error)  # the frames before it are a whole file
    return ""


def _frames(video: Video, index: int, work: PredictTask, detector: TrainedDetector, share: Share) -> Iterator[Found]:
    """What is found in each frame, and its record; raises UserError where the video is damaged, after the last one."""
    fault: UserError | None = None
    waiting: list[tuple[int, NDArray[np.uint8]]] = []
    frames = video.frames()
    while fault is None:
        try:
            waiting += islice(frames, work.batch - len(waiting))
        except UserError as error:
            fault = error
        if not waiting:
            break
        samples = [
            view_samples(torch.from_numpy(pixels).permute(2, 0, 1), detector.views, number)
            for number, pixels in waiting
        ]
        for (number, pixels), table in zip(waiting, detector.detect(samples), strict=True):
            name, size = f"{work.sources[index].path}#{number}", (pixels.shape[0], pixels.shape[1])
            share.records.append(Record(index, number, name, size, table))
            yield Found(name, pixels, table, detector.category_names)
        waiting = []
    if fault:
        raise fault
