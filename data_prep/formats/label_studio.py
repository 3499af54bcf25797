"""Reads Label Studio's exports, JSON and JSON-MIN."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from data_prep.formats.labels import FileFault, LabelledImage, LabelSet, Mask, Points, Shape, Wanted
from data_prep.formats.text_files import number, read_json
from data_prep.voc_layout import IMAGE_SUFFIXES, OTHER_SUFFIXES
from megdet_hpc.errors import UserError

LEEWAY = 1.0  # percent beyond 0..100
KINDS = ("rectangle", "polygon", "ellipse", "brush", "keypoint", "vector")
UPLOAD_HASH = 8  # hexadecimal digits and a hyphen that uploading puts before a name
MOST_PIXELS = 2**28


def image_name(address: str) -> str:
    """The path that an address of a task's image ends in, without server, bucket and query.

    Raises:
        UserError: it is no address, as http://[x/a.jpg.
    """
    try:
        parts = urlsplit(address)
        local = parse_qs(parts.query).get("d", [""])[0]
    except ValueError as error:
        raise UserError(f"its image has the address {address!r:.80}, which is none ({error})") from error
    return local or unquote(parts.path).removeprefix("/data/upload/").removeprefix("/data/").lstrip("/")


def without_hash(name: str) -> str:
    """A name without the eight digits that Label Studio puts before the name of an uploaded file."""
    path = Path(name)
    digits, hyphen, rest = path.name.partition("-")
    is_hash = len(digits) == UPLOAD_HASH and all(digit in "0123456789abcdef" for digit in digits)
    return rest if hyphen and rest and is_hash else path.name


def _names_image(text: str) -> bool:
    """Whether a text among the data of a task is the address of an image, by its end."""
    try:
        return Path(image_name(text)).suffix.lower() in IMAGE_SUFFIXES + OTHER_SUFFIXES
    except UserError:
        return False


def _address(data: dict[str, Any]) -> str:
    """The image's address among the data of a task.

    Raises:
        UserError: there is none, or there are several.
    """
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    found = {key: text for key, text in texts.items() if _names_image(text)}
    if "image" in texts:
        return texts["image"]
    if len(found) != 1:
        raise UserError(
            f"its data have {len(found)} images among {', '.join(map(repr, data)) or 'nothing'}, expected one"
        )
    return next(iter(found.values()))


def _bits(values: list[int]) -> NDArray[np.uint8]:
    return np.unpackbits(np.array(values, np.uint8))


def brush_pixels(values: list[int]) -> NDArray[np.uint8]:
    """The samples that a brush's bytes hold: of each pixel red, green, blue and alpha.

    The bytes are a row of bits: 32 with the number of samples, 5 with the bits of a sample less one, four times 4
    with the bits of a length less one. Then come blocks: one bit that says whether one sample is repeated, two bits
    that choose one of the four lengths, the length less one, and one sample or as many as the length says.

    Raises:
        UserError: they end too early, or are too many.
    """
    bits = _bits(values)
    place = 0

    def take(count: int) -> int:
        nonlocal place
        if place + count > len(bits):
            raise UserError("its rle ends too early")
        found = int("".join(map(str, bits[place : place + count])) or "0", 2)
        place += count
        return found

    total, word = take(32), take(5) + 1
    if total > MOST_PIXELS or word > 8:
        raise UserError(f"its rle has {total} samples of {word} bits, expected up to {MOST_PIXELS} of 8")
    lengths = [take(4) + 1 for _ in range(4)]
    samples = np.zeros(total, np.uint8)
    done = 0
    while done < total:
        repeated, length = take(1), lengths[take(2)]
        count = min(take(length) + 1, total - done)
        if repeated:
            samples[done : done + count] = take(word)
        else:
            end = place + count * word
            if end > len(bits):
                raise UserError("its rle ends too early")
            rows = bits[place:end].reshape(count, word).astype(np.uint16)
            samples[done : done + count] = rows @ (1 << np.arange(word - 1, -1, -1))
            place = end
        done += count
    return samples


def _brush(value: dict[str, Any], size: tuple[int, int] | None) -> Mask:
    rle = value.get("rle")
    if not isinstance(rle, list) or not all(type(byte) is int and 0 <= byte < 256 for byte in rle):
        raise UserError("its rle is no list of bytes")
    samples = brush_pixels(rle)
    if size is None or len(samples) != 4 * size[0] * size[1]:
        raise UserError(f"its rle has {len(samples) // 4} pixels, the labels say {size}")
    return Mask(samples.reshape(size[1], size[0], 4)[:, :, 3] > 0)


def _percent(value: Any, what: str) -> float:
    found = number(value, what)
    if not -LEEWAY <= found <= 100 + LEEWAY:
        raise UserError(f"{what} is {found:g}, expected 0 to 100 percent of the image")
    return found


def _shape(kind: str, name: str, where: str, value: dict[str, Any], size: tuple[int, int] | None) -> Shape:
    """A drawn object; raises UserError that says what is wrong."""
    angle = number(value.get("rotation") or 0, "rotation")
    if kind == "brush":
        return Shape(name, where, "mask", mask=_brush(value, size))
    if kind == "polygon":
        points = value.get("points")
        if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
            raise UserError(f"points are {points!r:.60}, expected pairs of x and y")
        return Shape(name, where, "polygon", [(_percent(x, "x"), _percent(y, "y")) for x, y in points])
    x, y = (number(value.get(key), key) if angle else _percent(value.get(key), key) for key in ("x", "y"))
    sides: Points
    if kind == "ellipse":
        sides = [(x, y), (_percent(value.get("radiusX"), "radiusX"), _percent(value.get("radiusY"), "radiusY"))]
        return Shape(name, where, "ellipse", sides, angle=angle)
    width, height = (number(value.get(key), key) for key in ("width", "height"))
    for key, side in (("width", width), ("height", height)):
        if not 0 <= side <= (1000 if angle else 100 + 2 * LEEWAY):
            raise UserError(f"{key} is {side:g}, expected 0 to 100 percent of the image")
    return Shape(name, where, "box", [(x, y), (x + width, y + height)], angle=angle, pivot="corner")


def _names(value: Any) -> list[str]:
    """Labels of a region, of which a list is expected; anything else is none."""
    return [str(name) for name in value] if isinstance(value, list) else []


def _regions(result: list[Any]) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
    """Each region's place, record and labels, where separate tags draw and name a region the records are joined."""
    named: dict[Any, list[str]] = {}
    for record in result:
        if isinstance(record, dict) and isinstance(record.get("value"), dict) and record.get("type") == "labels":
            named.setdefault(str(record.get("id")), []).extend(_names(record["value"].get("labels")))
    for place, record in enumerate(result):
        if not isinstance(record, dict) or not isinstance(record.get("value"), dict):
            raise UserError(f"result[{place}] is {record!r:.40}, expected an object with a value")
        kind = str(record.get("type") or "")
        if kind.removesuffix("labels") in KINDS:
            own = record["value"].get(kind) if kind.endswith("labels") else None
            yield place, record, _names(own) or named.get(str(record.get("id")), [])


def _fill(image: LabelledImage, result: list[Any]) -> None:
    """Put the regions of one annotation on its image."""
    for place, record, labels in _regions(result):
        where, kind = f"result[{place}]", str(record["type"]).removesuffix("labels")
        if kind in ("keypoint", "vector"):
            image.left_out[f"shapes of the kind {kind!r} left out, since they have no box"] += 1
            continue
        try:
            if record.get("item_index") not in (None, 0):
                raise UserError("is of another picture of its task (item_index)")
            if number(record.get("image_rotation") or 0, "image_rotation") % 360:
                raise UserError(f"was drawn on the image turned by {record['image_rotation']} degrees")
            width, height = record.get("original_width"), record.get("original_height")
            if width and height:
                image.size = int(number(width, "original_width")), int(number(height, "original_height"))
            if len(set(labels)) != 1 or not labels[0].strip():
                raise UserError(f"has the labels {labels}, expected one")
            image.shapes.append(_shape(kind, labels[0].strip(), where, record["value"], image.size))
        except UserError as error:
            image.faults.append(f"{where}: {error}")


def _chosen(task: dict[str, Any]) -> tuple[list[Any] | None, int]:
    """The regions of the annotation that counts, and the number of others; None where nobody annotated.

    Ground truth goes before the others, and the newest before older ones.
    """
    annotations = task.get("annotations", task.get("completions")) or []
    if not isinstance(annotations, list):
        raise UserError("annotations are no list")
    done = [a for a in annotations if isinstance(a, dict) and not a.get("was_cancelled")]
    if not done:
        return None, 0
    best = max(done, key=lambda a: (bool(a.get("ground_truth")), str(a.get("updated_at") or a.get("created_at") or "")))
    result = best.get("result")
    if not isinstance(result, list):
        raise UserError("an annotation without a list 'result'")
    return result, len(done) - 1


def _minimal(task: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """A task of JSON-MIN: its data, and its regions in the form of JSON."""
    data = {key: value for key, value in task.items() if isinstance(value, str)}
    result = []
    for value in task.values():
        for region in value if isinstance(value, list) else ():
            if isinstance(region, dict):
                kind = next((key for key in region if key.removesuffix("labels") in KINDS), None)
                kind = kind or ("rectangle" if "width" in region and "x" in region else "")
                result.append({**region, "type": kind, "value": region})
    return data, result


def read_label_studio(wanted: Wanted) -> LabelSet:
    """A JSON export, or the ones of a folder.

    Raises:
        UserError: it is none.
    """
    source = wanted.source
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    result = LabelSet([])
    for path in files:
        try:
            tasks = read_json(path)
            if not isinstance(tasks, list):
                raise UserError("no list of tasks, expected an export as JSON")
        except UserError as error:
            result.faults.append(FileFault("bad_file", path.name, str(error)))
            continue
        for place, task in enumerate(tasks):
            identity = task.get("id", place) if isinstance(task, dict) else place
            where = f"{path.name} task {identity}"
            try:
                _read_task(task, where, result)
            except UserError as error:
                result.faults.append(FileFault("bad_task", where, str(error)))
    if not files:
        raise UserError(f"{source}: no file *.json")
    if result.unlabelled:
        result.notes.append(f"{len(result.unlabelled):,} tasks that nobody has annotated, or only skipped")
    return result


def _read_task(task: Any, where: str, result: LabelSet) -> None:
    if not isinstance(task, dict):
        raise UserError(f"is {task!r:.40}, expected an object")
    others = 0
    regions: list[Any] | None
    if isinstance(task.get("data"), dict):
        data = task["data"]
        regions, others = _chosen(task)
    else:
        data, regions = _minimal(task)
    name = image_name(_address(data))
    image = LabelledImage(where, name, [], unit="percent")
    image.other_name = without_hash(name)
    image.left_out["annotations left out: of each task the ground truth counts, else the newest one"] += others
    image.left_out["predictions left out"] += bool(task.get("predictions"))
    if regions is None:
        result.unlabelled.append(image)
        return
    _fill(image, regions)
    result.images.append(image)
