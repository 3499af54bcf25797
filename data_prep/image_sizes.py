"""Reads widths and heights from the image files if the annotation file has none."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from data_prep.coco_source import SourceImage
from data_prep.image_faults import add_image_fault
from data_prep.image_files import BadImageError, unidentified
from data_prep.skips import Skips
from megdet_hpc.data.image_header import read_header
from megdet_hpc.data.pixels import open_image, swaps_sides
from megdet_hpc.data.shard_format import ENCODINGS


def image_size(path: Path, orientation: str) -> tuple[int, int]:
    """Width and height in pixels from a file's header, as stored or upright.

    Raises:
        BadImageError: the file is missing, unreadable or no image that can be packed.
    """
    try:
        try:
            with Image.open(path, formats=ENCODINGS) as image:
                width, height = image.size
        except Image.UnidentifiedImageError:
            with open_image(path.read_bytes(), ENCODINGS) as image:
                width, height = image.size
        upright = orientation == "upright" and swaps_sides(read_header(path.read_bytes()).orientation)
        return (height, width) if upright else (width, height)
    except FileNotFoundError as error:
        raise BadImageError("missing_image", "no such file") from error
    except Image.UnidentifiedImageError as error:
        raise unidentified(path.read_bytes()) from error
    except MemoryError:
        raise
    except Exception as error:  # as in image_files.check_image
        raise BadImageError("unreadable_image", f"its size cannot be read ({error})") from error


def fill_sizes(images: Sequence[SourceImage], folder: Path, orientation: str, skips: Skips) -> list[SourceImage]:
    """Give width and height to the records that lack one of them, counted as a repair.

    Args:
        images: the source's images; a record that changes is replaced.
        folder: image folder.
        orientation: one of `shard_format.ORIENTATIONS`.
        skips: counts the repairs and lists the files without a size.

    Returns:
        The images that have a size now.
    """

    def size_of(image: SourceImage) -> tuple[int, int] | BadImageError | None:
        if "width" in image.record and "height" in image.record:
            return None
        try:
            return image_size(folder / image.path, orientation)
        except BadImageError as error:
            return error

    good = []
    with ThreadPoolExecutor(16) as pool:  # a parallel file system answers slowly, but many at once
        for image, size in zip(images, pool.map(size_of, images, chunksize=64), strict=True):
            if isinstance(size, BadImageError):
                image_id, number = image.record["id"], image.num_annotations
                add_image_fault(skips, size.reason, image.path, image_id, size.text, number)
                continue
            if size is not None:
                image.record = {"width": size[0], "height": size[1], **image.record}
                skips.repaired("images", ["size_from_file"])
            good.append(image)
    return good
