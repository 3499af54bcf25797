"""What a watcher wants to know of a run, worked out from its record: lines of text and a few numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from megdet_hpc.record.journal import Start
from megdet_hpc.record.run_record import RunRecord, Score, duration

# Rows whose speed is taken for the rest of the run.
_RECENT_ROWS = 5
_BARS = "▁▂▃▄▅▆▇█"
_LIVE = ("training", "evaluating", "saving", "running")


@dataclass(frozen=True)
class Remaining:
    """What is left of a run [seconds]. A part that nothing has measured yet counts as 0."""

    steps: float
    evaluations: float
    saves: float

    @property
    def total(self) -> float:
        return self.steps + self.evaluations + self.saves


def is_live(record: RunRecord) -> bool:
    """Whether the run moves, as far as its files tell."""
    return record.state()[0] in _LIVE


def remaining(record: RunRecord) -> Remaining | None:
    """The time that the run still needs, at the speed of its last rows; None where too little is known."""
    # of an update as large as the first one, where they grow
    recent = [
        row["step_max_s"] / record.factor_at(row["step"] - 1)
        for row in record.rows[-_RECENT_ROWS:]
        if row.get("step_max_s")
    ]
    last = record.last_step
    if not recent or last is None or not is_live(record):
        return None
    left = max(record.work_of(last) - record.work_of(record.step), 0)
    return Remaining(
        left * fmean(recent),
        _left_times(record, last, _evaluation_period(record, last)) * _each(record, "evaluating")
        if _evaluates(record)
        else 0.0,
        _left_times(record, last, _period(record, "checkpoints.every_epochs")) * _each(record, "saving"),
    )


def _evaluates(record: RunRecord) -> bool:
    return record.config.get("data.val", "unknown") is not None


def _each(record: RunRecord, phase: str) -> float:
    """Mean time of what this start has done now and then, the one under way left out [seconds]."""
    now = record.now
    if not now or not now.times.get(phase):
        return 0.0
    done = now.times[phase] - (now.phase == phase)
    under_way = now.time - now.moved if now.phase == phase else 0.0
    return (now.seconds.get(phase, 0.0) - under_way) / done if done else 0.0


def _period(record: RunRecord, key: str) -> float:
    """The epochs between two things, which a key names; 0 where they come at the end only."""
    every = record.config.get(key)
    return every if isinstance(every, (int, float)) else 0.0


def _evaluation_period(record: RunRecord, last: int) -> float:
    times = record.config.get("evaluation.times")
    whole = record.epochs_between(0, last) or 0.0
    return whole / times if isinstance(times, int) else _period(record, "evaluation.every_epochs")


def _left_times(record: RunRecord, last: int, period: float) -> int:
    """How often a thing of this period [epochs] is still due; once more at the end."""
    done, before_last = record.epochs_between(0, record.step), record.epochs_between(0, last - 1)
    if not period or done is None or before_last is None:
        return int(record.step < last)
    return int(before_last / period + 1e-9) - int(done / period + 1e-9) + 1 if record.step < last else 0


def progress_text(record: RunRecord) -> str:
    """Step, epoch and the time that is left."""
    last = record.last_step
    within = last is not None and record.step <= last  # a run that goes on with fewer epochs may be beyond them
    text = f"step {record.step}"
    if last:
        text += f" of {last} ({100 * record.step / last:.0f} %)" if within else f", beyond the last one, {last}"
    since = record.epochs_between(record.rows[-1]["step"], record.step) if record.rows else None
    if since is not None:
        epoch = record.rows[-1].get("epoch", 0.0) + since
        left_epochs = record.epochs_between(record.step, last) if last and within else None
        text += f", epoch {epoch:.2f}" + ("" if left_epochs is None else f" of {round(epoch + left_epochs, 2):g}")
    if (left := remaining(record)) and last and record.step < last:
        at = time.strftime("%a %H:%M", time.localtime(time.time() + left.total))
        text += f"; about {duration(left.total)} left, until {at}"
    return text


def number_lines(record: RunRecord) -> list[tuple[str, str]]:
    """Names and values of the newest row, and of the validations."""
    if not record.rows:
        every = record.config.get("log_every")
        return [("metrics", "no row yet" + (f"; the first comes after {every} steps" if every else ""))]
    row = record.rows[-1]
    lines = [("loss", f"{row['loss']:.4f}")]
    lines += [(f"  {key[5:]}", f"{value:.4f}") for key, value in row.items() if key.startswith("loss_")]
    if "lr" in row:
        lines.append(("learning rate", f"{row['lr']:.4g} per update"))
    if row.get("gradient_norm") is not None:
        lines.append(("gradient norm", f"{row['gradient_norm']:.3g}"))
    if row.get("images_per_s"):
        batch = record.global_batch
        lines.append(
            ("speed", f"{row['images_per_s']:.1f} images/s" + (f", {batch} images an update" if batch else ""))
        )
        lines.append(("step", _times(row, "step")))
        lines.append(("waiting for data", _times(row, "data")))
    return lines


def _times(row: dict[str, Any], what: str) -> str:
    mean, most = row.get(f"{what}_mean_s"), row.get(f"{what}_max_s")
    if mean is None or most is None:
        return "not known"
    return f"{seconds(mean)}" + (f" on average, {seconds(most)} the slowest rank" if most > 1.02 * mean else "")


def seconds(value: float) -> str:
    """A short time: 12 ms, 0.34 s, 5.2 s."""
    return f"{1000 * value:.0f} ms" if value < 0.1 else f"{value:.2f} s" if value < 1 else f"{value:.1f} s"


def slowest_text(record: RunRecord) -> str:
    """The rank that the others wait for."""
    row = record.rows[-1] if record.rows else {}
    rank = row.get("slowest_rank")
    if rank is None:
        ranks = record.starts[-1].ranks if record.starts else None
        return "one rank" if ranks == 1 else "not measured (CPUs only)" if ranks else "not known"
    hosts = record.starts[-1].hosts if record.starts else ()
    where = f" on {hosts[rank]}" if rank < len(hosts) else ""
    work = f"{seconds(row['own_max_s'])} of own work a step, {seconds(row['own_mean_s'])} on average"
    recent = [r["slowest_rank"] for r in record.rows[-_RECENT_ROWS:] if "slowest_rank" in r]
    return f"rank {rank}{where}: {work}; the slowest in {recent.count(rank)} of the last {len(recent)} rows"


def score_text(record: RunRecord) -> str:
    """The newest and the best score of the run's own metric, and how many checkpoints wait to be scored."""
    wait = f"; {record.unscored} checkpoint(s) wait for evaluate --follow" if record.unscored else ""
    return _scores_text(record) + wait


def _scores_text(record: RunRecord) -> str:
    """The scores alone; COCO's AP and AP50 in brackets."""
    if not record.scores:
        return "no validation yet" if _evaluates(record) else "no validation set (data.val null)"
    last, best = record.scores[-1], record.best
    if last.AP is None:
        return f"nothing to score at step {last.step}"
    beside = {} if record.score_name == "AP" else {"AP": last.AP}
    known = [f"{name} {value:.3f}" for name, value in (beside | {"AP50": last.AP50}).items() if value is not None]
    text = "not measured" if last.own is None else f"{last.own:.3f}"
    text += (f" ({', '.join(known)})" if known else "") + f" at step {last.step}" + ", averaged weights" * last.averaged
    if best is None or best.own is None or best.step == last.step:
        return text
    return f"{text}; best {best.own:.3f} at step {best.step}"


def target_lines(record: RunRecord) -> list[str]:
    """A line for each AP of evaluation.targets: when it was reached first."""
    return [f"{target:g}: {_first(record.first_at(target))}" for target in record.targets]


def _first(score: Score | None) -> str:
    if score is None:
        return "not yet"
    return f"after {duration(3600 * score.hours)} of steps, step {score.step}, {score.images:,} images"


def start_rows(record: RunRecord, most: int = 6) -> list[list[str]]:
    """The newest starts: number, time, job or host, ranks, steps, how it ended."""
    rows = []
    for number, start in list(enumerate(record.starts, 1))[-most:]:
        is_last = number == len(record.starts)
        end = start.end_step if start.end_step is not None else record.step if is_last else None
        steps = f"{start.step} to {'?' if end is None else end}"
        when = time.strftime("%m-%d %H:%M", time.localtime(start.time))
        place = start.job or start.host
        rows.append([str(number), when, place, str(start.ranks or "?"), steps, _ending(record, start)])
    return rows


def _ending(record: RunRecord, start: Start) -> str:
    if start.end:
        took = f" after {duration(start.end_time - start.time)}" if start.end_time else ""
        return f"{start.end}{took}" + (f": {start.why}" if start.why else "")
    word = record.state()[0]
    return "died without a last word" if start is not record.starts[-1] or word == "starting" else word


def watchdog_lines(record: RunRecord) -> list[str]:
    """What the watchdog sees: how long no step has ended, its limit, and its reports of a hang."""
    if record.reports:
        return ["it found a hang and ended the job:", *(_report(report) for report in record.reports)]
    now = record.now
    if now is None:
        return ["nothing is known"]
    at = time.strftime("%H:%M:%S", time.localtime(now.time))
    idle = duration(max(now.time - now.moved, 0.0))
    what = "no step ended" if now.phase == "training" else f"rank 0 is {now.phase}"
    if not is_live(record):
        return [f"nothing: the run has ended; last look {at}, step {now.step}"]
    limit = f"a step may take {duration(now.watchdog_s)}" if now.watchdog_s else "it is off (watchdog_minutes 0)"
    return [f"{what} for {idle} at {at}; {limit}"]


def _report(report: dict[str, Any]) -> str:
    where = f"waits in {report['collective']}" if report.get("collective") else f"is at {report.get('place')}"
    return f"rank {report.get('rank')} on {report.get('host')}, after step {report.get('step')}: {where}"


def spark(values: Sequence[float], width: int) -> str:
    """A line of block characters, lowest to highest value; each stands for the mean of its part."""
    if len(values) < 2:
        return ""
    width = min(width, len(values))
    edges = [round(part * len(values) / width) for part in range(width + 1)]
    parts = [fmean(values[begin:end]) for begin, end in pairwise(edges)]
    low, span = min(parts), max(parts) - min(parts)
    return "".join(_BARS[int((value - low) / span * (len(_BARS) - 1)) if span else 0] for value in parts)
