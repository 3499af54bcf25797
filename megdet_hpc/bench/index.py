"""`bench index`: sets of growing size, generated, packed, verified, opened by the ranks of a node, planned and scored.

Times are processor seconds, user and system, of all threads of one process, so other jobs on the machine disturb them
little. Each part runs in a process of its own, whose largest resident memory is reported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megdet_hpc.bench.report import environment
from megdet_hpc.bench.set_parts import NUM_FILES, write_source
from megdet_hpc.data.pack_index import INDEX_NAME
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.runtime import Runtime

_PARTS = ("packing", "verifying", "planning, uniform", "planning, shard_local", "scoring")


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of this benchmark."""
    parser.add_argument("--images", type=int, nargs="+", default=[118_287, 400_000, 1_000_000, 1_740_000], metavar="N")
    parser.add_argument("--boxes", type=float, default=14.7, help="boxes an image, on average")
    parser.add_argument("--detections", type=int, default=10, help="detections an image, for scoring")
    parser.add_argument("--images-per-shard", type=int, default=4350, help="images of a shard; a pack has at most 512")
    parser.add_argument("--ranks", type=int, default=8, help="processes that open the pack at the same time")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder for the sets, with room for 6 kB an image")


def run(arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """Measure in one process and those that it starts.

    Raises:
        UserError: there are several ranks, an option is out of range, or a set could not be packed.
    """
    if runtime.world.size > 1:
        raise UserError(f"bench index measures one node from one rank; it was started with {runtime.world.size}")
    numbers = min(*arguments.images, arguments.detections, arguments.images_per_shard, arguments.ranks)
    if numbers < 1 or not 0 < arguments.boxes <= 1000:
        raise UserError(
            "--images, --detections, --images-per-shard and --ranks must be 1 or more, --boxes above 0 to 1000"
        )
    sizes, memory, opened = [], [], []
    for num_images in arguments.images:
        with tempfile.TemporaryDirectory(prefix="megdet_bench.", dir=arguments.folder) as name:
            row, peaks, first = _measure(Path(name), num_images, arguments)
        sizes.append(row)
        memory.append(peaks)
        opened.append(first)
    report: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "options": {key: str(value) for key, value in vars(arguments).items() if key not in ("body", "benchmark")},
        "processor time, microseconds an image": sizes,
        "largest memory of a process, MiB": memory,
        f"opening by {arguments.ranks} ranks of a node": opened,
    }
    if len(sizes) > 1:
        report["slope: exponent of the number of images, 1 is linear"] = [{k: _slope(sizes, k) for k in _PARTS}]
    return report


def _slope(rows: list[dict[str, Any]], part: str) -> float:
    """The exponent e of time = c images^e that fits best."""
    images = np.array([row["images"] for row in rows], np.float64)
    times = images * np.array([row[part] for row in rows])
    return float(np.polyfit(np.log(images), np.log(times), 1)[0])


def _measure(
    folder: Path, num_images: int, arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """One size: processor time of each part an image, memory of each part, and how a node's ranks open the pack."""
    num_boxes = round(num_images * arguments.boxes)
    source, pack = folder / "source", folder / "pack"
    write_source(source, num_images, num_boxes)
    size = sum(path.stat().st_size for path in (source / "images").iterdir()) / NUM_FILES * arguments.images_per_shard
    parts: dict[str, tuple[Any, ...]] = {
        "packing": ("packing", source, pack, size / 2**20),
        "verifying": ("verifying", pack),
        "planning, uniform": ("planning", pack, False),
        "planning, shard_local": ("planning", pack, True),
        "scoring": ("scoring", pack, arguments.detections),
    }
    row: dict[str, Any] = {"images": num_images, "boxes": num_boxes}
    peaks = dict(row)
    for name in _PARTS:
        result = _alone(*parts[name])
        row[name], peaks[name] = result["processor"] / num_images * 1e6, result["mib"]
        if name == "packing":
            shutil.rmtree(source)
    held = _open_together(pack, arguments.ranks)
    opened = {
        "images": num_images,
        "boxes": num_boxes,
        "index, MiB": (pack / INDEX_NAME).stat().st_size / 2**20,
        "slowest rank, s": max(wall for wall, _, _ in held),
        "processor time of a rank, s": statistics.median(own for _, own, _ in held),
        "index in memory, all ranks, MiB": sum(mib for _, _, mib in held),
        "opening to first batch, s": _alone("first batch", pack)["wall"],
    }
    return row, peaks, opened


def _start(name: str, *given: Any) -> subprocess.Popen[str]:
    words = [str(value) if isinstance(value, Path) else value for value in given]
    command = [sys.executable, "-m", "megdet_hpc.bench.set_parts", name, json.dumps(words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _alone(name: str, *given: Any) -> dict[str, float]:
    """Run a part in a process of its own.

    Raises:
        UserError: the part failed.
    """
    process = _start(name, *given)
    output, _ = process.communicate()
    if process.returncode:
        raise UserError(f"bench index: {name} failed; its message is above")
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def _open_together(pack: Path, num_ranks: int) -> list[tuple[float, float, float]]:
    """Open a pack in several processes at the same time: wall and processor seconds of each, and its share in MiB."""
    ranks = [_start("open", pack) for _ in range(num_ranks)]

    def tell() -> None:
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("go\n")
            rank.stdin.flush()

    def hear() -> list[list[str]]:
        lines = [rank.stdout.readline().split() for rank in ranks if rank.stdout]
        if not all(lines):
            raise UserError("bench index: a rank could not open the pack; its message is above")
        return lines

    hear()
    tell()
    times = hear()
    hear()
    tell()
    weights = hear()
    for rank in ranks:
        rank.communicate()
    return [(float(wall), float(own), float(mib)) for (wall, own), (mib,) in zip(times, weights, strict=True)]
