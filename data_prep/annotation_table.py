"""The annotations of a source, in an unnamed file on disk: columns and JSON texts, by groups of images.

A packer that held them as Python objects would need some GB for COCO, and more than a node has for larger sets.

Shape legend: m annotations.
"""

from __future__ import annotations

import os
import struct
import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.skips import is_id
from megdet_hpc.data.shard_format import ANNOTATION_KEYS, NO_FLAG, encode_json
from megdet_hpc.errors import UserError

ROW = np.dtype(
    [
        ("source_index", "<i8"),  # position in the source's "annotations"
        ("image", "<i8"),  # its image's position in the source's "images"
        ("id", "<i8"),
        ("category_id", "<i8"),
        ("bbox", "<f8", (4,)),
        ("area", "<f8"),
        ("iscrowd", "i1"),
        ("difficult", "i1"),
        ("segmentation", "<i4"),  # bytes of the JSON text, as the pack stores it
        ("extra", "<i4"),
    ]
)
_PACK_ROW = struct.Struct("<4q5d2b2i").pack
_INDEX_BYTES = ROW["source_index"].itemsize  # the first of a row; two equal records differ in these alone
_GROUP = 4096  # images whose annotations lie together
_FLUSH = 2**16  # bytes of a group that are collected before they are written

_KEYS_WITH_DIFFICULT = ANNOTATION_KEYS | {"difficult"}


class Annotations(NamedTuple):
    """Annotations image by image, those of an image in the source's order. Picklable, for a worker."""

    rows: NDArray[Any]  # [m] of ROW
    segmentation: bytes  # all texts end to end
    extra: bytes

    def of(self, images: NDArray[np.int64]) -> tuple[Annotations, NDArray[np.int64]]:
        """Those of some of the images, and the number that each of these has.

        Args:
            images: positions in the source's "images", rising.
        """
        place = np.searchsorted(images, self.rows["image"])
        kept = np.zeros(len(self.rows), np.bool_)
        inside = place < len(images)
        kept[inside] = images[place[inside]] == self.rows["image"][inside]
        return self._take(np.flatnonzero(kept)), np.bincount(place[kept], minlength=len(images))

    def _take(self, chosen: NDArray[np.int64]) -> Annotations:
        if len(chosen) == len(self.rows) and (chosen[1:] > chosen[:-1]).all():
            return self
        texts = {name: _entries(self.rows[name], getattr(self, name), chosen) for name in ("segmentation", "extra")}
        return Annotations(self.rows[chosen], **texts)


def _digest(record: bytes) -> bytes:
    """Eight bytes that tell records apart; Python's own hash takes -1.0 and -2.0 for the same."""
    return blake2b(record, digest_size=8).digest()


def _entries(lengths: NDArray[np.int32], data: bytes, chosen: NDArray[np.int64]) -> bytes:
    """Some of the texts that lie end to end."""
    if not data:
        return b""
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    return b"".join([data[a:b] for a, b in zip(begins[chosen].tolist(), ends[chosen].tolist(), strict=True)])


@dataclass
class _Group:
    rows: bytearray
    segmentation: bytearray
    extra: bytearray

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.segmentation) + len(self.extra)


class AnnotationTable:
    """Good annotations, added in the source's order and read back by images.

    Args:
        folder: folder, or a folder to be made, on whose file system the unnamed file lies.

    Attributes:
        repairs: number of annotations by repair, once `finish` was called.
    """

    def __init__(self, folder: Path) -> None:
        self.repairs: Counter[str] = Counter()
        while not folder.is_dir():
            folder = folder.parent
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  lives as long as the table
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
        self._end = 0
        self._groups: defaultdict[int, _Group] = defaultdict(lambda: _Group(bytearray(), bytearray(), bytearray()))
        self._segments: defaultdict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        # of each annotation, in the order in which they were added
        self._sources, self._ids, self._digests, self._codes = array("q"), array("q"), array("q"), array("H")
        self._repair_codes: dict[tuple[str, ...], int] = {}
        self._without_id = array("q")  # source indices
        self._given: tuple[NDArray[np.int64], NDArray[np.int64]] = (np.empty(0, np.int64), np.empty(0, np.int64))
        self._dropped = np.empty(0, np.int64)  # source indices, rising

    def __len__(self) -> int:
        """Number of annotations."""
        return len(self._sources) + len(self._without_id) - len(self._dropped)

    def add(self, source_index: int, image: int, record: dict[str, Any], repairs: Sequence[str]) -> None:
        """Add a checked record. One without an id gets its id in `finish`.

        Args:
            source_index: its position in the source's "annotations".
            image: its image's position in the source's "images".
            record: the record, repaired.
            repairs: the repairs that were made.

        Raises:
            UserError: the disk is full.
        """
        difficult = record.get("difficult")
        known, flag = ANNOTATION_KEYS, NO_FLAG
        if type(difficult) is int and difficult in (0, 1):  # other values are kept among the further keys
            known, flag = _KEYS_WITH_DIFFICULT, difficult
        extra = b""
        if not record.keys() <= known:
            extra = encode_json({key: value for key, value in record.items() if key not in known})
        segmentation = encode_json(record["segmentation"]) if "segmentation" in record else b""
        has_id = is_id(record.get("id"))
        columns = (
            image,
            record["id"] if has_id else 0,
            record["category_id"],
            *record["bbox"],
            record.get("area", np.nan),
            record.get("iscrowd", NO_FLAG),
            flag,
            len(segmentation),
            len(extra),
        )
        group = self._groups[image // _GROUP]
        row = _PACK_ROW(source_index, *columns)
        group.rows += row
        group.segmentation += segmentation
        group.extra += extra
        if group.size >= _FLUSH:
            self._flush(image // _GROUP)
        if has_id:
            self._sources.append(source_index)
            self._ids.append(record["id"])
            self._digests.frombytes(_digest(row[_INDEX_BYTES:] + segmentation + extra))
            self._codes.append(self._repair_codes.setdefault(tuple(repairs), len(self._repair_codes)))
        else:
            self._without_id.append(source_index)
            self.repairs.update(repairs)

    def _flush(self, number: int) -> None:
        group = self._groups.pop(number)
        data = memoryview(bytes(group.rows + group.segmentation + group.extra))
        self._segments[number].append((self._end, len(group.rows), len(group.segmentation), len(group.extra)))
        try:
            while data:
                done = os.pwrite(self._file.fileno(), data, self._end)
                data, self._end = data[done:], self._end + done
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written ({error.strerror})") from error

    def finish(self) -> list[tuple[int, int, int]]:
        """Leave out repeated records, give ids to those that lack one, and count the repairs.

        Returns:
            Source index, id and image of each record that repeats the first with its id; in the source's order.
        """
        for number in list(self._groups):
            self._flush(number)
        sources, ids = (np.frombuffer(column, np.int64) for column in (self._sources, self._ids))
        codes = np.frombuffer(self._codes, np.uint16)
        dropped = self._identical(ids)
        counts = np.bincount(codes, minlength=len(self._repair_codes)) - np.bincount(
            codes[dropped], minlength=len(self._repair_codes)
        )
        for repairs, number in zip(self._repair_codes, counts.tolist(), strict=True):
            self.repairs.update(dict.fromkeys(repairs, number))
        self.repairs = +self.repairs
        if without := len(self._without_id):
            taken = set(ids[(ids > 0) & (ids <= len(ids) + without)].tolist())
            free = islice((number for number in count(1) if number not in taken), without)
            self._given = np.frombuffer(self._without_id, np.int64), np.fromiter(free, np.int64)
            self.repairs["id_given"] += without
        repeated: list[tuple[int, int, int]] = []
        if len(dropped):
            wanted = np.sort(sources[dropped])
            for number in sorted(self._segments):
                rows = self._read(number).rows
                rows = rows[np.isin(rows["source_index"], wanted)]
                repeated += zip(*(rows[name].tolist() for name in ("source_index", "id", "image")), strict=True)
            self._dropped = wanted
        del sources, ids, codes
        self._ids, self._digests, self._codes = array("q"), array("q"), array("H")
        return sorted(repeated)

    def _identical(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of the annotations that are the same as the first with their id."""
        if (ids[1:] > ids[:-1]).all():
            return np.empty(0, np.int64)
        order = np.argsort(ids, kind="stable")
        new = np.ones(len(ids), np.bool_)
        new[1:] = ids[order[1:]] != ids[order[:-1]]
        if new.all():
            return np.empty(0, np.int64)
        first = np.maximum.accumulate(
            np.where(new, np.arange(len(ids)), 0)
        )  # place in `order` of the first with the id
        digests = np.frombuffer(self._digests, np.int64)[order]
        return order[~new & (digests == digests[first])]

    def of(self, images: NDArray[np.int64]) -> Annotations:
        """The annotations of some images.

        Args:
            images: positions in the source's "images", rising.
        """
        if not len(images):
            return Annotations(np.empty(0, ROW), b"", b"")
        groups = range(int(images[0]) // _GROUP, int(images[-1]) // _GROUP + 1)
        parts = [self._read(number) for number in groups if number in self._segments]
        rows = np.concatenate([np.empty(0, ROW), *(part.rows for part in parts)])
        whole = Annotations(rows, b"".join(p.segmentation for p in parts), b"".join(p.extra for p in parts))
        if len(self._dropped):
            whole = whole._take(np.flatnonzero(~np.isin(rows["source_index"], self._dropped)))
        return whole.of(images)[0]

    def _read(self, number: int) -> Annotations:
        """A group's annotations, image by image, with the ids that were given."""
        rows, segmentation, extra = [], [], []
        for begin, *sizes in self._segments[number]:
            data = os.pread(self._file.fileno(), sum(sizes), begin)
            rows.append(np.frombuffer(data[: sizes[0]], ROW))
            segmentation.append(data[sizes[0] : sizes[0] + sizes[1]])
            extra.append(data[sizes[0] + sizes[1] :])
        joined = np.concatenate([np.empty(0, ROW), *rows])
        sources, ids = self._given
        if len(sources):
            place = np.minimum(np.searchsorted(sources, joined["source_index"]), len(sources) - 1)
            lacking = sources[place] == joined["source_index"]
            joined["id"][lacking] = ids[place[lacking]]
        order = np.argsort(joined["image"], kind="stable")
        return Annotations(joined, b"".join(segmentation), b"".join(extra))._take(order)
