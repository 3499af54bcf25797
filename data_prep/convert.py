"""Labels of other tools as COCO instances JSON, and a pack as YOLO: `python data_prep/convert.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import data_prep  # noqa: F401  first, for Ctrl-C while the others are imported

# isort: split
import argparse
import json
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from data_prep.formats import archives
from data_prep.formats.coco_records import Converted, Rules, convert, describe_faults, refuse_faults
from data_prep.formats.cvat import read_cvat
from data_prep.formats.detect import detect
from data_prep.formats.label_studio import read_label_studio
from data_prep.formats.labelme import read_labelme
from data_prep.formats.labels import LabelSet, Wanted
from data_prep.formats.tables import CROWDHUMAN_BOXES, read_crowdhuman, read_dota, read_open_images
from data_prep.formats.text_files import read_json, read_text
from data_prep.formats.to_yolo import parts_of, write_yolo
from data_prep.formats.yolo import read_yolo
from data_prep.record_faults import is_name
from data_prep.skips import Skips, count_skips, is_id
from data_prep.voc_to_coco import add_reading_options, run_voc
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

READERS: dict[str, Callable[[Wanted], LabelSet]] = {
    "yolo": read_yolo,
    "labelme": read_labelme,
    "cvat": read_cvat,
    "labelstudio": read_label_studio,
    "openimages": read_open_images,
    "crowdhuman": read_crowdhuman,
    "dota": read_dota,
}
STORED = ("openimages", "crowdhuman", "dota")
"""Formats of published sets, whose coordinates are of the stored pixels; labelling tools show photographs upright."""
UNLABELLED = "yolo"
"""The format in which an image without a label file is one without objects."""
PART = "{split}"

EPILOG = """
examples:
  python data_prep/convert.py yolo_set --output 'coco/instances_{split}.json'
  python data_prep/convert.py --from voc VOC2012 --split train --output voc/instances_train.json
  python data_prep/convert.py --to yolo packed/train packed/val --output yolo_set
  python data_prep/pack_coco.py --annotations coco/instances_train.json --images yolo_set/images/train --output \
packed/train

Image ids are positions among all images of SOURCE sorted by path, and category ids positions among its names in their
order, or sorted where there is none: so the parts of one source agree. Separate sources agree by --categories with the
JSON file of the first. data_prep/README.md has a table of the formats and of what is done with each oddity.
"""


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(
        prog=called_as("data_prep.convert"),
        description="Convert labels of other tools to COCO instances JSON, for pack_coco.py.",
        epilog=as_called_here(EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        type=Path,
        nargs="+",
        metavar="SOURCE",
        help="folder or file of the labels; one or more packs for --to",
    )
    parser.add_argument("--from", dest="format", choices=("voc", *READERS), help="format (default: told by the files)")
    parser.add_argument("--to", choices=("yolo",), help="convert packs to this format, instead of labels to COCO")
    parser.add_argument(
        "--output",
        required=True,
        metavar="JSON",
        help=f"new file, {PART} in its name stands for each part of the set; a new folder for --to",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: the source's own)")
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="DIR",
        help="folder of the label files, where they lie apart (voc, yolo, labelme, dota)",
    )
    parser.add_argument("--split", help="part of the set, such as train (default: all, see --output)")
    parser.add_argument(
        "--categories",
        type=Path,
        metavar="FILE",
        help="names in the order of their ids, one per line; or a COCO JSON, whose categories are taken",
    )
    parser.add_argument(
        "--class-names", type=Path, metavar="CSV", help="Open Images' class descriptions (default: beside the boxes)"
    )
    parser.add_argument(
        "--box", choices=tuple(CROWDHUMAN_BOXES), default="full", help="CrowdHuman's box to take (default: full)"
    )
    parser.add_argument(
        "--unpack", type=Path, metavar="DIR", help="folder for what a ZIP file holds, new or filled by an earlier run"
    )
    parser.add_argument(
        "--unlabelled",
        choices=("keep", "skip"),
        help="images without labels: background, or left out (default: keep for yolo, skip for others)",
    )
    parser.add_argument("--boxes-only", action="store_true", help="--to yolo: boxes also where all have outlines")
    add_reading_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace output files")
    return parser


def _is_category(record: Any) -> bool:
    return isinstance(record, dict) and is_name(record.get("name")) and is_id(record.get("id"))


def read_categories(path: Path) -> list[dict[str, Any]]:
    """Category records of a COCO JSON, or of a text file with a name a line.

    Raises:
        UserError: neither, or without a name, or with one that occurs twice.
    """
    try:
        if path.suffix.lower() == ".json":
            value = read_json(path)
            records = value.get("categories") if isinstance(value, dict) else None
            if not isinstance(records, list) or not records or not all(map(_is_category, records)):
                raise UserError("no list of categories with id and name")
            return [dict(record) for record in records]
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not names:
        raise UserError(f"{path}: has no line")
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise UserError(f"{path}: {twice!r} occurs twice")
    return [{"id": place, "name": name, "supercategory": name} for place, name in enumerate(names, start=1)]


def _outputs(pattern: str, parts: Sequence[str], source: Path, overwrite: bool) -> dict[str, Path]:
    """The file of each part.

    Raises:
        UserError: several parts for one file; it is the source; it is there already, without `overwrite`.
    """
    if PART not in pattern:
        if len(parts) > 1:
            names = ", ".join(part or "(none)" for part in parts)
            text = f"{source}: has the parts {names}: take one by --split"
            raise UserError(f"{text}, or all by {PART} in --output, as in 'instances_{PART}.json'")
        outputs = {part: Path(pattern) for part in parts}
    else:
        outputs = {part: Path(pattern.replace(PART, part.replace("/", "_") or "all")) for part in parts}
    first: dict[Path, str] = {}
    for part, path in outputs.items():
        if first.setdefault(path, part) != part:
            both = f"the parts {first[path]!r} and {part!r} would both become {path}"
            raise UserError(f"--output {pattern}: {both}; take one at a time by --split")
        if path.resolve() == source.resolve():
            raise UserError(f"{path}: is the file that is converted; give another name")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists already; give another name or --overwrite")
    return outputs


def _print_part(output: Path, part: str, result: Converted) -> None:
    """Print what a part has, and how it is packed."""
    coco = result.coco[part]
    crowd = sum(record["iscrowd"] for record in coco["annotations"])
    outlines = sum(bool(record["segmentation"]) for record in coco["annotations"])
    empty = len(coco["images"]) - len({record["image_id"] for record in coco["annotations"]})
    print(
        f"{output}: {len(coco['images']):,} images ({empty:,} without objects), {len(coco['annotations']):,} objects "
        f"({crowd:,} to ignore, {outlines:,} with outlines), {len(coco['categories'])} categories"
    )
    if number := result.outside[part]:
        print(f"  {number:,} boxes leave their image and are kept; training cuts them at its edge")
    command = f"python data_prep/pack_coco.py --annotations {shlex.quote(str(output))} "
    command += f"--images {shlex.quote(str(result.folders[part]))} --output packed/{part or 'train'}"
    if number := result.turned[part]:
        seen = "as seen" if result.orientation == "upright" else "as stored"
        print(f"  {number:,} images are turned by EXIF: sizes and boxes are taken as those of the pictures {seen}")
        command += f" --orientation {result.orientation}"
    print(f"  {as_called_here(command)}")


def _print_summary(result: Converted, kept: bool) -> None:
    """Print what was changed and left out of the whole set."""
    for text, number in result.changed.items():
        if number:
            print(f"{number:,} {text}")
    if result.unlabelled:
        what = "are kept as background; --unlabelled skip leaves them out"
        print(f"{result.unlabelled:,} images without labels {what if kept else 'are left out; see --unlabelled'}")
    if result.emptied:
        print(f"{result.emptied:,} images are kept though all of their objects were left out: background for training")


def run(arguments: argparse.Namespace) -> None:
    """Convert as the command line says; prints the summary.

    Raises:
        UserError: bad input.
    """
    for name in ("source", "images", "annotations"):
        if (path := getattr(arguments, name)) is not None:
            setattr(arguments, name, Path(os.path.normpath(path)))  # so that paths below it compare as equal
    with ExitStack() as stack:
        source: Path = arguments.source
        if not source.exists():
            raise UserError(f"{source}: no such file or folder")
        if source.suffix.lower() == ".zip" and source.is_file():
            source = stack.enter_context(archives.unpacked(source, arguments.unpack, arguments.images))
        if PART not in arguments.output:
            _outputs(arguments.output, [""], source, arguments.overwrite)  # an older file is told of before the work
        kind: str = arguments.format or ""
        if not kind:
            guess = detect(source)
            kind = guess.format
            print(f"format: {kind} ({guess.by})")
        categories = None if arguments.categories is None else read_categories(arguments.categories)
        if kind == "voc":
            run_voc(arguments, source, categories)
            return
        names = None if categories is None else [record["name"] for record in categories]
        wanted = Wanted(source, arguments.images, arguments.annotations, names, arguments.box, arguments.class_names)
        for folder in filter(None, (arguments.images, arguments.annotations)):
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder")
        found = READERS[kind](wanted)
        rules = Rules(
            orientation=arguments.orientation,
            usual_orientation="stored" if kind in STORED else "upright",
            keep_unlabelled=(arguments.unlabelled or ("keep" if kind == UNLABELLED else "skip")) == "keep",
            difficult=arguments.difficult,
            categories=categories,
            split=arguments.split,
        )
        skips = Skips(arguments.on_error == "skip")
        folder = arguments.images or wanted.root
        result = convert(found, folder, rules, skips, given_folder=arguments.images is not None)
        list_path = Path(arguments.output.replace(PART, "all")).with_suffix(".faults.txt")
        refuse_faults(skips, arguments.source, list_path, result)
        outputs = _outputs(arguments.output, list(result.coco), arguments.source, arguments.overwrite)
        for part, path in outputs.items():
            with atomic_write(path) as file:
                file.write((json.dumps(result.coco[part]) + "\n").encode("ascii"))
        for note in found.notes:
            print(note)
        for part, path in outputs.items():
            _print_part(path, part, result)
        _print_summary(result, rules.keep_unlabelled)
        if skips.entries:
            images, objects = (sum(reasons.values()) for reasons in count_skips(skips.entries).values())
            what = describe_faults(skips, arguments.source, list_path)
            print(f"left out: {images:,} images and {objects:,} objects: {what}")


def run_to(arguments: argparse.Namespace) -> None:
    """Write packs in another format, and print the summary; raises UserError for bad input."""
    output = Path(arguments.output)
    packs = {part: PackedCoco(folder) for part, folder in parts_of(arguments.source, arguments.split).items()}
    summary = write_yolo(packs, output, arguments.boxes_only, arguments.difficult == "keep")
    what = "outlines" if summary.outlines else "boxes"
    for part, number in summary.images.items():
        print(f"{output / 'images' / part}: {number:,} images, {summary.objects[part]:,} objects as {what}")
    for text, number in summary.counts.items():
        if number:
            print(f"{number:,} {text}")
    print(f"{output / 'data.yaml'}: names of the classes")
    if lacking := [part for part in ("train", "val") if part not in packs]:
        print(f"it has no {lacking[0]}; Ultralytics needs train and val: give both packs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.to is not None:
            if arguments.format is not None:
                raise UserError(f"--from {arguments.format} and --to {arguments.to}: give one of them")
            run_to(arguments)
        else:
            if len(arguments.source) > 1:
                raise UserError(f"{arguments.source[1]}: one SOURCE at a time; --categories makes several agree")
            arguments.source = arguments.source[0]
            run(arguments)
    except (UserError, OSError) as error:
        print(f"{called_as('data_prep.convert')}: error: {as_called_here(str(error))}", file=sys.stderr)
        return error.status if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
