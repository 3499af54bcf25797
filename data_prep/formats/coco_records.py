"""Makes COCO's records of what a reader found: finds the images, compares sizes, checks shapes, gives the ids."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.formats.geometry import record_of
from data_prep.formats.image_index import ImageFacts, ImageIndex, read_facts, told_orientation
from data_prep.formats.labels import LabelledImage, LabelSet, Shape, ShapeError, add_fault
from data_prep.image_files import BadImageError
from data_prep.skips import SHOWN, Skips, describe_entries
from megdet_hpc.data.image_header import UPRIGHT
from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write

Place = tuple[str, Path]
"""Part and file of an image: one image may be in several parts."""

SAME_SHAPE = 0.01  # relative difference of width / height up to which a resized image is the same picture


EDGE = 0.01  # pixels; fractions of six decimals are rounded by less, up to 10,000 pixels


@dataclass(frozen=True)
class Rules:
    """What is made of a set, by the command line or by the format's habit.

    Args:
        orientation: "stored" or "upright": the pixels that sizes and boxes are of; "auto" takes the one that the
            sizes in the labels fit, else the format's.
        usual_orientation: the format's.
        keep_unlabelled: whether images without labels are background.
        difficult: "ignore" gives marked objects iscrowd 1, "keep" 0.
        categories: COCO's category records of the command line; None: from the set.
        split: the only part to convert; None: all.
    """

    orientation: str = "auto"
    usual_orientation: str = "upright"
    keep_unlabelled: bool = True
    difficult: str = "ignore"
    categories: Sequence[dict[str, Any]] | None = None
    split: str | None = None


@dataclass
class Converted:
    """The records of a set, by part.

    Attributes:
        coco: COCO instances by part; one part, "", where the set has none.
        folders: image folder that each part's file names are relative to.
        orientation: "stored" or "upright".
        turned: number of images with an EXIF orientation, by part.
        outside: number of boxes that leave their image, by part.
        changed: numbers of what was read in another way than written, by its name.
        emptied: images whose objects were all left out.
        unlabelled: images without labels: kept as background, or not.
    """

    coco: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    orientation: str = "stored"
    turned: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    emptied: int = 0
    unlabelled: int = 0


def convert(found: LabelSet, folder: Path, rules: Rules, skips: Skips, given_folder: bool = False) -> Converted:
    """COCO instances of a set.

    Args:
        found: what the reader gave.
        folder: image folder, below which images are looked for.
        rules: what is made of it.
        skips: takes in what is wrong.
        given_folder: whether file names are relative to `folder`; else to the innermost folder of each part's images.

    Returns:
        The records. Image ids are positions among all images of the set, sorted by path, so parts share none.

    Raises:
        UserError: faults, all of them, where `skips` does not leave them out; nothing left; an unknown part.
    """
    result = Converted()
    parts = {image.split for image in [*found.images, *found.unlabelled]} | {fault.split for fault in found.faults}
    if rules.split is not None and rules.split not in parts:
        shown = ", ".join(sorted(filter(None, parts))) or "none"
        raise UserError(f"--split {rules.split}: the set has the parts: {shown}")
    wanted = [image for image in found.images if rules.split in (None, image.split)]
    spare = [image for image in found.unlabelled if rules.split in (None, image.split)]
    for fault in found.faults:
        if rules.split in (None, fault.split):
            add_fault(skips, fault.reason, fault.where, fault.text, fault.images, fault.annotations)
    categories, ids = _categories(found, rules)
    folder = _made_alike([*found.images, *found.unlabelled], folder, not given_folder)
    everything = [*found.images, *(found.unlabelled if rules.keep_unlabelled else ())]
    index = None if found.whole else ImageIndex(folder)
    placed = _place(everything, folder, index, rules.split, skips, result, not given_folder)
    if index is not None:
        others = _others(index, placed, parts == {""}, result)
        spare = [*spare, *others] if rules.keep_unlabelled else others or spare
        if rules.keep_unlabelled:
            placed.update({("", image.path): image for image in others if image.path is not None})
    result.unlabelled = len(spare)
    all_paths = sorted({path for _, path in placed}, key=str)
    image_ids = {path: number for number, path in enumerate(all_paths, start=1)}
    chosen = {id(image) for image in [*wanted, *(spare if rules.keep_unlabelled else ())]}
    placed = {place: image for place, image in placed.items() if id(image) in chosen}
    if several := len(placed) - len({path for _, path in placed}):
        result.changed["images in more than one part of the set: what is measured on them means little"] += several
    sizes = _sizes(placed, rules, skips, result)
    for part in sorted({part for part, _ in sizes}):
        paths = sorted((path for other, path in sizes if other == part), key=str)
        base = result.folders[part] = folder if given_folder else _common_folder(paths)
        listed = [(path, placed[part, path], sizes[part, path]) for path in paths]
        result.coco[part] = {**_part(listed, base, image_ids, ids, rules, skips, result), "categories": categories}
    return result


def _made_alike(images: Sequence[LabelledImage], folder: Path, beside: bool) -> Path:
    """The image folder. Where it or an image's path is absolute and another is not, all become absolute.

    Args:
        images: all of the set.
        folder: image folder.
        beside: whether an image may lie outside `folder`, where its labels say.
    """
    paths = [folder, *(image.path for image in images if image.path is not None)]
    if beside:
        named = [image.name.replace("\\", "/") for image in images if image.path is None and image.beside is not None]
        paths += [Path(name) for name in named if os.path.isabs(name) and os.path.isfile(name)]
    if len({path.is_absolute() for path in paths}) == 1:
        return folder
    for image in images:
        image.path = image.path and Path(os.path.abspath(image.path))
        image.beside = image.beside and Path(os.path.abspath(image.beside))
    return Path(os.path.abspath(folder))


def _sizes(
    placed: dict[Place, LabelledImage], rules: Rules, skips: Skips, result: Converted
) -> dict[Place, tuple[int, int]]:
    """Width and height of the images that can be packed; the others are listed as faults. Decides the orientation."""
    facts = read_facts([path for _, path in placed])
    result.orientation = _orientation(placed, facts, rules)
    sizes: dict[Place, tuple[int, int]] = {}
    for (part, path), image in placed.items():
        header = facts[path]
        if isinstance(header, BadImageError):
            _leave_out(skips, image, header.reason, f"its image {path.name} {header.text}")
            continue
        size = header.size(result.orientation == "upright")
        if text := _size_fault(image, header, size, result):
            _leave_out(skips, image, "wrong_image_size", text)
            continue
        sizes[part, path] = size
        result.turned[part] += header.orientation != UPRIGHT
    return sizes


def _categories(found: LabelSet, rules: Rules) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """COCO's categories, and the id by name."""
    if rules.categories is not None:
        records = [dict(record) for record in rules.categories]
    else:
        names = found.names or sorted({shape.name for image in found.images for shape in image.shapes})
        records = [{"id": place, "name": name, "supercategory": name} for place, name in enumerate(names, start=1)]
    ids: dict[str, int] = {}
    for record in records:
        if record["name"] in ids:
            raise UserError(f"the category {record['name']!r} occurs twice (ids {ids[record['name']]}, {record['id']})")
        ids[record["name"]] = record["id"]
    return records, ids


def _leave_out(skips: Skips, image: LabelledImage, reason: str, text: str) -> None:
    add_fault(skips, reason, image.where, text, images=1, annotations=len(image.shapes) + len(image.faults))


def _others(
    index: ImageIndex, placed: dict[Place, LabelledImage], of_one_part: bool, result: Converted
) -> list[LabelledImage]:
    """Images of the folder that no label speaks of, where it is clear which part they are of; else they are counted."""
    paths = [index.folder / path for path in index.files]
    known = {path for _, path in placed}
    others = [path for path in paths if path not in known]
    if others and not of_one_part:
        result.changed["other images in the folder"] += len(others)
        return []
    return [LabelledImage(path.name, path.name, [], path) for path in others]


def _place(
    images: Sequence[LabelledImage],
    folder: Path,
    index: ImageIndex | None,
    split: str | None,
    skips: Skips,
    result: Converted,
    beside: bool,
) -> dict[Place, LabelledImage]:
    """The images by part and file. Only faults of the wanted part are listed.

    Args:
        images: all that have labels.
        folder, index: image folder and its files.
        split: the wanted part; None is all.
        skips: takes in the faults.
        result: counts other spellings.
        beside: whether an image may lie outside `folder`, where its labels say.
    """
    placed: dict[Place, LabelledImage] = {}
    for image in images:
        listed = split in (None, image.split)
        path = image.path
        if path is None and image.beside is not None and beside:
            near = Path(os.path.normpath(image.beside / image.name.replace("\\", "/")))
            path = near if near.is_file() else None
        if path is None:
            assert index is not None
            try:
                path, respelt = _find(index, image)
            except UserError as error:
                if listed:
                    _leave_out(skips, image, "missing_image", f"{error}{image.hint}")
                continue
            result.changed["images found under another spelling or folder than their name's"] += respelt and listed
        first = placed.setdefault((image.split, path), image)
        if first is not image and listed:
            text = f"its image {path.name} has labels in {first.where} already"
            _leave_out(skips, image, "image_labelled_twice", text)
    return placed


def _find(index: ImageIndex, image: LabelledImage) -> tuple[Path, bool]:
    """The file of either name, and whether it is spelt otherwise; raises UserError where there is none or several."""
    try:
        return index.find(image.name)
    except UserError:
        if image.other_name and image.other_name != image.name:
            return index.find(image.other_name)[0], False
        raise


def _orientation(
    placed: dict[Place, LabelledImage], facts: dict[Path, ImageFacts | BadImageError], rules: Rules
) -> str:
    """Whose pixels the labels are of: "stored" or "upright"."""
    if rules.orientation != "auto":
        return rules.orientation
    return told_orientation(((image.size, facts[path]) for (_, path), image in placed.items()), rules.usual_orientation)


def _size_fault(image: LabelledImage, known: ImageFacts, size: tuple[int, int], result: Converted) -> str:
    """Why the size in the labels cannot be the image's; "" where it can."""
    if image.size is None or image.size == size:
        return ""
    (width, height), (said_width, said_height) = size, image.size
    same_shape = said_height > 0 and abs(said_width * height / (said_height * width) - 1) < SAME_SHAPE
    if image.unit != "pixel" and same_shape:
        result.changed["images of another size than the labels say, of the same shape: scaled"] += 1
        return ""
    text = f"its image is {width} x {height} pixels, the labels say {said_width} x {said_height}"
    if image.size == size[::-1]:
        text += f", as it would be turned by 90 degrees (EXIF orientation {known.orientation}; see --orientation)"
    return text


def _common_folder(paths: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in paths]))


def _objects(image: LabelledImage) -> Iterator[list[Shape]]:
    """The shapes of each object: several where they are drawn as a group."""
    groups: dict[Any, list[Shape]] = {}
    for place, shape in enumerate(image.shapes):
        grouped = shape.group is not None and shape.kind in ("polygon", "mask")
        groups.setdefault((shape.name, shape.group) if grouped else place, []).append(shape)
    yield from groups.values()


def _part(
    images: Sequence[tuple[Path, LabelledImage, tuple[int, int]]],
    base: Path,
    image_ids: dict[Path, int],
    category_ids: dict[str, int],
    rules: Rules,
    skips: Skips,
    result: Converted,
) -> dict[str, Any]:
    """Images and annotations of one part."""
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path, image, (width, height) in images:
        file_name = path.relative_to(base).as_posix()
        records.append({"id": image_ids[path], "file_name": file_name, "width": width, "height": height})
        before = len(annotations)
        result.changed.update(image.left_out)
        for fault in image.faults:
            add_fault(skips, "bad_object", image.where, fault, annotations=1)
        for shapes in _objects(image):
            first = shapes[0]
            if first.name not in category_ids:
                text = f"{first.where}: {first.name!r} is not in the list of categories"
                add_fault(skips, "unknown_category", image.where, text, annotations=1)
                continue
            try:
                geometry = record_of(shapes, (width, height), image.unit)
            except (ShapeError, ValueError) as error:  # the latter from the check of outlines
                add_fault(skips, "bad_object", image.where, f"{first.where}: {error}", annotations=1)
                continue
            marked = any(shape.ignored for shape in shapes)
            result.changed["shapes joined with others of their group"] += len(shapes) - 1
            result.changed["turned boxes: the upright box around them is taken, `rotated_box` has the corners"] += (
                "rotated_box" in geometry
            )
            result.changed["circles and ellipses as polygons"] += sum(shape.kind == "ellipse" for shape in shapes)
            x, y, w, h = geometry["bbox"]
            result.outside[image.split] += min(x, y, width - x - w, height - y - h) < -EDGE
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_ids[path],
                    "category_id": category_ids[first.name],
                    **geometry,
                    "iscrowd": int(marked and rules.difficult == "ignore"),
                    **first.extra,
                }
            )
        result.emptied += len(annotations) == before and bool(image.shapes or image.faults)
    return {"images": records, "annotations": annotations}


def describe_faults(skips: Skips, source: Path, list_path: Path, hint: str = "") -> str:
    """All faults in words; where these do not name all of them, `list_path` is written, a line for each."""
    text = describe_entries(skips.entries, source, hint)
    if max(Counter(entry["reason"] for entry in skips.entries).values()) > SHOWN:
        with atomic_write(list_path) as file:
            for entry in skips.entries:
                line = f"{entry['reason']}: {entry['file']}: {entry['message']}\n"
                file.write(line.encode("utf-8", "backslashreplace"))
        text += f"\n  all of them: {list_path}"
    return text


def refuse_faults(skips: Skips, source: Path, list_path: Path, result: Converted) -> None:
    """End the conversion where there are faults that are not left out, or where no image is left.

    Raises:
        UserError: counts the faults by reason and shows the first of each.
    """
    if skips.entries and not skips.skip:
        hint = "; --on-error skip leaves them out"
        raise UserError(f"{source}: {describe_faults(skips, source, list_path, hint)}")
    if not any(coco["images"] for coco in result.coco.values()):
        text = f": {describe_faults(skips, source, list_path)}" if skips.entries else ""
        raise UserError(f"{source}: no image to convert{text}")
