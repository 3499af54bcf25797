"""Bad images of a set, named all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.skips import IDENTICAL, SHOWN, Skips, describe_entries
from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write

SKIP_HINT = "--on-error skip packs the set without"


def add_image_fault(
    skips: Skips, reason: str, name: str, image_id: int, text: str, num_annotations: int
) -> dict[str, Any]:
    """List a bad image, under its path in the image folder; returns the entry.

    Args:
        skips: the run's list of bad input.
        reason: word by which it is counted.
        name: the file's path in the image folder.
        image_id: the image's id.
        text: what is wrong.
        num_annotations: annotations that are left out with it.
    """
    text = f"image id {image_id}: {text}"
    entry = skips.add(reason, Path(name), text, image_id, images=1, annotations=num_annotations)
    entry["file"] = printable(name)
    return entry


def describe_fault(entry: dict[str, Any], folder: Path) -> str:
    """One bad image in one line."""
    return f"{folder / entry['file']}: {entry['message']}"


def faulty(skips: Skips) -> list[dict[str, Any]]:
    """The entries of faults, which are left out only with --on-error skip."""
    return [entry for entry in skips.entries if entry["reason"] != IDENTICAL]


def refuse_images(skips: Skips, folder: Path, list_path: Path, *hints: str) -> None:
    """End the run if images are bad and they are not left out.

    Args:
        skips: the run's list of bad input.
        folder: image folder.
        list_path: file for the whole list, if the error does not name all.
        hints: likely causes and remedies.

    Raises:
        UserError: one line for a single image, else the numbers by reason and the first image of each.
    """
    entries = faulty(skips)
    if skips.skip or not entries:
        return
    hint = f" ({'; '.join([*filter(None, hints), SKIP_HINT])})"
    if len(entries) == 1:
        raise UserError(describe_fault(entries[0], folder) + hint)
    text = f"{folder}: {describe_entries(entries, folder, hint)}"
    if len(entries) > SHOWN:
        with atomic_write(list_path) as file:
            for entry in entries:
                file.write(f"{entry['reason']}: {describe_fault(entry, folder)}\n".encode("utf-8", "backslashreplace"))
        text += f"\n  all of them: {list_path}"
    raise UserError(text)


def printable(name: str, limit: int = 400) -> str:
    """A file's name for a one-line message: line breaks are escaped, and a long name is shortened."""
    if not name.isprintable():
        name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)
    return name if len(name) <= limit else f"{name[: limit // 2]}...{name[-limit // 4 :]}"
