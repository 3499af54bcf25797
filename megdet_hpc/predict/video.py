"""Frames of videos in and out, by PyAV (the `video` extra), which brings FFmpeg's libraries with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.errors import UserError
from megdet_hpc.files import temporary_for


def import_av(path: Path) -> Any:
    """The module av.

    Args:
        path: video that needs it, for the message.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(f"{path}: a video needs PyAV: pip install av (extra `video` of this package)") from error
    return av


# A file that was cut decodes without an error up to there. Edit lists may hide a few of the frames that it tells.
_LEAST_SHARE = 0.95


class Video:
    """A video that is read once, from its begin to its end.

    Args:
        path: file.
        every: only each so-manieth frame, the first included.

    Attributes:
        rate: frames that are given per second of the video.
        num_frames: frames that are given, as far as the file tells; 0 where it does not.

    Raises:
        UserError: it cannot be opened, or holds no video.
    """

    def __init__(self, path: Path, every: int) -> None:
        self._av = import_av(path)
        self._every = every
        try:
            self._file = self._av.open(str(path))
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise UserError(_reason(error)) from error
        if not self._file.streams.video:
            self._file.close()
            raise UserError("holds no video, such as a file of sound alone")
        self._stream = self._file.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = Fraction(self._stream.average_rate or 25) / every
        self.num_frames = -(-int(self._stream.frames or 0) // every)

    def frames(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Number in the file, from 0, and pixels (H, W, 3) RGB of each frame, turned as players turn it.

        Raises:
            UserError: the file is damaged from here on.
        """
        try:
            number = -1
            for number, frame in enumerate(self._file.decode(self._stream)):
                if number % self._every == 0:
                    quarters = round(getattr(frame, "rotation", 0) / 90)  # counterclockwise
                    yield number, np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters))
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise UserError(f"damaged: {_reason(error)}") from error
        finally:
            self._file.close()
        told = int(self._stream.frames or 0)
        if number + 1 < _LEAST_SHARE * told:
            raise UserError(f"damaged: ends after {number + 1} of {told} frames")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class VideoWriter:
    """An MP4 file that grows by a frame at a time, all of the size of the first."""

    def __init__(self, file: Any, rate: Fraction) -> None:
        self._file, self._rate = file, rate
        self._stream: Any = None

    def write(self, pixels: NDArray[np.uint8]) -> None:
        """Add a frame (H, W, 3)."""
        import av

        height, width = (max(2, side - side % 2) for side in pixels.shape[:2])  # yuv420p has no odd sides
        if self._stream is None:
            self._stream = self._file.add_stream("libx264", rate=self._rate)
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
        self._file.mux(self._stream.encode(frame))

    @property
    def has_frames(self) -> bool:
        return self._stream is not None

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if self._stream is not None:
            self._file.mux(self._stream.encode(None))


@contextmanager
def video_writer(path: Path, rate: Fraction) -> Iterator[VideoWriter]:
    """A video that is at `path` once it is whole, if it has a frame.

    Raises:
        OSError: it cannot be written.
    """
    av = import_av(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(path)
    try:
        with av.open(str(temporary), "w", format="mp4") as file:
            writer = VideoWriter(file, rate)
            yield writer
            writer.finish()
        if writer.has_frames:  # no file is begun before the first one
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
