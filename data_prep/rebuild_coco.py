"""Writes the COCO annotation file back out of a packed folder: `python data_prep/rebuild_coco.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import data_prep  # noqa: F401  first, for Ctrl-C while the others are imported

# isort: split
import json
from collections.abc import Sequence

from megdet_hpc.data.coco_json import rebuild_coco
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write
from megdet_hpc.programs import ProgramParser, as_called_here, called_as


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = ProgramParser(
        prog=called_as("data_prep.rebuild_coco"),
        description="Write the COCO annotation file of a packed folder. It equals the original, without "
        "what packing left out.",
        epilog=as_called_here("example: python data_prep/rebuild_coco.py packed/val --output instances_val.json"),
    )
    parser.add_argument("directory", type=Path, help="folder that pack_coco.py wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="JSON", help="file to write or replace")
    parser.add_argument("--without-segmentations", action="store_true", help="leave polygons and RLE out")
    arguments = parser.parse_args(argv)
    try:
        coco = rebuild_coco(PackedCoco(arguments.directory), not arguments.without_segmentations)
        with atomic_write(arguments.output) as file:
            file.write(json.dumps(coco).encode("ascii"))
    except (UserError, OSError) as error:
        print(f"{called_as('data_prep.rebuild_coco')}: error: {as_called_here(str(error))}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {len(coco['images'])} images, {len(coco['annotations'])} annotations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
