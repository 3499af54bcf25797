"""Writes a Pascal VOC set's boxes as COCO instances JSON: `python data_prep/voc_to_coco.py --help`.

VOC's corners are pixel indices that count from 1, and both corners belong to the box; COCO's box is x, y, width,
height in pixels from the image's top left edge. So x = xmin - 1, y = ymin - 1, width = xmax - xmin + 1 and
height = ymax - ymin + 1. Masks (SegmentationObject) and the boxes of an object's parts are not converted.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import data_prep  # noqa: F401  first, for Ctrl-C while the others are imported

# isort: split
import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from data_prep.formats.image_index import ImageFacts, read_facts, told_orientation
from data_prep.image_files import BadImageError
from data_prep.skips import Skips, count_skips, describe_entries
from data_prep.voc_layout import ImageFolder, VocLayout, find_layout
from data_prep.voc_xml import VocFile, read_voc_xml
from megdet_hpc.errors import UserError
from megdet_hpc.files import write_json
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

EPILOG = """
example:
  python data_prep/voc_to_coco.py VOC2012 --split train --output voc/instances_train.json
  python data_prep/pack_coco.py --annotations voc/instances_train.json --images VOC2012/JPEGImages --output packed/train

VOC_DIR holds Annotations/*.xml, JPEGImages/ and, for --split, ImageSets/Main/SPLIT.txt. Where it does not, the one
folder with XML files and the one with their images are looked for below it, which may be the same one; where there
are several, name them by --annotations and --images. Image ids are positions among all XML files sorted by name,
from 1, and category ids positions among all of their names sorted: so the splits of one folder agree in their
categories and share no image id. The image of an XML file is the one of its own name, else that of its <filename>.
"""


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped.

    Raises:
        UserError: not readable, without a line, or one that occurs twice.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    if not lines:
        raise UserError(f"{path}: has no line")
    if len(set(lines)) < len(lines):
        twice = next(line for index, line in enumerate(lines) if line in lines[:index])
        raise UserError(f"{path}: {twice!r} occurs twice")
    return lines


def _numbers(size: tuple[str, str]) -> tuple[float | None, float | None]:
    """Width and height as numbers, also of texts such as 64.0; None for what is none."""

    def number(said: str) -> float | None:
        try:
            return float(said)
        except ValueError:
            return None

    return number(size[0]), number(size[1])


@dataclass
class Converter:
    """Turns XML files into records, and lists what is wrong with them.

    Args:
        layout: where the files lie.
        skips: takes in bad files and objects.
        difficult: "ignore" gives difficult objects iscrowd 1, so that, as in VOC, they count neither as found
            nor as missed and are not trained on; "keep" gives them 0.
        first_pixel: 1 as in VOC itself, or 0 for sets whose corners count from 0.
        orientation: "stored" or "upright": the pixels that sizes and boxes are of; "auto" becomes the one that the
            sizes in the XML files fit, else "stored".

    Attributes:
        renamed: XML files whose `filename` is another than their own, as "a.xml: b.jpg".
        emptied: number of images whose objects were all left out.
    """

    layout: VocLayout
    skips: Skips
    difficult: str = "ignore"
    first_pixel: int = 1
    orientation: str = "auto"
    renamed: list[str] = field(default_factory=list)
    emptied: int = 0

    def __post_init__(self) -> None:
        self.images = ImageFolder(self.layout.images)
        self._facts: dict[Path, ImageFacts | BadImageError] = {}

    def convert(self, split: str | None = None, categories: Sequence[str] | None = None) -> dict[str, Any]:
        """Convert the boxes of the set.

        Args:
            split: name of a list in ImageSets/Main; None takes every annotation file.
            categories: names in the order of their ids, from 1; None: those of all annotation files, sorted.

        Returns:
            COCO instances; annotations also keep `difficult` and `truncated`.

        Raises:
            UserError: bad files or objects, all of them, where `skips` does not leave them out; no image left.
        """
        files = self.layout.xml_files()
        image_ids = {stem: index for index, stem in enumerate(files, start=1)}
        stems = list(files) if split is None else self._split(split, files)
        wanted = files if categories is None else stems  # all files decide the ids, so that splits agree
        chosen = set(stems)
        parsed = {stem: read for stem in wanted if (read := self._read(files[stem], stem in chosen))}
        names = categories or sorted({item.name for read in parsed.values() for item in read.objects})
        category_ids = {name: index for index, name in enumerate(names, start=1)}
        self._read_images({stem: parsed[stem] for stem in stems if stem in parsed})
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for stem in stems:
            if stem in parsed and (image := self._image(stem, files[stem], parsed[stem])) is not None:
                images.append({"id": image_ids[stem], **image})
                records = self._objects(files[stem], parsed[stem], category_ids)
                annotations += [
                    {"id": number, "image_id": image_ids[stem], **record}
                    for number, record in enumerate(records, start=len(annotations) + 1)
                ]
        self.skips.refuse(self.layout.annotations)
        if not images:
            text = describe_entries(self.skips.entries, self.layout.annotations)
            raise UserError(f"{self.layout.annotations}: no image to convert: {text}")
        listed = [{"id": index, "name": name, "supercategory": name} for name, index in category_ids.items()]
        return {"images": images, "annotations": annotations, "categories": listed}

    def _split(self, split: str, files: dict[str, Path]) -> list[str]:
        path = self.layout.root / "ImageSets" / "Main" / f"{split}.txt"
        stems = _lines(path)
        for stem in stems:
            if stem not in files:
                raise UserError(f"{path}: {stem!r} has no {self.layout.annotations / (stem + '.xml')}")
        return stems

    def _read(self, path: Path, counted: bool) -> VocFile | None:
        """An XML file; None where it is bad. `counted`: it is in the split, so what is wrong with it is listed."""
        try:
            return read_voc_xml(path, self.first_pixel)
        except UserError as error:
            if counted:
                self.skips.add("bad_xml", path, str(error), images=1)
            return None

    def _read_images(self, parsed: dict[str, VocFile]) -> None:
        """Read the images' headers, and decide the orientation."""
        found: dict[str, Path] = {}
        for stem, read in parsed.items():
            with suppress(UserError):  # told of with the image
                found[stem] = self.layout.images / self.images.find(stem, read.filename)
        self._facts = read_facts(list(found.values()))
        if self.orientation == "auto":
            sizes = ((_numbers(parsed[stem].size), self._facts[path]) for stem, path in found.items())
            self.orientation = told_orientation(sizes, usual="stored")

    def _image(self, stem: str, path: Path, read: VocFile) -> dict[str, Any] | None:
        """Name and size of an XML file's image; None where it is left out."""
        try:
            found = self.images.find(stem, read.filename)
            known = self._facts[self.layout.images / found]
            if isinstance(known, BadImageError):
                raise UserError(f"{found.name}: cannot be read as an image ({known.text})")
            width, height = known.size(self.orientation == "upright")
        except UserError as error:
            self.skips.add("bad_image", path, str(error), images=1, annotations=len(read.objects))
            return None
        numbers = _numbers(read.size)
        turned = numbers == (height, width)
        for key, said, number, size in zip(("width", "height"), read.size, numbers, (width, height), strict=True):
            if number not in (0, size):
                text = f"{key} is {said!r}, but {found} is {width} x {height} pixels"
                if turned:
                    text += ", as it would be turned by 90 degrees; see --orientation"
                self.skips.add("wrong_image_size", path, text, images=1, annotations=len(read.objects))
                return None
        if read.filename and PurePosixPath(read.filename).stem != found.stem and read.filename != found.stem:
            self.renamed.append(f"{path.name}: {read.filename}")
        return {"file_name": str(found), "width": width, "height": height}

    def _objects(self, path: Path, read: VocFile, category_ids: dict[str, int]) -> list[dict[str, Any]]:
        """The annotations of one image, without ids."""
        for fault in read.faults:
            self.skips.add("bad_object", path, fault, annotations=1)
        records = []
        for item in read.objects:
            if item.name not in category_ids:
                text = f"object[{item.index}]: {item.name!r} is not in the list of categories"
                self.skips.add("unknown_category", path, text, annotations=1)
                continue
            records.append(
                {
                    "category_id": category_ids[item.name],
                    "bbox": item.bbox,
                    "area": item.bbox[2] * item.bbox[3],
                    "iscrowd": item.difficult if self.difficult == "ignore" else 0,
                    "segmentation": [],
                    "difficult": item.difficult,
                    "truncated": item.truncated,
                }
            )
        self.emptied += not records and bool(read.objects or read.faults)
        return records


def _count_outside(coco: dict[str, Any]) -> int:
    """Boxes that leave their image."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    count = 0
    for record in coco["annotations"]:
        (x, y, width, height), (right, bottom) = record["bbox"], sizes[record["image_id"]]
        count += x < 0 or y < 0 or x + width > right or y + height > bottom
    return count


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how boxes are read, and what is done with bad files."""
    parser.add_argument(
        "--orientation",
        choices=("auto", "stored", "upright"),
        default="auto",
        help="pixels that the labels of photographs turned by EXIF are of: as stored, or as seen (default: what the "
        "sizes in the labels fit; else upright, and stored for published sets)",
    )
    parser.add_argument(
        "--difficult",
        choices=("ignore", "keep"),
        default="ignore",
        help="objects marked difficult: iscrowd 1, neither trained on nor counted, or as all others (default: ignore)",
    )
    parser.add_argument(
        "--first-pixel", type=int, choices=(0, 1), default=1, help="where the set's corners count from (default: 1)"
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="bad files and objects: stop, or leave them out and count them (default: %(default)s)",
    )


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(
        prog=called_as("data_prep.voc_to_coco"),
        description="Convert the boxes of a Pascal VOC set to COCO instances JSON, for pack_coco.py.",
        epilog=as_called_here(EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="VOC_DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="JSON", help="new file")
    parser.add_argument(
        "--annotations", type=Path, metavar="DIR", help="folder of the XML files (default: Annotations, or found)"
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the images (default: JPEGImages, or found)"
    )
    parser.add_argument("--split", help="list in ImageSets/Main, such as train (default: every annotation file)")
    parser.add_argument("--categories", type=Path, metavar="FILE", help="names in the order of their ids, one per line")
    add_reading_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    return parser


def _print_summary(output: Path, coco: dict[str, Any], converter: Converter, all_files: bool) -> None:
    """Print what was converted and what to look at."""
    crowd = sum(record["iscrowd"] for record in coco["annotations"])
    print(
        f"{output}: {len(coco['images'])} images, {len(coco['annotations'])} boxes ({crowd} difficult, "
        f"ignored), {len(coco['categories'])} categories"
    )
    turned = " --orientation upright" if converter.orientation == "upright" else ""
    print(f"XML files in {converter.layout.annotations}, for pack_coco.py: --images {converter.layout.images}{turned}")
    if outside := _count_outside(coco):
        print(f"{outside} boxes leave their image and are kept; does the set count from 0? See --first-pixel")
    if entries := converter.skips.entries:
        images, objects = (sum(reasons.values()) for reasons in count_skips(entries).values())
        what = describe_entries(entries, converter.layout.annotations)
        print(f"left out: {images} images and {objects} objects: {what}")
    if converter.emptied:
        print(f"{converter.emptied} images are kept though all of their objects were left out: background for training")
    if converter.renamed:
        first = f"the first {converter.renamed[0]}"
        print(f"{len(converter.renamed)} XML files have another filename than their own ({first}): theirs is ignored")
    if all_files and (more := len(converter.images.files) - len({image["file_name"] for image in coco["images"]})):
        print(f"{more} other images in the folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        names = None if arguments.categories is None else _lines(arguments.categories)
        _run(arguments, arguments.directory, arguments.output, names)
    except (UserError, OSError) as error:
        print(f"{called_as('data_prep.voc_to_coco')}: error: {as_called_here(str(error))}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace, directory: Path, output: Path, names: Sequence[str] | None) -> None:
    """Convert as the command line says, and print the summary; raises UserError for bad input."""
    if output.exists() and not arguments.overwrite:
        raise UserError(f"{output}: exists already; give another name or --overwrite")
    layout = find_layout(directory, arguments.annotations, arguments.images)
    skips = Skips(arguments.on_error == "skip")
    converter = Converter(layout, skips, arguments.difficult, arguments.first_pixel, arguments.orientation)
    coco = converter.convert(arguments.split, names)
    write_json(output, coco)
    _print_summary(output, coco, converter, arguments.split is None)


def run_voc(arguments: argparse.Namespace, directory: Path, categories: Sequence[dict[str, Any]] | None) -> None:
    """Convert a set for `convert.py`, whose options have the same names.

    Args:
        arguments: the command line.
        directory: the set's folder.
        categories: records whose ids are 1, 2, ...; None: names of all annotation files, sorted.

    Raises:
        UserError: bad input.
    """
    if categories is not None and [record["id"] for record in categories] != list(range(1, len(categories) + 1)):
        raise UserError(f"{arguments.categories}: ids of categories for voc must be 1, 2, ... in this order")
    if arguments.unlabelled is not None:
        raise UserError("--unlabelled does not work for voc: an image without an XML file is left out")
    if "{split}" in arguments.output:
        raise UserError("--output: {split} does not work for voc; give --split NAME, a part at a time")
    if not directory.is_dir():
        directory = directory.parent
    names = None if categories is None else [record["name"] for record in categories]
    _run(arguments, directory, Path(arguments.output), names)


if __name__ == "__main__":
    sys.exit(main())
