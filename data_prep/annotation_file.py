"""Loads an annotation file. The error for another file says what that file seems to be."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from megdet_hpc.errors import UserError

GZIP_START = b"\x1f\x8b"
# First bytes of a file, with what it is and what to do.
OTHER_FILES = {
    b"": "is empty",
    b"PK": "is a ZIP archive; unpack it",
    b"<": "is XML or HTML, no JSON; data_prep/convert.py converts Pascal VOC and CVAT",
    b"version https://git-lfs": "is a pointer of Git LFS; get the file itself with `git lfs pull`",
}


def load_annotations(path: Path) -> tuple[dict[str, Any], str]:
    """The object that a COCO annotation file holds. A file compressed by gzip is unpacked first.

    A missing or null list of annotations becomes an empty one: test sets are written like that.

    Returns:
        The object, with lists `images`, `annotations` and `categories`; and the SHA-256 of the file as it is.

    Raises:
        UserError: unreadable, not JSON, or of another form. The message names that form if it is known.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if data.startswith(GZIP_START):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be unpacked by gzip ({error}); copy it again") from error
    try:
        coco = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}){_guess(data, error)}") from error
    if not isinstance(coco, dict):
        raise UserError(f"{path}: holds a {type(coco).__name__}, expected an object{_guess_list(coco)}")
    if coco.get("annotations") is None:
        coco["annotations"] = []
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list):
            found = ", ".join(map(repr, list(coco)[:8]))
            text = f"{path}: no list {key!r}; expected images, annotations and categories, found {found}"
            raise UserError(text + _guess_object(coco))
    return coco, sha256


def _guess(data: bytes, error: Exception) -> str:
    """A guess what a file that is no JSON is, for the end of a message."""
    start = data[:100].lstrip(b"\xef\xbb\xbf \t\r\n")
    for begin, text in OTHER_FILES.items():
        if (start.startswith(begin) and begin) or (not start and not begin):
            return f"; it {text}"
    if isinstance(error, UnicodeDecodeError):
        return "; it is not in UTF-8: convert it, as by `iconv -f latin1 -t utf-8`"
    if not isinstance(error, json.JSONDecodeError):
        return ""
    text = error.doc.rstrip()
    if error.msg == "Extra data" and error.doc[: error.pos].count("\n"):
        return "; it holds one record a line (JSON Lines), expected one object"
    behind = len(text) - error.pos
    if behind <= 0 or error.msg.startswith("Unterminated") or (text[-1] not in "]}" and behind < 8):
        return f"; it ends in the middle, after {len(data):,} bytes: copy or download it again"
    return ""


def _guess_list(value: Any) -> str:
    """A guess what a file is whose outermost value is no object."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and "image_id" in first and "score" in first:
        return "; it is a results file (detections with scores), give the annotation file that it was made for"
    return " with images, annotations and categories"


def _guess_object(coco: dict[str, Any]) -> str:
    """A guess which tool wrote an object without COCO's lists."""
    first = next(iter(coco.values()), None)
    if "shapes" in coco and "imagePath" in coco:
        return "; it is labelme's file of one image: convert its folder by data_prep/convert.py"
    if "_via_img_metadata" in coco or (isinstance(first, dict) and "regions" in first):
        return "; it is a project of VIA: export it as COCO"
    return ""
