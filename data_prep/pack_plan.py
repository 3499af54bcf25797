"""The split of images into shards, and the folder in which a pack is built."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megdet_hpc.data.pack_index import INDEX_NAME, write_index
from megdet_hpc.data.shard_format import MANIFEST_NAME, MAX_SHARDS
from megdet_hpc.errors import UserError
from megdet_hpc.files import sync_folder, write_json

MIB = 2**20
PLAN_NAME = "resume/plan.json"
FAULTS_NAME = "resume/faults.txt"


def split_into_shards(file_bytes: Sequence[int], shard_mib: float) -> list[int]:
    """Cut the images into contiguous runs of about equal bytes, each at most about `shard_mib`.

    Args:
        file_bytes: size of each image file.
        shard_mib: MiB of images per shard.

    Returns:
        Index of each shard's first image, followed by the number of images.

    Raises:
        UserError: more than `MAX_SHARDS` shards.
    """
    end = np.cumsum(file_bytes, dtype=np.int64)
    total = int(end[-1])
    num_shards = max(1, -(-total // max(1, int(shard_mib * MIB))))
    if min(num_shards, len(file_bytes)) > MAX_SHARDS:
        least = -(-total // (MAX_SHARDS * MIB))
        raise UserError(
            f"--shard-mib {shard_mib:g} makes {num_shards} shards of {total / MIB:.0f} MiB of images, "
            f"at most {MAX_SHARDS} are accepted; use --shard-mib {least} or more"
        )
    middle = end - np.asarray(file_bytes, np.int64) / 2  # an image belongs to the shard in which its middle byte lies
    number = np.minimum(np.floor(middle * num_shards / max(1, total)), num_shards - 1)
    return [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(file_bytes)]


def _is_pack(folder: Path) -> bool:
    """Whether a folder holds what pack_coco writes and nothing else."""
    return all(
        path.name in (MANIFEST_NAME, INDEX_NAME, "resume") or path.match("shard-*.h5") or path.match("*.tmp")
        for path in folder.iterdir()
    )


class Workshop:
    """The folder `OUTPUT.partial` beside the output, in which a pack is written until `finish` renames it.

    So the output folder is complete or does not exist. With `overwrite` the old pack stays valid until then. The object
    is a context manager. From `agree` to the end of the block or process, no other process may write there.

    Args:
        output: folder of the finished pack.
        overwrite: whether it may replace a finished pack.

    Raises:
        UserError: the output holds a pack and `overwrite` is False, or foreign files; it is a mount point or
            a file; OUTPUT.replaced, the old pack's name for a moment, holds something else.
    """

    def __init__(self, output: Path, overwrite: bool) -> None:
        self.output = output = output.resolve()
        self.folder = output.with_name(output.name + ".partial")
        self._release = ExitStack()
        self._replaced = output.with_name(output.name + ".replaced")
        if output.exists() and not output.is_dir():
            raise UserError(f"{output}: is a file, expected a folder or nothing")
        if os.path.ismount(output):
            raise UserError(f"{output}: is a mount point, which cannot be renamed; give a folder inside it")
        if output.is_dir() and any(output.iterdir()):
            if not (output / MANIFEST_NAME).is_file() or not _is_pack(output):
                raise UserError(f"{output}: holds files that are no pack; give a new or an empty folder")
            if not overwrite:
                raise UserError(f"{output}: holds a finished pack; use --overwrite to replace it")
            self._check_replaced()

    def _check_replaced(self) -> None:
        """Raise UserError where the name that the old pack gets for a moment is taken by something else."""
        path = self._replaced
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or not _is_pack(path)):
            raise UserError(f"{path}: is no pack, and the old pack gets this name for a moment; move it elsewhere")

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self._release.close()

    def _take(self) -> None:
        """Make the folder and lock it."""
        try:
            (self.folder / "resume").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made ({error.strerror})") from error
        lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        self._release.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.folder}: another pack_coco is writing it") from error
        except OSError:  # some parallel file systems have no locks; there the user must start one packer at a time
            pass

    def agree(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Make the folder with the plan of a new pack, or check the plan that it was begun with.

        Returns:
            The stored plan: an interrupted pack keeps its shard boundaries.

        Raises:
            UserError: the pack was begun with other inputs or options, which are named, or another process writes it.
        """
        self._take()
        path = self.folder / PLAN_NAME
        if not path.is_file():
            if not _is_pack(self.folder) or any(self.folder.glob("shard-*")):
                raise UserError(f"{self.folder}: holds files but no {PLAN_NAME}; remove it and run again")
            write_json(path, plan)
            return plan
        begun: dict[str, Any] = {"format": 1, **json.loads(path.read_bytes())}  # a plan of format 1 has no such key
        differing = [key for key in plan if key != "first_images" and begun.get(key) != plan[key]]
        if differing and not any(self.folder.glob("shard-*")):  # nothing is lost
            write_json(path, plan)
            return plan
        if differing:
            what = "; ".join(f"{key} was {begun.get(key)!r}, is {plan[key]!r}" for key in differing)
            raise UserError(
                f"{self.folder}: an unfinished pack was begun with other inputs ({what}); "
                "run it with those to finish it, or remove this folder to start anew"
            )
        return begun

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest and the index, and move the pack to its place.

        A crash between the two renames leaves the old pack as OUTPUT.replaced and the new one, complete, as
        OUTPUT.partial; the same command run again puts it in place.

        Raises:
            UserError: OUTPUT.replaced came to hold something else meanwhile.
        """
        write_json(self.folder / MANIFEST_NAME, manifest)
        write_index(self.folder, manifest)
        if self.output.is_dir() and any(self.output.iterdir()):
            self._check_replaced()
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.rename(self.output, self._replaced)
        os.rename(self.folder, self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(self.output / "resume")
        for leftover in self.output.glob("*.tmp"):
            leftover.unlink()
        if self._replaced.is_dir() and not self._replaced.is_symlink() and _is_pack(self._replaced):
            shutil.rmtree(self._replaced)
