"""Tables and plots of the grids, from the records alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from megdet_hpc.config import Config
from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write, csv_text
from megdet_hpc.log import read_metrics
from megdet_hpc.plan.gpu_hours import describe_gpu_hours
from megdet_hpc.record.run_record import read_run, scores_of_row
from megdet_hpc.report.drawing import can_draw
from megdet_hpc.study.causes import readings_of
from megdet_hpc.study.claims import OF_FINDINGS, findings
from megdet_hpc.study.front import ranked
from megdet_hpc.study.grids import GRIDS, Cell, with_settings
from megdet_hpc.study.outcome import FINISHED, Outcome, losses_of, read_outcome, times_of
from megdet_hpc.study.scatter import MEASURED, over_seeds

Row = dict[str, Any]


def rows_of(cells: list[Cell], runs: Path, target_ap: float | None = None) -> list[Row]:
    """A row for each cell: its columns, then the results. Without a record the status is `unfinished` or `not run`.

    Args:
        cells: cells of one grid.
        runs: folder of the runs' folders.
        target_ap: AP until whose first validation updates and seconds are columns; None: no such columns.
    """
    if cells and cells[0].grid == "epochs":
        return [row for cell in cells for row in _epoch_rows(cell, runs)]
    if cells and cells[0].grid == "modules":
        return ranked([{**cell.columns, **_counted(cell), **_measured(cell, runs)} for cell in cells])
    times = {} if target_ap is None else {id(cell): _until(cell, runs, target_ap) for cell in cells}
    return [{**cell.columns, **_measured(cell, runs), **times.get(id(cell), {})} for cell in cells]


def _until(cell: Cell, runs: Path, target_ap: float) -> Row:
    """Updates, and seconds of training, until the first validation of an AP; None where it was not reached."""
    try:
        first = read_run(runs / cell.run.folder).first_at(target_ap)
    except UserError:
        first = None
    return {"updates_to_AP": first.step if first else None, "s_to_AP": 3600 * first.hours if first else None}


def rows_of_seeds(cells: list[Cell], runs: Path, target_ap: float | None = None) -> list[Row]:
    """The rows of cells of several seeds, with a column `seed` before the others."""
    seeds = dict.fromkeys(cell.run.config.seed for cell in cells)
    return [
        {"seed": seed, **row}
        for seed in seeds
        for row in rows_of([cell for cell in cells if cell.run.config.seed == seed], runs, target_ap)
    ]


def _counted(cell: Cell) -> Row:
    """The plan's arithmetic: millions of parameters, and GMACs of a forward pass over one image."""
    parameters, macs = counts_of(with_settings(cell.run.config, {"seed": 0}), cell.num_categories)
    return {"params_M": parameters / 1e6, "gmac": macs / 1e9}


@cache
def counts_of(config: Config, num_categories: int) -> tuple[int, int]:
    """Parameters and multiplications of a configuration, which are counted once."""
    from megdet_hpc.plan.model_size import count_model

    return count_model(config, num_categories)


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
    return dict(zip(MEASURED, values, strict=True))


def _epoch_rows(cell: Cell, runs: Path) -> list[Row]:
    """A row for each evaluation, with the numbers of the run until then; status and reason are those of its end."""
    measured = _measured(cell, runs)
    rows = read_metrics(runs / cell.run.folder / "metrics.jsonl")
    scores = [row for row in rows if "val/AP" in row]
    ends = {"run_steps": measured["steps"]}
    if measured["status"] == "not run" or not scores:
        return [{**cell.columns, "epoch": None, **measured, **ends}]
    found = []
    for row in scores:
        steps = [other for other in rows if "loss" in other and other["step"] <= row["step"]]
        _, ap50, ap, _ = scores_of_row(row, cell.run.config.evaluation.score_name)
        seconds, speed = times_of(steps, cell.run.global_batch)
        until = {"steps": row["step"], "AP": ap, "AP50": ap50, "loss": losses_of(steps)[1]}
        until |= {"train_s": seconds, "images_per_s": speed}
        found.append({**cell.columns, "epoch": row["epoch"], **measured, **until, **ends})
    return found


def write_reports(
    tables: dict[str, list[Row]], score: str, folder: Path, title: str, target_ap: float | None = None
) -> list[Path]:
    """Write GRID.csv, GRID.md and GRID.png of every grid among the tables, and the findings where there are any.

    Args:
        tables: rows by grid, as tables_of gives them.
        score: name of what their columns AP hold, as score_of gives it.
        folder: folder of the files.
        title: title of the tables and plots.
        target_ap: AP of the columns updates_to_AP and s_to_AP; None: there are none.

    Returns:
        The files written. A grid without a finished run has no plot.
    """
    files: list[Path] = []
    for grid, rows in tables.items():
        named = named_by_score(rows, score)
        shown = named_by_score(over_seeds(rows), score) if "seed" in rows[0] else named
        heading = f"{title}: {GRIDS[grid].replace('AP', score)}"
        if "updates_to_AP" in shown[0]:
            heading += f"; to_AP: until the first validation of AP {target_ap:g}"
        markdown = f"### {heading}\n\n{markdown_table(shown)}"
        if grid == "claim" and (lines := _on_gpus(rows, target_ap)):
            markdown += "\n".join(["", "### On GPUs", "", *(f"    {line}" for line in lines), ""])
        if sentences := readings_of(grid, rows):
            markdown += "\n".join(["", "### Readings", "", *(f"- {text}" for text in sentences), ""])
        for suffix, text in (("csv", csv_text(named)), ("md", markdown)):
            with atomic_write(folder / f"{grid}.{suffix}") as file:
                file.write(text.encode())
            files.append(folder / f"{grid}.{suffix}")
        if any(row["status"] in FINISHED for row in rows) and can_draw():
            from megdet_hpc.study.plots import draw

            draw(grid, rows, heading, folder / f"{grid}.png", score)
            files.append(folder / f"{grid}.png")
    if verdicts := findings(tables):
        lines = [f"### {title}: the paper's findings", "", *(f"- {one.reading()}" for one in verdicts), ""]
        # named by the grids that it rests on, since those of others say less or more
        name = f"findings-{'-'.join(grid for grid in OF_FINDINGS if tables.get(grid))}.md"
        with atomic_write(folder / name) as file:
            file.write("\n".join(lines).encode())
        files.append(folder / name)
    return files


def _on_gpus(rows: list[Row], target_ap: float | None) -> list[str]:
    """The plan's hours on GPUs for the mean updates to an AP with CGBN, by mini-batch, of runs that are finished."""
    if target_ap is None:
        return []
    updates: dict[int, list[int | None]] = {}
    for row in rows:
        # one that still runs counts from when it has reached the AP on
        if row["norm"] == "cgbn" and (row["status"] in FINISHED or row["updates_to_AP"] is not None):
            updates.setdefault(row["batch"], []).append(row["updates_to_AP"])
    return describe_gpu_hours(updates, target_ap)


def score_of(cells: list[Cell]) -> str:
    """The name of the score of the runs' evaluation.metric, which a study has one of."""
    (name,) = {cell.run.config.evaluation.score_name for cell in cells}
    return name


def named_by_score(rows: list[Row], score: str) -> list[Row]:
    """Rows whose columns AP, rank_AP and the like bear the name of the score that they hold. AP50 is always COCO's.

    Args:
        rows: rows whose column AP holds the score of evaluation.metric.
        score: its name.
    """
    names = {"AP": score, "rank_AP": f"rank_{score}", "AP of each seed": f"{score} of each seed"}
    return [{names.get(column, column): value for column, value in row.items()} for row in rows]


def tables_of(cells: list[Cell], runs: Path, target_ap: float | None = None) -> dict[str, list[Row]]:
    """The rows of each grid among the cells; with a column `seed` if there are several.

    Args:
        cells: cells that expand() gave.
        runs: folder of the runs' folders.
        target_ap: AP for the columns updates_to_AP and s_to_AP; None: no such columns.
    """
    found: dict[str, list[Row]] = {}
    for grid in dict.fromkeys(cell.grid for cell in cells):
        own = [cell for cell in cells if cell.grid == grid]
        several = len({cell.run.config.seed for cell in own}) > 1
        found[grid] = (rows_of_seeds if several else rows_of)(own, runs, target_ap)
    return found


def sentences_of(tables: dict[str, list[Row]]) -> list[str]:
    """The readings of each grid among the tables, and the verdicts on the paper's findings, as lines to print."""
    lines = [f"{grid}: {text}" for grid, rows in tables.items() for text in readings_of(grid, rows)]
    return lines + [one.reading() for one in findings(tables)]


def markdown_table(rows: list[Row]) -> str:
    """Rows of equal columns as a table of Markdown, without the runs' folders."""
    columns = [column for column in rows[0] if column != "run"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(column, row[column]) for column in columns)} |" for row in rows]
    return "\n".join([*lines, ""])


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column in ("AP", "AP50", "AP50_voc07", "AP50_voc12", "scatter"):
        return f"{value:.3f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("|", "/").replace("\n", " ")
