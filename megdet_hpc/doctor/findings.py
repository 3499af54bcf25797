"""A finding, and the table of all ranks' findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megdet_hpc.parallel.groups import rank_ranges

Verdict = Literal["fine", "slow", "wrong"]
ALL = "all"
VERDICTS: tuple[Verdict, ...] = ("fine", "slow", "wrong")


@dataclass(frozen=True)
class Place:
    """A process: which rank of the world, on which host."""

    host: str
    rank: int


@dataclass(frozen=True)
class Finding:
    """What one probe found on one rank."""

    verdict: Verdict
    probe: str
    """What was examined: two or three words."""
    detail: str
    """What was found, with units."""
    advice: str = ""
    """slow: what it costs. wrong: what to do."""
    about: str = ""
    """Ranks and host that it concerns, or `ALL`; empty for the rank that reports it."""
    lasting: bool = False
    """wrong: the fault would stay in another attempt and on other nodes, so a job need not try again."""

    def __post_init__(self) -> None:
        assert self.verdict == "fine" or self.advice, f"{self.probe}: {self.verdict} without advice"


@dataclass(frozen=True)
class Line:
    """Equal findings of several ranks."""

    finding: Finding
    where: str


def name_places(places: Sequence[Place]) -> str:
    """Ranks and host as text, for places on one host."""
    ranks = {place.rank for place in places}
    return f"{places[0].host} rank{'s' if len(ranks) > 1 else ''} {rank_ranges(ranks)}"


def merge(everyone: Sequence[tuple[Place, Sequence[Finding]]]) -> list[Line]:
    """Merge equal findings: fine ones of all hosts into one line, others into one line per host.

    Args:
        everyone: every rank's place and findings, in rank order.

    Returns:
        Lines with the worst verdict last. Lines of one verdict stay in the order in which the probes ran.
    """
    hosts = {place.host for place, _ in everyone}
    groups: dict[tuple[Finding, str], list[Place]] = {}
    for place, findings in everyone:
        for finding in findings:
            own_line = finding.verdict != "fine" and not finding.about
            groups.setdefault((finding, place.host if own_line else ""), []).append(place)
    lines = []
    for (finding, host), places in groups.items():
        if finding.about:
            where = finding.about
        elif len(places) == len(everyone) > 1 and not host:
            where = ALL
        elif host or len({place.host for place in places}) == 1:
            where = name_places(places)
        else:
            found_on = {place.host for place in places}
            where = "every host" if found_on == hosts else f"{len(found_on)} hosts, ranks {_of(places)}"
        lines.append(Line(finding, where))
    return sorted(lines, key=lambda line: VERDICTS.index(line.finding.verdict))


def _of(places: Sequence[Place]) -> str:
    return rank_ranges(place.rank for place in places)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text in aligned columns; the last column is not padded."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]


def table(lines: Sequence[Line]) -> str:
    """A line per finding with verdict, place, probe and text. The line below says what it costs or what to do."""
    rows: list[tuple[str, str, str, str]] = []
    for line in lines:
        found = line.finding
        rows.append((found.verdict, line.where, found.probe, found.detail))
        if found.verdict != "fine":
            rows.append(("", "", "", f"{'costs' if found.verdict == 'slow' else 'do'}: {found.advice}"))
    return "\n".join(columns(rows)) if rows else ""


def summary(lines: Sequence[Line]) -> str:
    """Number of lines of each verdict, worst last."""
    counts = {verdict: sum(line.finding.verdict == verdict for line in lines) for verdict in VERDICTS}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
