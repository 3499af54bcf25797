"""Takes widths and heights from the image files where the annotation file has none."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from data_prep.coco_source import SourceImage
from data_prep.image_files import BadImageError
from data_prep.skips import Skips
from megdet_hpc.data.shard_format import ENCODINGS


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels as stored, from a file's header.

    Raises:
        BadImageError: missing, unreadable or no image that can be packed.
    """
    try:
        with Image.open(path, formats=ENCODINGS) as image:
            return image.size
    except FileNotFoundError as error:
        raise BadImageError("missing_image", "no such file") from error
    except Image.UnidentifiedImageError as error:
        raise BadImageError("unsupported_image", f"not a {' or '.join(ENCODINGS)} file") from error
    except MemoryError:
        raise
    except Exception as error:  # as in image_files.check_image
        raise BadImageError("unreadable_image", f"its size cannot be read ({error})") from error


def fill_sizes(images: Sequence[SourceImage], folder: Path, skips: Skips) -> list[SourceImage]:
    """Give width and height to the records that lack one of them, counted as a repair.

    Args:
        images: of the source; a record that changes is replaced.
        folder: of the image files.
        skips: counts the repairs and takes in the files that give no size.

    Returns:
        The images that have a size now.

    Raises:
        UserError: files that give no size, all of them, where `skips` does not leave them out.
    """

    def size_of(image: SourceImage) -> tuple[int, int] | BadImageError | None:
        if "width" in image.record and "height" in image.record:
            return None
        try:
            return image_size(folder / image.record["file_name"])
        except BadImageError as error:
            return error

    good = []
    with ThreadPoolExecutor(16) as pool:  # a parallel file system answers slowly, but many at once
        for image, size in zip(images, pool.map(size_of, images, chunksize=64), strict=True):
            if isinstance(size, BadImageError):
                path, image_id = folder / image.record["file_name"], image.record["id"]
                text = f"image id {image_id}: {size.text}"
                skips.add(size.reason, path, text, image_id, images=1, annotations=len(image.annotations))
                continue
            if size is not None:
                image.record = {"width": size[0], "height": size[1], **image.record}
                skips.repaired("images", ["size_from_file"])
            good.append(image)
    skips.refuse(folder)
    return good
