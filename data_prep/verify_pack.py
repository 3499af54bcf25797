"""Checks a packed folder against its manifest and its source: `python data_prep/verify_pack.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import data_prep  # noqa: F401  first, for Ctrl-C while the others are imported

# isort: split
import argparse
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tqdm import tqdm

from data_prep.annotation_file import load_annotations
from data_prep.findings import Findings
from data_prep.pack_check import (
    check_across_shards,
    check_index_file,
    check_manifest_and_files,
    compare_annotations,
)
from data_prep.ranks import join_world, ranks_launch
from data_prep.shard_check import ShardJob, ShardReport, check_shard
from data_prep.workers import WorkerContext, prepare_worker, terminate_workers
from megdet_hpc.data.shard_format import read_manifest, shard_format_of
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launch import note_launched, speaks_for_all
from megdet_hpc.parallel.launchers import Launch
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

EPILOG = """
checked: the manifest, every shard's size, SHA-256, attributes, index and JSON, the CRC-32 of every image and of its
segmentations, ids and source positions over the whole pack, the totals, and the index file if there is one. --decode
decodes every image in full and compares its size. --annotations compares every record with the file that was packed;
one process does this, and holds that file in memory.

All findings are listed, at most 20 of a kind. Exit status 0: nothing wrong; 1: damaged, or cannot be checked.

examples:
  python data_prep/verify_pack.py packed/train --workers 16
  mpirun -np 64 python data_prep/verify_pack.py packed/train --decode
"""


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(
        prog=called_as("data_prep.verify_pack"),
        description="Check that a packed folder is whole and holds what was packed.",
        epilog=as_called_here(EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder that pack_coco.py wrote")
    parser.add_argument("--decode", action="store_true", help="decode every image in full and compare its size")
    parser.add_argument("--annotations", type=Path, metavar="JSON", help="the annotation file that was packed")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes; under mpirun or srun the ranks share the shards instead (default: %(default)s)",
    )
    return parser


@dataclass
class Verification:
    """A pack to check, with the findings about its manifest."""

    arguments: argparse.Namespace
    manifest: dict[str, Any]
    jobs: list[ShardJob]
    found: Findings
    start: float  # seconds, time.perf_counter


def plan(arguments: argparse.Namespace, max_workers: int | None) -> Verification:
    """Read the manifest and list the shards to check. If the manifest contradicts itself, there are none.

    Args:
        arguments: the command line's arguments.
        max_workers: largest --workers accepted; None: any.

    Raises:
        UserError: the folder is no finished pack of this format and version, or an option is bad.
    """
    if arguments.workers < 1 or (max_workers is not None and arguments.workers > max_workers):
        accepted = "1 or more" if max_workers is None else "1 under a launcher, whose ranks are the workers"
        raise UserError(f"--workers {arguments.workers}: accepted are {accepted}")
    start = time.perf_counter()
    if arguments.annotations is not None and not arguments.annotations.is_file():
        raise UserError(f"{arguments.annotations}: no such file")
    manifest = read_manifest(arguments.directory)
    found = check_manifest_and_files(arguments.directory, manifest)
    jobs = []
    if "manifest" not in found.counts:
        categories = tuple(category["id"] for category in manifest["coco"]["categories"])
        source, shard_format = manifest["source"]["sha256"], shard_format_of(manifest)
        upright = manifest.get("orientation") == "upright"
        jobs = [
            ShardJob(k, arguments.directory, entry, source, categories, arguments.decode, upright, shard_format)
            for k, entry in enumerate(manifest["shards"])
        ]
    return Verification(arguments, manifest, jobs, found, start)


def conclude(verification: Verification, reports: list[ShardReport]) -> int:
    """Compare the shards with each other and the source, print everything, return the exit status.

    Raises:
        UserError: the original annotation file cannot be read.
    """
    seconds = time.perf_counter() - verification.start
    manifest, found, arguments = verification.manifest, verification.found, verification.arguments
    reports.sort(key=lambda report: report.index)
    for report in reports:
        found.merge(report.findings)
    if reports:
        found.merge(check_across_shards(manifest, reports))
        if arguments.annotations is not None:
            original = load_annotations(arguments.annotations)[0]
            found.merge(compare_annotations(arguments.directory, manifest, reports, original))
    if reports and not found:
        found.merge(check_index_file(arguments.directory, manifest))
    if found:
        for line in found.lines():
            print(f"verify_pack: {line}", file=sys.stderr)
        number = sum(found.counts.values())
        _fail(f"{arguments.directory}: {number} findings; copy or pack it again")
        return 1
    totals, size = manifest["totals"], sum(report.bytes_read for report in reports)
    done = ", decoded" * arguments.decode + ", equal to the original" * (arguments.annotations is not None)
    print(
        f"verified: {totals['images']} images, {totals['annotations']} annotations, {len(reports)} shards{done}, "
        f"{size / 1e6:.0f} MB, {size / 1e6 / seconds:.0f} MB/s"
    )
    return 0


def _with_progress(reports: Iterable[ShardReport], total: int, label: str) -> list[ShardReport]:
    seconds = 0.1 if sys.stderr.isatty() else 30.0  # between two states of the bar; a log file needs few
    return list(tqdm(reports, total=total, unit="shard", desc=label, mininterval=seconds, leave=False))


def _run_here(argv: Sequence[str] | None) -> int:
    """Check with this process and its workers."""
    verification = plan(_parser().parse_args(argv), None)
    jobs, workers = verification.jobs, min(verification.arguments.workers, len(verification.jobs))
    with ExitStack() as stack:
        reports: Iterable[ShardReport] = map(check_shard, jobs)
        if workers > 1:
            executor = ProcessPoolExecutor(workers, WorkerContext(), initializer=prepare_worker)
            stack.callback(executor.shutdown, cancel_futures=True)
            stack.push(terminate_workers)
            reports = executor.map(check_shard, jobs)
        return conclude(verification, _with_progress(reports, len(jobs), "verifying"))


def _run_ranks(argv: Sequence[str] | None, world: Any) -> int:
    """Check on all ranks. Every rank calls this and checks its share of the shards."""
    verification, status = None, 0
    if world.Get_rank() == 0:
        try:
            verification = plan(_parser().parse_args(argv), 1)
        except SystemExit as error:  # argparse: 0 after --help, 2 after a usage error
            status = int(error.code or 0)
        except (UserError, OSError) as error:
            status = _fail(str(error))
    # Collective "verify_pack.jobs": all ranks, blocks; None: rank 0 has printed why there is nothing to do.
    jobs: list[ShardJob] | None = world.bcast(verification and verification.jobs, root=0)
    if jobs is None:
        return status
    share = jobs[world.Get_rank() :: world.Get_size()]
    if world.Get_rank() == 0:
        reports = _with_progress(map(check_shard, share), len(share), "verifying, rank 0's share")
    else:
        reports = list(map(check_shard, share))
    # Collective "verify_pack.reports": all ranks, blocks; check_shard raises nothing for a damaged shard.
    gathered = world.gather(reports, root=0)
    if verification is None:
        return 0
    try:
        return conclude(verification, list(chain.from_iterable(gathered)))
    except (UserError, OSError) as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    """Print the one line of an error; returns the exit status."""
    print(f"{called_as('data_prep.verify_pack')}: error: {as_called_here(message)}", file=sys.stderr, flush=True)
    return 1


def _join_and_run(argv: Sequence[str] | None, launch: Launch) -> int:
    """Run on the ranks of a launch. An unexpected error on one rank ends all."""
    try:
        world = join_world(launch)
    except UserError as error:
        return _fail(str(error)) if launch.rank == 0 else 1
    try:
        return _run_ranks(argv, world)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        world.Abort(1)  # the others wait in a collective
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        launch = ranks_launch("verify_pack")
    except UserError as error:
        if speaks_for_all():
            _fail(str(error))
        return error.status
    if launch is not None:
        return _join_and_run(argv, launch)
    note_launched()
    try:
        return _run_here(argv)
    except (UserError, OSError) as error:
        return _fail(str(error))
    except BrokenProcessPool:
        return _fail("a worker died, perhaps for want of memory or by damage that crashes HDF5; try --workers 1")
    except KeyboardInterrupt:
        _fail("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
