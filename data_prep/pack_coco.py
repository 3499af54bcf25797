"""Packs a COCO data set into a few HDF5 shards: `python data_prep/pack_coco.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import data_prep  # noqa: F401  first, for Ctrl-C while the others are imported

# isort: split
import argparse
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, cast

from tqdm import tqdm

from data_prep.coco_source import paused_collector, places, read_source
from data_prep.image_faults import describe_fault, faulty, refuse_images
from data_prep.image_files import DEFAULT_MEGAPIXELS, ImageRules
from data_prep.image_names import find_images
from data_prep.image_sizes import fill_sizes
from data_prep.pack_plan import FAULTS_NAME, Workshop, split_into_shards
from data_prep.pack_summary import make_manifest, print_summary
from data_prep.ranks import join_world, ranks_launch
from data_prep.shard_writer import ShardTask
from data_prep.skips import Skips, describe_entries
from data_prep.workers import WorkerContext, prepare_worker, run_tasks, terminate_workers
from megdet_hpc import __version__
from megdet_hpc.data.shard_format import FORMAT_VERSION, MANIFEST_NAME, ORIENTATIONS
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launch import note_launched, speaks_for_all
from megdet_hpc.parallel.launchers import Launch
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

COCO_SPLITS = ("train", "val")
EPILOG = """
Without --annotations, --images and --output both splits of COCO 2017 are packed: from coco/annotations,
coco/train2017 and coco/val2017 to packed/train and packed/val. A finished pack is left as it is.

example, one split with 16 processes:
  python data_prep/pack_coco.py --annotations coco/annotations/instances_train2017.json \\
      --images coco/train2017 --output packed/train --workers 16
the same over several nodes (rank 0 plans, then the next free rank writes the next shard):
  mpirun -np 64 python data_prep/pack_coco.py --annotations ... --images ... --output packed/train

OUTPUT appears when the pack is finished. Until then its files are in OUTPUT.partial. The same command continues an
interrupted pack. The format is described in docs/data_format.md.
"""


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(
        prog=called_as("data_prep.pack_coco"),
        description="Check a COCO data set and pack it, without loss, into a few HDF5 shards.",
        epilog=as_called_here(EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--annotations", type=Path, metavar="JSON", help="COCO instances file")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the JPEG or PNG files")
    parser.add_argument("--output", type=Path, metavar="DIR", help="new folder for the pack")
    parser.add_argument(
        "--shard-mib",
        type=float,
        default=256.0,
        metavar="MIB",
        help="MiB of images per shard (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="worker processes; under mpirun or srun the ranks are the workers (default: %(default)s)",
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="bad images or annotations: end with a list of them, or leave them out and list them in the manifest "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--number-images",
        action="store_true",
        help="give the images new ids, 1, 2, ... in the file's order, for files whose ids are no 64-bit integers but, "
        "for example, names; the old id is kept as source_id",
    )
    parser.add_argument(
        "--orientation",
        choices=ORIENTATIONS,
        default=ORIENTATIONS[0],
        help="pixels to which sizes and boxes of the annotations refer: stored, as in COCO, or turned upright by the "
        "EXIF orientation, as most labelling tools show them. The pack keeps this, so that training turns the "
        "pictures too (default: %(default)s)",
    )
    parser.add_argument(
        "--max-megapixels",
        type=float,
        default=DEFAULT_MEGAPIXELS,
        metavar="M",
        help="largest width x height of an image, in millions of pixels (default: %(default)g)",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="also decode every image. That takes far longer and finds files that the decoder refuses. Without it "
        "only header, size and end are checked",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished pack when the new one is complete")
    return parser


def _pack_shards(
    tasks: Iterator[ShardTask], num_images: int, skips: Skips, executor: Executor | None, workers: int, join: bool
) -> list[dict[str, Any]]:
    """Run all tasks under a progress bar. Returns the reports of the shards written, in order.

    If bad images are not left out, `skips` lists them and their shards are not written.
    """
    reports = []
    seconds = 0.1 if sys.stderr.isatty() else 30.0  # between two states of the bar; a log file needs few
    with tqdm(total=num_images, unit="image", desc="packing", mininterval=seconds) as progress:
        for task, report in run_tasks(tasks, executor, workers, join):
            progress.update(len(task.images))
            if report["shard"] is not None:
                reports.append(report)
                continue
            if not faulty(skips) and progress.n < num_images:
                fault = describe_fault(report["skipped"][0], task.image_folder)
                progress.write(f"packing: {fault}; goes on, to find all that are bad", file=sys.stderr)
            skips.entries += report["skipped"]
    return sorted(reports, key=lambda report: str(report["shard"]["file"]))


def pack(arguments: argparse.Namespace, executor: Executor | None, workers: int, join: bool) -> None:
    """Check, plan and pack.

    Args:
        arguments: the command line's arguments.
        executor: pool that runs `pack_shard`; None: pack in this process.
        workers: number of tasks that `executor` runs at a time.
        join: whether this process packs too.

    Raises:
        UserError: bad input or options.
        OSError: a file that cannot be written.
    """
    start = time.perf_counter()
    if not 0 < arguments.shard_mib <= 65536:
        raise UserError(f"--shard-mib {arguments.shard_mib:g}: accepted are more than 0 to 65536 MiB")
    if not 0 < arguments.max_megapixels <= 10**6:
        raise UserError(f"--max-megapixels {arguments.max_megapixels:g}: accepted are more than 0 to 1000000")
    rules = ImageRules(arguments.decode, arguments.orientation, int(arguments.max_megapixels * 1e6))
    with Workshop(arguments.output, arguments.overwrite) as workshop, paused_collector():
        skips = Skips(arguments.on_error == "skip")
        spool = workshop.folder.parent  # the annotations wait on the disk of the pack
        source = read_source(arguments.annotations, arguments.images, skips, arguments.number_images, spool)
        list_path = workshop.folder / FAULTS_NAME
        likely_cause = find_images(source.images, arguments.images, skips)
        if likely_cause:
            refuse_images(skips, arguments.images, list_path, likely_cause)
        images = fill_sizes(source.images, arguments.images, arguments.orientation, skips)
        if not images:
            refuse_images(skips, arguments.images, list_path)
            raise _nothing_left(arguments, skips.entries, likely_cause)
        file_bytes = [image.file_bytes for image in images]
        # without --on-error and --max-megapixels, since they do not change a shard without faults
        plan = {
            "packer": f"pack_coco {__version__}",
            "format": FORMAT_VERSION,
            "annotations_sha256": source.sha256,
            "images": str(arguments.images.resolve()),
            "shard_mib": arguments.shard_mib,
            "orientation": arguments.orientation,
            "number_images": arguments.number_images,
            "num_images": len(images),
            "first_images": split_into_shards(file_bytes, arguments.shard_mib),
        }
        first = workshop.agree(plan)["first_images"]
        planning_seconds = time.perf_counter() - start
        folders = workshop.folder, arguments.images.resolve()
        tasks = (
            ShardTask(index, *folders, source.sha256, skips.skip, rules, own, source.annotations.of(places(own)))
            for index, own in enumerate(images[begin:end] for begin, end in pairwise(first))
        )
        reports = _pack_shards(tasks, len(images), skips, executor, workers, join)
        refuse_images(skips, folders[1], list_path, "good shards are kept for another run")
        if not sum(report["count"]["images"] for report in reports):
            entries = skips.entries + [entry for report in reports for entry in report["skipped"]]
            raise _nothing_left(arguments, entries, likely_cause)
        manifest = make_manifest(source, images, arguments, reports, skips)
        workshop.finish(manifest)
    print(f"{arguments.output}:")
    print_summary(manifest, reports, time.perf_counter() - start, planning_seconds)


def _nothing_left(arguments: argparse.Namespace, entries: list[dict[str, Any]], likely_cause: str) -> UserError:
    hint = f" ({likely_cause})" if likely_cause else ""
    text = describe_entries(entries, arguments.images, hint)
    return UserError(f"{arguments.annotations}: every image was skipped, so there is nothing to pack: {text}")


def _expand(arguments: argparse.Namespace) -> list[argparse.Namespace]:
    """The sets to pack: the named set, or if none is named the unfinished splits of COCO 2017.

    Raises:
        UserError: only a part of a set is named, or there is no COCO here.
    """
    named = {name: getattr(arguments, name) for name in ("annotations", "images", "output")}
    missing = [f"--{name}" for name, value in named.items() if value is None]
    if not missing:
        return [arguments]
    if len(missing) < len(named):
        raise UserError(f"{' and '.join(missing)} missing: name annotations, images and output, or none of them")
    coco = Path("coco")
    if not coco.is_dir():
        raise UserError(
            f"{coco.resolve()}: no such folder; data_prep/fetch_coco.sh gets it, or name a set by --annotations, "
            "--images and --output"
        )
    expanded = []
    for split in COCO_SPLITS:
        output = Path("packed") / split
        if (output / MANIFEST_NAME).is_file() and not arguments.overwrite:
            print(f"{output}: packed already")
            continue
        annotations = coco / "annotations" / f"instances_{split}2017.json"
        paths = {"annotations": annotations, "images": coco / f"{split}2017", "output": output}
        expanded.append(argparse.Namespace(**{**vars(arguments), **paths}))
    return expanded


def _run(argv: Sequence[str] | None, executor: Executor | None, num_ranks: int) -> int:
    """Parse and pack in this process. Returns the exit status; an error that the user can correct is one line."""
    try:
        arguments = _parser().parse_args(argv)
        if arguments.workers < 1 or (executor is not None and arguments.workers != 1):
            accepted = "1 or more" if executor is None else "1 under a launcher, whose ranks are the workers"
            raise UserError(f"--workers {arguments.workers}: accepted are {accepted}")
        with ExitStack() as stack:
            if executor is None and arguments.workers > 1:
                executor = ProcessPoolExecutor(arguments.workers, WorkerContext(), initializer=prepare_worker)
                stack.callback(executor.shutdown, cancel_futures=True)
                stack.push(terminate_workers)
            for one in _expand(arguments):
                pack(one, executor, max(num_ranks - 1, arguments.workers), join=num_ranks > 1)
    except SystemExit as error:  # argparse: 0 after --help, 2 after a usage error
        return int(error.code or 0)
    except (UserError, OSError) as error:
        return _fail(str(error))
    except BrokenProcessPool:
        return _fail("a worker died, perhaps for want of memory")
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on")
        return 130
    return 0


def _fail(message: str) -> int:
    """Print the one line of an error; returns the exit status."""
    print(f"{called_as('data_prep.pack_coco')}: error: {as_called_here(message)}", file=sys.stderr, flush=True)
    return 1


def _run_ranks(argv: Sequence[str] | None, launch: Launch) -> int:
    """Pack on all ranks of an MPI launch: rank 0 plans and hands out, and all write shards."""
    try:
        world = join_world(launch)
    except UserError as error:
        return _fail(str(error)) if launch.rank == 0 else 1
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor(world, root=0) as executor:
        if executor is None:
            return 0
        try:
            status = _run(argv, cast(Executor, executor), launch.size)
        except BaseException:
            traceback.print_exc()
            status = 1
        if status != 0:
            sys.stderr.flush()
            world.Abort(status)  # the other ranks are in the middle of their shards
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        launch = ranks_launch("pack_coco")
    except UserError as error:
        if speaks_for_all():
            _fail(str(error))
        return error.status
    if launch is None:
        note_launched()
        return _run(argv, None, 1)
    return _run_ranks(argv, launch)


if __name__ == "__main__":
    exit_status = main()
    if exit_status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)  # after a failed write, as on a full disk, HDF5's clean-up at exit crashes
