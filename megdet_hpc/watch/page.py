"""The page of a run, drawn by rich."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megdet_hpc.record.run_record import RunRecord
from megdet_hpc.watch import facts

_COLORS = {
    "finished": "green",
    "failed": "red",
    "died": "red",
    "silent": "red",
    "stopped": "yellow",
    "starting": "cyan",
}
_SPARK_CHARACTERS = 30


def page(record: RunRecord, *, unicode: bool) -> RenderableType:
    """All that a watcher wants to know.

    Args:
        record: the run as read.
        unicode: whether the terminal shows block characters.
    """
    word, why = record.state()
    head = Text.assemble((word, f"bold {_COLORS.get(word, 'green' if facts.is_live(record) else 'yellow')}"))
    head.append(f" {why}" if why.startswith("on ") else f": {why}" if why else "")
    parts: list[RenderableType] = [head, Text(facts.progress_text(record))]
    if last := record.last_step:
        parts.append(ProgressBar(total=last, completed=min(record.step, last), width=None))
    parts += [Text(), _numbers(record, unicode)]
    if record.starts or record.attempts:
        parts += [Text(), _starts(record)]
    title = Text(str(record.folder), style="bold")  # a name may look like rich's markup
    return Panel(Group(*parts), title=title, subtitle=time.strftime("%H:%M:%S"), title_align="left")


def _numbers(record: RunRecord, unicode: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    losses = [row["loss"] for row in record.rows]
    scores = [score.own for score in record.scores if score.own is not None]
    for name, value in facts.number_lines(record):
        line = facts.spark(losses, _SPARK_CHARACTERS) if unicode and name == "loss" else ""
        table.add_row(Text(name), Text(f"{value}  {line}".rstrip()))
    line = facts.spark(scores, _SPARK_CHARACTERS) if unicode else ""
    table.add_row(
        record.score_name, Text(f"{facts.score_text(record)}  {line}".rstrip(), style="bold" if scores else "")
    )
    for number, text in enumerate(facts.target_lines(record)):
        table.add_row("time to AP" if number == 0 else "", Text(text))
    table.add_row("slowest rank", Text(facts.slowest_text(record)))
    for number, text in enumerate(facts.watchdog_lines(record)):
        table.add_row("watchdog" if number == 0 else "", Text(text, style="red" if record.reports else ""))
    return table


def _starts(record: RunRecord) -> Table:
    table = Table(
        title=Text(record.attempts) if record.attempts else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for name in ("start", "time", "job or host", "ranks", "steps", "end"):
        table.add_column(name, header_style="dim", overflow="fold")
    for row in facts.start_rows(record):
        table.add_row(*map(Text, row))
    return table
