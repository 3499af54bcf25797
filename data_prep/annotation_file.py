"""Reads an annotation file, whole or record by record. The error for another file says what that file seems to be."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megdet_hpc.errors import UserError
from megdet_hpc.files import file_sha256

LISTS = ("images", "annotations")
"""The lists whose records `walk` gives one by one."""

GZIP_START = b"\x1f\x8b"
_PIECE = 2**22  # bytes of the file that are read at a time
_BLANKS = re.compile(r"[ \t\r\n]*")
_LONGEST_WORD = 16  # characters, as -Infinity: an error so near to the end of a piece may be one of the piece alone
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
    coco: dict[str, Any] = {}
    for key, records in walk(path):
        if key in LISTS and isinstance(records, Iterator):
            coco[key] = list(records)
        else:
            coco[key] = records
    check_lists(path, coco)
    return coco, file_sha256(path)


def check_lists(path: Path, coco: dict[str, Any]) -> None:
    """Raise UserError where one of the three lists is none. Missing or null annotations become an empty list."""
    if coco.get("annotations") is None:
        coco["annotations"] = []
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list):
            found = ", ".join(map(repr, list(coco)[:8]))
            text = f"{path}: no list {key!r}; expected images, annotations and categories, found {found}"
            raise UserError(text + _guess_object(coco))


def walk(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of the object that a COCO annotation file holds, in the file's order.

    The values of images and of annotations, if they are lists, are iterators over their records, which need not be
    used up. So no more than a few MiB of the file are in memory, whatever its size. Python's own decoder reads each
    record: numbers, escapes and NaN are what `json.load` makes of them.

    Raises:
        UserError: unreadable, not JSON, no object, or one of the lists occurs twice.
    """
    text = _Text(path)
    begin = text.peek()
    if begin != "{":
        if begin == "[":
            text.step()
            first = [] if text.peek() == "]" else [text.value()]
            raise UserError(f"{path}: holds a list, expected an object{_guess_list(first)}")
        raise UserError(f"{path}: holds a {type(text.value()).__name__}, expected an object{_guess_list(None)}")
    text.step()
    seen: set[str] = set()
    while text.next_entry("}", first=not seen):
        key = text.key()
        if key in seen and key in LISTS:
            raise UserError(f"{path}: has {key!r} twice; join the two lists")
        seen.add(key)
        if key in LISTS and text.peek() == "[":
            text.step()
            records = _records(text)
            yield key, records
            for _ in records:  # what was not used
                pass
        else:
            yield key, text.value()
    if text.peek():
        raise text.error("Extra data", text.place)


def _records(text: _Text) -> Iterator[Any]:
    """The values of a list that was just entered."""
    first = True
    while text.next_entry("]", first=first):
        first = False
        yield text.value()


class _Text:
    """The text of a JSON file, read piece by piece, and the place in it.

    Args:
        path: the file, compressed by gzip or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = open(path, "rb")  # noqa: SIM115  until the text is used up
            self._start = self._file.read(100)
            self._file.seek(0)
            if self._start.startswith(GZIP_START):
                self._file = gzip.GzipFile(fileobj=self._file)
                self._start = self._file.peek(100)[:100]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:  # the last is an OSError
            raise self._no_gzip(error) from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(self._start))("surrogatepass")
        self._bytes = 0
        self._buffer, self.place, self._ended = "", 0, False
        self._before = self._lines = 0  # characters and line ends before the buffer
        self._column = 0  # characters since the last line end before the buffer
        self._decode = json.JSONDecoder().raw_decode

    def _no_gzip(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: cannot be unpacked by gzip ({error}); copy it again")

    def _more(self) -> None:
        """Forget what lies before the place and read on, at least as much as is there."""
        used = self._buffer[: self.place]
        self._before += len(used)
        if ends := used.count("\n"):
            self._lines, self._column = self._lines + ends, len(used) - used.rindex("\n") - 1
        else:
            self._column += len(used)
        rest = self._buffer[self.place :]
        try:
            data = self._file.read(max(_PIECE, len(rest)))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._no_gzip(error) from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        try:
            self._buffer = rest + self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            where = f"{error.reason}, near byte {self._bytes + error.start}"
            text = f"'{error.encoding}' codec can't decode byte 0x{error.object[error.start]:02x}: {where}"
            raise UserError(f"{self.path}: not valid JSON ({text}){_guess(self._start, error)}") from error
        self._bytes += len(data)
        self._ended, self.place = not data, 0

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            match = _BLANKS.match(self._buffer, self.place)
            assert match is not None
            self.place = match.end()
            if self.place < len(self._buffer):
                return self._buffer[self.place]
            if self._ended:
                return ""
            self._more()

    def step(self) -> None:
        """Go past the character that `peek` gave."""
        self.place += 1

    def next_entry(self, end: str, *, first: bool) -> bool:
        """Go to the next entry of an object or a list; False, and past its end, where there is none."""
        found = self.peek()
        if found == end and first:
            self.step()
            return False
        if first:
            return True
        if found not in (",", end):
            raise self.error("Expecting ',' delimiter", self.place)
        self.step()
        return found == ","

    def key(self) -> str:
        """A key, and past its colon."""
        if self.peek() != '"':
            raise self.error("Expecting property name enclosed in double quotes", self.place)
        key: str = self.value()
        if self.peek() != ":":
            raise self.error("Expecting ':' delimiter", self.place)
        self.step()
        return key

    def value(self) -> Any:
        """The next value, as json.load gives it."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._buffer, self.place)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._buffer) - _LONGEST_WORD or error.msg.startswith("Unterminated")
                if cut and not self._ended:
                    self._more()
                    continue
                raise self.error(error.msg, error.pos) from error
            except RecursionError as error:
                raise UserError(f"{self.path}: not valid JSON ({error})") from error
            except ValueError as error:  # an integer of thousands of digits
                raise UserError(f"{self.path}: not valid JSON ({error})") from error
            if end + 2 >= len(self._buffer) and not self._ended:  # a number may go on, as behind 1e-
                self._more()
                continue
            self.place = end
            return value

    def error(self, message: str, place: int) -> UserError:
        """An error at a place of the buffer, in json's words and with its counts."""
        before, char = self._buffer[:place], self._before + place
        lines = self._lines + before.count("\n")
        column = place - before.rindex("\n") if "\n" in before else self._column + place + 1
        behind = self._buffer[place:].rstrip()
        while len(behind) < _LONGEST_WORD and not self._ended:  # is there anything more?
            self.place = len(self._buffer)
            self._more()
            behind += self._buffer.rstrip()
        guess = _guess(self._start, None)
        if not guess and message == "Extra data" and lines:
            guess = "; it holds one record a line (JSON Lines), expected one object"
        cut = message.startswith("Unterminated") or (len(behind) < 8 and not behind.endswith(("]", "}")))
        if not guess and self._ended and cut:
            guess = f"; it ends in the middle, after {self._bytes:,} bytes: copy or download it again"
        where = f"{message}: line {lines + 1} column {column} (char {char})"
        return UserError(f"{self.path}: not valid JSON ({where}){guess}")


def _guess(start: bytes, error: Exception | None) -> str:
    """A guess what a file that is no JSON is by its first bytes, for the end of a message."""
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    for begin, text in OTHER_FILES.items():
        if (start.startswith(begin) and begin) or (not start and not begin):
            return f"; it {text}"
    return "; it is not in UTF-8: convert it, as by `iconv -f latin1 -t utf-8`" if error else ""


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
