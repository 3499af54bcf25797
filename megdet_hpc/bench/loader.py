"""`bench loader`: speed of reading, decoding and loading the same images from a pack and from other storage."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from megdet_hpc.bench.augmentation_speed import augmentation_rows
from megdet_hpc.bench.decoders import decoder_rows
from megdet_hpc.bench.loader_sources import Sources
from megdet_hpc.bench.loader_speed import COLD, IMAGES_PER_BATCH, WARM, loader_rows
from megdet_hpc.bench.read_speed import read_rows
from megdet_hpc.bench.report import environment
from megdet_hpc.config import DataConfig
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.decode import DECODER
from megdet_hpc.data.packed_coco import CRC32_BY, PackedCoco
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.runtime import Runtime

READ = "bytes only, warm cache, one process"
DECODE = "decoding alone, one thread"
LOAD = f"loader, {IMAGES_PER_BATCH} images per batch"
AUGMENT = f"loader with each augmentation, {IMAGES_PER_BATCH} images per batch"
PARTS = ("read", "decode", "load")
# Number of images on which decoders are compared.
_DECODED = 100


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of this benchmark."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="a packed set")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of images to pack first, if there is no --data"
    )
    parser.add_argument("--annotations", type=Path, metavar="JSON", help="COCO annotations of --images")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "augment"), default=list(PARTS), help="measurements")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="folder for temporary files, on the file system to measure"
    )
    parser.add_argument("--limit", type=int, default=500, help="number of images, from the beginning of the set")
    parser.add_argument("--loads", type=int, default=100, help="images in one pass of a loader")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="worker processes")
    parser.add_argument(
        "--caches", nargs="+", choices=(WARM, COLD), default=[WARM, COLD], help="state of the kernel's cache"
    )
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement")
    parser.add_argument("--short-side", type=int, default=800, help="short side after the resize, pixels")
    parser.add_argument("--max-side", type=int, default=1333, help="largest long side, pixels")


def _pack(arguments: argparse.Namespace, folder: Path) -> PackedCoco:
    """The pack to measure. It is written first if only a COCO set is named.

    Raises:
        UserError: no set is named, or it cannot be packed.
    """
    if arguments.data:
        return PackedCoco(arguments.data)
    if not (arguments.images and arguments.annotations):
        raise UserError("name a set: --data DIR, or --images DIR and --annotations JSON")
    from data_prep import pack_coco

    output = folder / "pack"
    command = ["--annotations", arguments.annotations, "--images", arguments.images, "--output", output]
    if pack_coco.main([str(word) for word in command]):
        raise UserError(f"{arguments.images} could not be packed; the packer's message is above")
    return PackedCoco(output)


def run(arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """Measure in one process and its workers.

    Raises:
        UserError: there are several ranks, an option is out of range, or there is no data.
    """
    if runtime.world.size > 1:
        raise UserError(f"bench loader measures one rank; it was started with {runtime.world.size}")
    if min(arguments.limit, arguments.repeats) < 1 or min(arguments.workers) < 0:
        raise UserError("--limit and --repeats must be 1 or more, --workers 0 or more")
    if arguments.loads < 2 * IMAGES_PER_BATCH:
        raise UserError(f"--loads {arguments.loads}: accepted are {2 * IMAGES_PER_BATCH} or more")
    if not 1 <= arguments.short_side <= arguments.max_side:
        raise UserError(f"--short-side {arguments.short_side}: accepted are 1 to --max-side {arguments.max_side}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="megdet_bench.", dir=arguments.folder) as name:
        folder = Path(name)
        pack = _pack(arguments, folder)
        count = min(len(pack), arguments.limit)
        config = DataConfig(
            short_sides=(arguments.short_side,), val_short_side=arguments.short_side, max_side=arguments.max_side
        )
        data = DetectionDataset(pack, config, training=True, seed=0)
        encoded = [bytes(pack.read_image_bytes(index)) for index in range(count)]
        parts = arguments.parts
        sources = Sources(data, encoded, folder) if set(parts) & set(PARTS) else None
        missing = [f"{module} is not installed" for module in sources.missing] if sources else []
        report: dict[str, Any] = {
            "environment": environment(torch.device("cpu")) | {"decoder": DECODER, "crc32": CRC32_BY},
            "options": {key: str(value) for key, value in vars(arguments).items() if key not in ("body", "benchmark")},
            "images": f"{count}, {sum(map(len, encoded)) / count / 1000:.0f} kB on average, "
            f"{sum(map(len, encoded)) / 1e6:.1f} MB",
        }
        if "read" in parts and sources:
            report[READ] = read_rows(pack, sources.files, folder, 3 * arguments.repeats)
        if "decode" in parts:
            report[DECODE], no_decoder = decoder_rows(encoded[:_DECODED], arguments.repeats)
            missing += no_decoder
        if "load" in parts and sources:
            report[LOAD] = loader_rows(
                sources, count, arguments.loads, arguments.workers, arguments.caches, arguments.repeats
            )
        if "augment" in parts:
            report[AUGMENT] = augmentation_rows(
                pack, config, count, arguments.loads, arguments.workers, arguments.repeats
            )
        return report | {"not measured": "; ".join(missing)}
