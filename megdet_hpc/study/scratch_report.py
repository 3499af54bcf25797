"""Tables, plot and readings of the grid `scratch`, from the records alone."""

from __future__ import annotations

from pathlib import Path

from megdet_hpc.files import atomic_write, csv_text
from megdet_hpc.report.drawing import can_draw
from megdet_hpc.study.grids import Cell
from megdet_hpc.study.outcome import FINISHED
from megdet_hpc.study.report import markdown_table, named_by_score, rows_of, score_of
from megdet_hpc.study.scratch_claims import claims, summary


def write_scratch_reports(cells: list[Cell], runs: Path, stem: Path, title: str) -> list[Path]:
    """Write STEM.csv (a row for each line and run), STEM.md (settings and readings) and STEM.png.

    Args:
        cells: cells that scratch_cells gave.
        runs: folder of the runs' folders.
        stem: path of the files without their suffixes.
        title: title of tables and plot.

    Returns:
        The files written. Without a finished run there is no plot.
    """
    rows, score = rows_of(cells, runs), score_of(cells)
    parts = [f"### {title}", "", markdown_table(named_by_score(summary(rows), score)), f"### Readings, by {score}", ""]
    parts += [f"- {statement.reading()}" for statement in claims(rows) if statement.begun]
    texts = {"csv": csv_text(named_by_score(rows, score)), "md": "\n".join([*parts, ""])}
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in texts]
    for file, text in zip(files, texts.values(), strict=True):
        with atomic_write(file) as written:
            written.write(text.encode())
    if any(row["status"] in FINISHED for row in rows) and can_draw():
        from megdet_hpc.study.scratch_plots import draw_scratch

        files.append(stem.with_name(f"{stem.name}.png"))
        draw_scratch(rows, title, files[-1], score)
    return files
