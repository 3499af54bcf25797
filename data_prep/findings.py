"""Findings of a check. All are counted, and the first of each kind are described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

LISTED = 20  # findings of one kind that are described


@dataclass
class Findings:
    """Findings by kind, a bounded number of texts for each; sent between processes."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, text: str) -> None:
        """Record one finding.

        Args:
            kind: one or two words by which findings are grouped and limited.
            text: what is wrong; names the shard and, where known, image id and file name.
        """
        self.counts[kind] += 1
        if len(self.texts.setdefault(kind, [])) < LISTED:
            self.texts[kind].append(text)

    def wants(self, kind: str) -> bool:
        """Whether one more text of this kind would be kept. If not, call `skip`, which needs no text."""
        return len(self.texts.get(kind, [])) < LISTED

    def skip(self, kind: str, number: int) -> None:
        """Count findings without their texts."""
        if number:
            self.counts[kind] += number

    def merge(self, other: Findings) -> None:
        """Append the findings of another object."""
        for kind, texts in other.texts.items():
            mine = self.texts.setdefault(kind, [])
            mine.extend(texts[: LISTED - len(mine)])
        self.counts.update(other.counts)

    def lines(self) -> Iterator[str]:
        """One line for each described finding, and one for the others of a kind."""
        for kind, texts in self.texts.items():
            yield from (f"{kind}: {text}" for text in texts)
            if more := self.counts[kind] - len(texts):
                yield f"{kind}: ... and {more} more"

    def __bool__(self) -> bool:
        """Whether anything was found."""
        return bool(self.counts)
