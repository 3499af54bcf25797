"""The table of several runs: the keys that differ, and what each run has come to."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from megdet_hpc.config import completed, flatten
from megdet_hpc.errors import UserError
from megdet_hpc.record.run_record import RunRecord

# Names of the run itself and of its past, which differ always.
_OWN_KEYS = ("output", "resume", "model.backbone_sha256", "model.weights_sha256")
# Rows whose losses are averaged for the last loss, since mini-batches of few images differ.
_LAST_ROWS = 5
_GAP = "  "
_WIDEST = 32  # characters of a cell on the terminal


def names_of(records: Sequence[RunRecord]) -> list[str]:
    """Short names for runs: their paths without the folder that all have in common."""
    paths = [os.path.abspath(record.folder) for record in records]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def _complete(record: RunRecord) -> dict[str, Any]:
    """The run's keys; those that its version did not have get the default, which is what it did."""
    if not record.config:
        return {}
    try:
        return {**record.config, **flatten(completed(record.config))}
    except UserError:
        return record.config


def differing_keys(records: Sequence[RunRecord]) -> list[str]:
    """The keys of the configuration whose values are not the same in all runs. A run without one has no say."""
    configs = [config for record in records if (config := _complete(record))]
    keys = dict.fromkeys(key for config in configs for key in config if key not in _OWN_KEYS)
    return [key for key in keys if len({_plain(config.get(key)) for config in configs}) > 1]


def _plain(value: Any) -> str:
    """A value as YAML writes it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def common_target(records: Sequence[RunRecord]) -> float | None:
    """The highest AP, in hundredths, that all runs reached; None where one has no score or less than 0.01."""
    best = [max((score.AP or 0.0 for score in record.scores), default=0.0) for record in records]
    lowest = math.floor(100 * min(best) + 1e-9) / 100
    return lowest or None


def rows_of(records: Sequence[RunRecord], targets: Sequence[float] = ()) -> list[dict[str, Any]]:
    """A row for each run, with the same columns in all: its name, the keys that differ, what was measured.

    Args:
        records: the runs.
        targets: APs whose first time is a column; none: those of the runs' evaluation.targets, else the highest AP
            that all runs reached.
    """
    keys, scores = differing_keys(records), score_names(records)
    asked = targets or sorted({target for record in records for target in record.targets})
    shared = common_target(records)
    wanted = asked or ([shared] if shared else [])
    return [
        {
            "run": name,
            **{key: _value(record, key) for key in keys},
            **_measured(record, scores),
            **_times(record, wanted),
        }
        for name, record in zip(names_of(records), records, strict=True)
    ]


def score_names(records: Sequence[RunRecord]) -> list[str]:
    """The scores of the runs' own metrics, in the order of the runs. A run without a configuration has no say."""
    return list(dict.fromkeys(record.score_name for record in records if record.config)) or ["AP"]


def _value(record: RunRecord, key: str) -> str | None:
    config = _complete(record)
    return _plain(config[key]) if key in config else None


def _scored(record: RunRecord, names: Sequence[str]) -> dict[str, Any]:
    """Best and last of each of the scores, where the run chooses by it, and COCO's at its last validation."""
    best, last = record.best, record.scores[-1] if record.scores else None
    found: dict[str, Any] = {}
    for name in names:
        own = record.score_name == name
        found[f"{name}_best"] = best.own if best and own else None
        found[f"{name}_best_update"] = best.step if best and own else None
        found[f"{name}_last"] = last.own if last and own else None
    weights = ("averaged" if last.averaged else "raw") if last else None
    return {
        **found,
        "AP_last": last.AP if last else None,
        "AP50_last": last.AP50 if last else None,
        "weights_scored": weights,
    }


def _measured(record: RunRecord, names: Sequence[str]) -> dict[str, Any]:
    end = record.positions[-1] if record.positions else None
    losses = [row["loss"] for row in record.rows[-_LAST_ROWS:]]
    return {
        "state": record.state()[0],
        "mini_batch": record.global_batch,
        "ranks": (record.starts[-1].ranks or None) if record.starts else None,
        "updates": record.step,
        "of": record.last_step,
        "images_seen": end.images if end else None,
        **_scored(record, names),
        "loss_last": fmean(losses) if losses else None,
        "hours": end.hours if end else None,
        "images_per_s": record.images_per_s,
    }


def _times(record: RunRecord, targets: Sequence[float]) -> dict[str, Any]:
    """Hours and updates until each AP; None where it was not reached."""
    firsts = {f"{target:g}": record.first_at(target) for target in targets}
    hours = {f"hours_to_AP_{name}": first.hours if first else None for name, first in firsts.items()}
    return hours | {f"updates_to_AP_{name}": first.step if first else None for name, first in firsts.items()}


_TITLES = {
    "mini_batch": "mini-batch [images]",
    "of": "of updates",
    "images_seen": "images seen",
    "weights_scored": "weights scored",
    "loss_last": f"loss, last {_LAST_ROWS} rows",
    "hours": "time of the steps",
    "images_per_s": "images/s",
}


def _title(column: str) -> str:
    """The title of a column on the terminal."""
    for ending, text in (("_best_update", "  after updates"), ("_best", "{}, best"), ("_last", "{}, last")):
        if column.startswith("AP") and column.endswith(ending):
            return text.format(column.removesuffix(ending))
    return _TITLES.get(column, _target_title(column))


def text_of(rows: Sequence[dict[str, Any]], width: int) -> str:
    """The table for a terminal: a line for each column, runs side by side, in as many parts as the width asks for."""
    titles = ["run", *map(_title, list(rows[0])[1:])]
    heads = [title.ljust(max(map(len, titles))) for title in titles]
    blocks = [[_cell(column, value) for column, value in row.items()] for row in rows]
    parts: list[list[str]] = []
    lines: list[str] = []
    for block in blocks:
        wide = max(map(len, block))
        if lines and len(lines[0]) + len(_GAP) + wide > width:
            parts.append(lines)
            lines = []
        lines = [line + _GAP + cell.rjust(wide) for line, cell in zip(lines or heads, block, strict=True)]
    return "\n\n".join("\n".join(line.rstrip() for line in part) for part in [*parts, lines])


def _target_title(column: str) -> str:
    for begin, title in (("hours_to_AP_", "time to AP "), ("updates_to_AP_", "updates to AP ")):
        if column.startswith(begin):
            return title + column.removeprefix(begin)
    return column


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column.startswith("hours"):
        return f"{value:.2f} h" if value >= 1 else f"{60 * value:.1f} min"
    if column.startswith("AP") and isinstance(value, float):
        return f"{value:.3f}"
    text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    # the end of a path or of a list tells more of two that differ
    return text if len(text) <= _WIDEST or column == "run" else "..." + text[3 - _WIDEST :]
