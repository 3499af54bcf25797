"""Copies a packed folder to a node's own disk and checks it: `python data_prep/stage_pack.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import data_prep  # noqa: F401  first, for Ctrl-C while the others are imported

# isort: split
import argparse
import fcntl
import hashlib
import os
import shutil
import socket
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from megdet_hpc.data.pack_checks import check_manifest
from megdet_hpc.data.pack_index import INDEX_NAME, write_index
from megdet_hpc.data.shard_format import MANIFEST_NAME, PackError, read_manifest
from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write, publish_file, sync_folder
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

BLOCK_BYTES = 4 * 2**20
GIB = 2**30
EPILOG = """
In a job script, before training (one process a node is enough; the ranks of a node may also all call it):
  DATA=$(srun --ntasks-per-node=1 python data_prep/stage_pack.py packed/train "$TMPDIR/train" | tail -n 1)

The first caller on a node copies, and the others wait for it. DIR appears when it is complete. Until then the copy is
in DIR.partial; if it is killed, the same command finishes it. A DIR with the same pack is kept, and a DIR with anything
else is refused. The path is printed on standard output, everything else on standard error.
"""


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(
        prog=called_as("data_prep.stage_pack"),
        description="Copy a pack to node-local disk, once per node, comparing every shard with its SHA-256.",
        epilog=as_called_here(EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder that pack_coco.py wrote")
    parser.add_argument("directory", type=Path, metavar="DIR", help="new folder on the node's own disk")
    parser.add_argument(
        "--threads", type=int, default=4, metavar="N", help="shards copied at a time (default: %(default)s)"
    )
    return parser


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock file beside `target`. The kernel releases it when its holder ends or is killed.

    Raises:
        UserError: the folder cannot be written, or its file system has no locks.
    """
    path = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror})") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"stage_pack: {target}: waiting for another process that stages it", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            text = f"{path}: its file system has no locks ({error.strerror}); give a folder on the node's own disk"
            raise UserError(text) from error
        yield
    finally:
        os.close(descriptor)


def _blocks(path: Path) -> Iterator[bytes]:
    """A shard's bytes in blocks.

    Raises:
        PackError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block
    except OSError as error:
        raise PackError(f"{path}: cannot be read ({error.strerror})") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _is_right(path: Path, shard: dict[str, Any]) -> bool:
    """Whether a file is the shard that the manifest describes."""
    return path.is_file() and path.stat().st_size == shard["bytes"] and _sha256(path) == shard["sha256"]


def _holds(target: Path, manifest_bytes: bytes, manifest: dict[str, Any]) -> bool:
    """Whether `target` holds this pack already; False if there is nothing.

    Raises:
        UserError: it holds something else, or a shard of another size.
    """
    if not target.exists():
        return False
    if not target.is_dir():
        raise UserError(f"{target}: is a file, expected a folder or nothing")
    if os.path.ismount(target):
        raise UserError(f"{target}: is a mount point, which cannot be renamed; give a folder inside it")
    if not any(target.iterdir()):
        return False
    path = target / MANIFEST_NAME
    if not path.is_file() or path.read_bytes() != manifest_bytes:
        what = "another pack" if path.is_file() else "files that are no pack"
        raise UserError(f"{target}: holds {what}; remove it or give another folder")
    for shard in manifest["shards"]:
        path = target / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise PackError(f"{path}: missing or of another size than {shard['bytes']} bytes; remove {target}")
    return True


def _copy_shard(source: Path, target: Path, shard: dict[str, Any]) -> None:
    """Copy one shard, and compare the bytes read with the manifest.

    Raises:
        PackError: the source is missing, of another size or of another SHA-256.
        UserError: the copy cannot be written.
    """
    temporary = target.with_name(target.name + ".tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with open(temporary, "wb", buffering=0) as file:
            for block in _blocks(source):
                digest.update(block)
                size += len(block)
                rest = memoryview(block)
                while rest:
                    rest = rest[file.write(rest) :]
        if size != shard["bytes"]:
            raise PackError(f"{source}: {size} bytes, manifest.json says {shard['bytes']}: the shard is damaged")
        if digest.hexdigest() != shard["sha256"]:
            raise PackError(
                f"{source}: SHA-256 is {digest.hexdigest()}, manifest.json says {shard['sha256']}: the shard is "
                "damaged; verify_pack.py names the image"
            )
        publish_file(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{target}: cannot be written ({error.strerror})") from error
        raise


def rotated(shards: list[dict[str, Any]], host: str) -> list[dict[str, Any]]:
    """The shards in an order whose start depends on the host, so that nodes read different files first."""
    first = zlib.crc32(host.encode()) % len(shards)
    return shards[first:] + shards[:first]


def _open_partial(partial: Path, names: set[str]) -> None:
    """Make the folder of an unfinished copy, and remove unfinished files from it.

    Raises:
        UserError: it holds files that no copy makes.
    """
    partial.mkdir(exist_ok=True)
    for path in sorted(partial.iterdir()):
        if path.name in names:
            continue
        ours = path.match("*.tmp") or path.match("shard-*.h5") or path.name == INDEX_NAME
        if not path.is_file() or not ours:
            raise UserError(
                f"{partial}: holds {path.name}, which is no part of a copy; remove it or give another folder"
            )
        path.unlink()


def stage(source: Path, target: Path, threads: int = 4) -> str:
    """Copy a pack, unless it is copied already. Any number of processes of a node may call it at the same time.

    Args:
        source: a finished pack.
        target: new folder, on a disk of this node.
        threads: shards copied at a time.

    Returns:
        What was done, in words.

    Raises:
        UserError: `target` holds something else, lacks space or cannot be written.
        PackError: the source is damaged. Finished shards stay in TARGET.partial for the next call.
    """
    source, target = source.resolve(), target.resolve()
    manifest = read_manifest(source)
    check_manifest(source, manifest)
    if target == source or source in target.parents or target in source.parents:
        raise UserError(f"{target}: is the source or inside it, expected a folder elsewhere")
    manifest_bytes = (source / MANIFEST_NAME).read_bytes()
    shards = rotated(manifest["shards"], socket.gethostname())
    with _locked(target):
        if _holds(target, manifest_bytes, manifest):
            return f"{len(shards)} shards were there already"
        partial = target.with_name(target.name + ".partial")
        _open_partial(partial, {shard["file"] for shard in shards})
        with ThreadPoolExecutor(threads) as pool:
            right = list(pool.map(lambda shard: _is_right(partial / shard["file"], shard), shards))
        missing = [shard for shard, is_right in zip(shards, right, strict=True) if not is_right]
        for shard in missing:  # before the space is measured
            (partial / shard["file"]).unlink(missing_ok=True)
        index = source / INDEX_NAME  # the copy's own has as many bytes
        needed = sum(shard["bytes"] for shard in missing) + len(manifest_bytes)
        needed += index.stat().st_size if index.is_file() else 0
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise UserError(f"{partial}: {needed / GIB:.3f} GiB are needed, {free / GIB:.3f} GiB are free")
        _copy_all(source, partial, missing, threads)
        with atomic_write(partial / MANIFEST_NAME) as file:
            file.write(manifest_bytes)
        write_index(partial, manifest)  # from the shards, whose bytes are the right ones
        os.rename(partial, target)  # takes the place of an empty folder
        sync_folder(target.parent)
        return f"{len(missing)} shards copied, {len(shards) - len(missing)} kept from an earlier copy"


def _copy_all(source: Path, partial: Path, shards: list[dict[str, Any]], threads: int) -> None:
    """Copy shards, several at a time. After the first error no other copy begins."""
    with ThreadPoolExecutor(threads) as pool:
        copies = [pool.submit(_copy_shard, source / s["file"], partial / s["file"], s) for s in shards]
        try:
            wait(copies, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for copy in copies:
            if not copy.cancelled():
                copy.result()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        if not 1 <= arguments.threads <= 64:
            raise UserError(f"--threads {arguments.threads}: accepted are 1 to 64")
        done = stage(arguments.source, arguments.directory, arguments.threads)
    except (UserError, OSError) as error:
        print(f"{called_as('data_prep.stage_pack')}: error: {as_called_here(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stage_pack: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    print(f"stage_pack: {done}", file=sys.stderr, flush=True)
    print(arguments.directory.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
