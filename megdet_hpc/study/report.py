"""Tables and plots of the grids, from the records alone."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from megdet_hpc.files import atomic_write
from megdet_hpc.log import read_metrics
from megdet_hpc.study.grids import GRIDS, Cell
from megdet_hpc.study.outcome import Outcome, read_outcome

Row = dict[str, Any]

_MEASURED = ("status", "steps", "AP", "AP50", "loss", "train_s", "images_per_s", "reason", "run")


def rows_of(cells: list[Cell], runs: Path) -> list[Row]:
    """A row for each cell: its columns, then what was measured; status `unfinished` or `not run` without a record.

    Args:
        cells: cells of one grid.
        runs: folder of the runs' folders.
    """
    if cells and cells[0].grid == "epochs":
        return [row for cell in cells for row in _epoch_rows(cell, runs)]
    return [{**cell.columns, **_measured(cell, runs)} for cell in cells]


def _measured(cell: Cell, runs: Path) -> Row:
    folder = runs / cell.run.folder
    begun = "unfinished" if (folder / "metrics.jsonl").is_file() else "not run"
    outcome = read_outcome(folder) or Outcome(begun, "", 0, None, None, None, None, 0.0, None)
    values = (
        outcome.status,
        outcome.step,
        outcome.ap,
        outcome.ap50,
        outcome.loss_last,
        outcome.train_seconds,
        outcome.images_per_s,
        outcome.reason,
        cell.run.folder,
    )
    return dict(zip(_MEASURED, values, strict=True))


def _epoch_rows(cell: Cell, runs: Path) -> list[Row]:
    """A row for each evaluation."""
    measured = _measured(cell, runs)
    scores = [row for row in read_metrics(runs / cell.run.folder / "metrics.jsonl") if "val/AP" in row]
    if measured["status"] == "not run" or not scores:
        return [{**cell.columns, "epoch": None, **measured}]
    return [
        {
            **cell.columns,
            "epoch": row["epoch"],
            **measured,
            "steps": row["step"],
            "AP": row["val/AP"],
            "AP50": row["val/AP50"],
        }
        for row in scores
    ]


def write_reports(cells: list[Cell], runs: Path, folder: Path, title: str) -> list[Path]:
    """Write GRID.csv, GRID.md and GRID.png of every grid among the cells.

    Args:
        cells: cells that expand() gave.
        runs: folder of the runs' folders.
        folder: where the files go.
        title: above the tables and plots.

    Returns:
        The files written; no plot of a grid without any finished run.
    """
    files: list[Path] = []
    for grid in dict.fromkeys(cell.grid for cell in cells):
        rows = rows_of([cell for cell in cells if cell.grid == grid], runs)
        heading = f"{title}: {GRIDS[grid]}"
        for suffix, text in (("csv", _csv(rows)), ("md", _markdown(rows, heading))):
            with atomic_write(folder / f"{grid}.{suffix}") as file:
                file.write(text.encode())
            files.append(folder / f"{grid}.{suffix}")
        if any(row["status"] in ("done", "failed") for row in rows):
            from megdet_hpc.study.plots import draw

            draw(grid, rows, heading, folder / f"{grid}.png")
            files.append(folder / f"{grid}.png")
    return files


def _csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(rows: list[Row], heading: str) -> str:
    columns = [column for column in rows[0] if column != "run"]
    lines = [f"### {heading}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(column, row[column]) for column in columns)} |" for row in rows]
    return "\n".join([*lines, ""])


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column in ("AP", "AP50"):
        return f"{value:.3f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("|", "/").replace("\n", " ")
