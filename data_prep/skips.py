"""Bad input that a tool leaves out or repairs. Every piece is listed and counted by reason, or all are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megdet_hpc.errors import UserError

INT64_MAX = 2**63 - 1
IDENTICAL = "identical_record"
"""Reason of a record that equals an earlier one. It is always left out, and counted."""

SHOWN = 3  # pieces of bad input of one reason that an error describes


def is_id(value: Any) -> bool:
    """Whether a value is an id as the pack stores it."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= INT64_MAX


@dataclass
class Skips:
    """Bad input and repairs of one run.

    Attributes:
        skip: whether bad input is left out; else it ends the run.
        entries: one for each piece of bad input, as the manifest lists it.
        repairs: number of records by repair, for each kind of record ("images", "annotations", "categories").
    """

    skip: bool
    entries: list[dict[str, Any]] = field(default_factory=list)
    repairs: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, reason: str, path: Path, text: str, image_id: Any = None, **what: int) -> dict[str, Any]:
        """List one piece of bad input and continue. `refuse` ends the run when all are known.

        Args:
            reason: word by which it is counted.
            path: the file it is in.
            text: what is wrong.
            image_id: the image's id, as far as known.
            what: number of `images` and `annotations` left out.

        Returns:
            The entry, for a caller that adds more to it later.
        """
        # The manifest gets no path of this machine. It gets only plain ids, since a bad record can hold anything.
        plain_id = image_id if is_id(image_id) else None
        entry = {"reason": reason, "file": path.name, "image_id": plain_id, "message": text, **what}
        self.entries.append(entry)
        return entry

    def report(self, reason: str, path: Path, text: str, image_id: Any = None, **what: int) -> None:
        """List one piece of bad input, or end the run at once if bad input is not left out.

        Raises:
            UserError: `skip` is False.
        """
        if not self.skip:
            raise UserError(f"{path}: {text}")
        self.add(reason, path, text, image_id, **what)

    def refuse(self, path: Path, hint: str = "; --on-error skip leaves them out") -> None:
        """End the run if there is bad input and it is not left out.

        Args:
            path: file or folder of all of it, named in the error.
            hint: end of the line that counts several faults.

        Raises:
            UserError: there is bad input. The message counts it by reason and describes the first of each.
        """
        bad = [entry for entry in self.entries if entry["reason"] != IDENTICAL]
        if bad and not self.skip:
            raise UserError(f"{path}: {describe_entries(bad, path, hint)}")

    def repaired(self, kind: str, repairs: Iterable[str]) -> None:
        """Count the repairs of one record.

        Args:
            kind: "images", "annotations" or "categories".
            repairs: keys of `repairs.REPAIRS`.
        """
        for repair in repairs:
            self.repairs.setdefault(kind, Counter())[repair] += 1


def count_skips(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Numbers of images and annotations left out, by reason. The annotations of an image count with it."""
    images: Counter[str] = Counter()
    annotations: Counter[str] = Counter()
    for entry in entries:
        images[entry["reason"]] += entry.get("images", 0)
        annotations[entry["reason"]] += entry.get("annotations", 0)
    return {"images": dict(+images), "annotations": dict(+annotations)}


def describe_entries(entries: Sequence[dict[str, Any]], path: Path, hint: str = "") -> str:
    """All bad input as text: one line for one piece; else the numbers by reason, and a line for the first of each.

    Args:
        entries: entries of `Skips`, at least one.
        path: file or folder that stands before this text, so that the lines do not repeat it.
        hint: remedy, at the end of the first line of several.
    """

    def line(entry: dict[str, Any]) -> str:
        return entry["message"] if entry["file"] == path.name else f"{entry['file']}: {entry['message']}"

    if len(entries) == 1:
        return line(entries[0])
    count = Counter(entry["reason"] for entry in entries)
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in count.most_common())
    shown = [f"{len(entries):,} faults ({reasons}){hint}"]
    for reason, number in count.most_common():
        first = [entry for entry in entries if entry["reason"] == reason][:SHOWN]
        shown += [f"  {reason}: {line(entry)}" for entry in first]
        if number > SHOWN:
            shown.append(f"  {reason}: ... and {number - SHOWN:,} more")
    return "\n".join(shown)
