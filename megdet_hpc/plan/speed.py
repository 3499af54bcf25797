"""The speed of one rank, which `plan` is given or takes from another run."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from megdet_hpc.errors import UserError
from megdet_hpc.plan.job_plan import JobPlan
from megdet_hpc.plan.options import require_number


def images_per_second(options: argparse.Namespace, plan: JobPlan) -> tuple[float, str] | None:
    """Speed of one rank and its source; None if no option gives it."""
    if options.images_per_second is not None:
        require_number("--images-per-second", options.images_per_second)
        return options.images_per_second, "given"
    if options.measured is None:
        return None
    return _measured_speed(Path(options.measured), plan)


def _measured_speed(run: Path, plan: JobPlan) -> tuple[float, str]:
    """Speed of one rank of a run that had as many images a rank as the plan.

    Raises:
        UserError: the run had other images a rank, emulated its ranks, or has no times.
    """
    import yaml

    from megdet_hpc.log import config_files, read_metrics

    file = run / "metrics.jsonl"
    timed = [row for row in read_metrics(file) if "step_max_s" in row and "images_per_s" in row]
    # later starts may have had other ranks and images; one that found the run finished has no times
    starts = [(0, run / "config.yaml"), *config_files(run)]
    since, used = next((one for one in reversed(starts) if any(row["step"] > one[0] for row in timed)), starts[-1])
    try:
        theirs = yaml.safe_load(used.read_text())
        emulated = theirs["emulate"]["ranks"]
        per_rank = theirs["data"]["images_per_rank"], theirs["solver"]["accumulate"]
        grew = theirs["solver"].get("grow_to", 0)
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"--measured {run}: {used} is no run's configuration: {error!r}") from None
    ours = plan.config.data.images_per_rank, plan.config.solver.accumulate
    if emulated:
        raise UserError(f"--measured {run}: that run emulated {emulated} ranks; accepted: a run of real ranks")
    if grew:
        raise UserError(f"--measured {run}: solver.grow_to was {grew} there; accepted: updates of one size, 0")
    if per_rank != ours:
        raise UserError(
            f"--measured {run}: data.images_per_rank and solver.accumulate were {per_rank} there; accepted: the "
            f"plan's, {ours}"
        )
    rows = [row for row in timed if row["step"] > since or not since][1:]
    if not rows:
        raise UserError(f"--measured {run}: {file} has no times after its first row")
    step = median(row["step_max_s"] for row in rows)
    batch = round(median(row["images_per_s"] * row["step_max_s"] for row in rows))
    images = ours[0] * ours[1]
    return images / step, f"median of {file}, {batch // images} rank(s), its messages included"
