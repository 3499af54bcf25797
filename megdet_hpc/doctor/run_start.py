"""Check of what a job's training would report at its start: options that do not fit, a backbone without weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config
from megdet_hpc.doctor.findings import Finding
from megdet_hpc.engine.checkpoint import checkpoint_files
from megdet_hpc.errors import UserError
from megdet_hpc.models.weights import check_constants, find_weights, resolve_weights, scratch_warning
from megdet_hpc.plan.job_plan import Nodes, find_training_set, plan_job

_PROBE = "training"


def probe_training(words: Sequence[str], num_ranks: int) -> list[Finding]:
    """Check the trainer's own arguments. Not a collective; one rank asks.

    Args:
        words: the trainer's command line.
        num_ranks: ranks of the job.

    Raises:
        SystemExit: an unknown option; one line is printed, and the status is 2.
    """
    config, _ = parse_config(config_parser("megdet_hpc.train", ""), list(words))
    goes_on = config.resume not in ("never", "auto")
    if config.resume == "auto":
        goes_on = bool(checkpoint_files(Path(config.output) / "checkpoints"))
    try:
        return _judge(config, num_ranks, goes_on)
    except UserError as error:
        do = "correct the option: every attempt would end with this error"
        return [Finding("wrong", _PROBE, str(error), do, lasting=error.status == 2)]


def _judge(config: Config, num_ranks: int, goes_on: bool) -> list[Finding]:
    plan = plan_job(config, Nodes(num_ranks, num_ranks), find_training_set(config, None), goes_on=goes_on)
    steps = " and then ".join(f"{number} steps of {images} images" for number, images in plan.updates())
    batch = f"{steps} on {num_ranks} rank(s)"
    if goes_on:
        return [Finding("fine", _PROBE, f"{batch}; continues from its checkpoint")]
    weights = find_weights(config.model)
    if weights and not weights.is_file() and not config.model.weights:
        resolve_weights(config.model)  # raises what the training would
    check_constants(config, weights)
    if scratch := scratch_warning(config.model, plan.total_images):
        scratch = scratch.replace(":\n    ", ": ").replace("\n    ", "; ").replace("\n", " ")  # one line of a table
        return [Finding("slow", _PROBE, f"{batch}; the backbone starts from scratch", scratch)]
    return [Finding("fine", _PROBE, f"{batch}; backbone: {weights or 'from scratch, as configured'}")]
