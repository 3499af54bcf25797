"""The start of a run: anew, or from a checkpoint whose content must fit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megdet_hpc import owner
from megdet_hpc.config import Config, ModelConfig, completed, to_dict
from megdet_hpc.data.categories import Categories
from megdet_hpc.data.continuation import continue_plan, describe_change
from megdet_hpc.engine.checkpoint import (
    checkpoint_files,
    checkpoint_of,
    load_checkpoint,
    load_newest,
    remove_unfinished,
    step_of,
)
from megdet_hpc.engine.training import Training
from megdet_hpc.errors import UserError
from megdet_hpc.log.deferred import FOLDER
from megdet_hpc.models.weights import resolve_weights, resumed_weights
from megdet_hpc.solver.agvm import ModulatedOptimizer
from megdet_hpc.solver.ema import WeightAverage


def begin(
    config: Config, output: Path, check: Callable[[], None]
) -> tuple[tuple[Path, dict[str, Any]] | None, ModelConfig]:
    """Rank 0's decision for all ranks: the checkpoint to continue, if any, and the model with resolved weights.

    `check` raises if another start has taken the output folder.
    """
    _refuse_follower(config, output)
    if found := find_state(config, output, check):
        return found, resumed_weights(config.model, found[1]["config"]["model"])
    return None, first_weights(config.model)


def _refuse_follower(config: Config, output: Path) -> None:
    """Raise UserError where the run would score itself beside a live follower, which writes best.json too."""
    if config.evaluation.mode == "inside" and (follower := owner.may_be_held_by(output / FOLDER)):
        raise UserError(
            f"evaluation.mode inside: {follower} follows {output} and scores its checkpoints; end it first, or go on "
            "with evaluation.mode deferred"
        )


def first_weights(model: ModelConfig) -> ModelConfig:
    """The files of a run's first weights, by full path and SHA-256. Raises UserError as resolve_weights does."""
    if model.weights:
        model = replace(model, weights=str(checkpoint_of(Path(model.weights), "model.weights")))
    return resolve_weights(model)


def find_state(config: Config, output: Path, check: Callable[[], None]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue, by config.resume. A new start over an earlier run is refused.

    `check` raises if another start has taken the output folder, in which damaged checkpoints are renamed.
    """
    remove_unfinished(output / "checkpoints")
    newest = max(map(step_of, checkpoint_files(output / "checkpoints")), default=0)
    if config.resume not in ("never", "auto"):
        if not Path(config.resume).is_file():
            raise UserError(f"resume is {config.resume!r}; accepted: never, auto, or a checkpoint file")
        state = load_checkpoint(Path(config.resume))
        if state["step"] < newest:
            raise UserError(
                f"resume {config.resume} is at step {state['step']}, but output {output} holds step {newest}; "
                "name another --output, so that nothing is overwritten"
            )
        return Path(config.resume), state
    if config.resume == "auto":
        return load_newest(output / "checkpoints", check)
    if (output / "metrics.jsonl").exists() or (output / "checkpoints").exists():
        raise UserError(
            f"output {output} holds a run already; continue it with --resume auto, or name another --output"
        )
    return None


def restore(run: Training, state: dict[str, Any], source: Path) -> None:
    """Continue from a checkpoint's content. If ranks or images per rank changed, the rest of the epoch is re-planned.

    Raises:
        UserError: the checkpoint belongs to another model, data set or seed.
    """
    now = run.dataset.categories
    Categories.of_checkpoint(state, now).check_same(now, f"checkpoint {source}", "data.train")
    theirs, ours = state["plan"], run.order()
    if any(theirs.get(key) != ours[key] for key in ours):
        changed = ", ".join(
            f"{key} {theirs.get(key)} (now {ours[key]})" for key in ours if theirs.get(key) != ours[key]
        )
        raise UserError(
            f"{source}: was written with {changed}; a run continues only with the same data, groups and seed"
        )
    changes = changed_keys(completed(state["config"]), to_dict(run.config))
    fixed = [change for change in changes if change.startswith(("model.", "norm.")) and not _harmless(change)]
    if fixed:
        raise UserError(f"{source}: was trained with another model; changed: {'; '.join(fixed)}")
    if other := [change for change in changes if change.startswith("solver.optimizer:")]:
        raise UserError(
            f"{source}: {other[0]}; the state of one optimizer does not fit another. Keep it, or begin a new run with "
            f"--model.weights {source}"
        )
    if changes and run.world.rank == 0:
        print(f"changed since {source}: {'; '.join(changes)}", flush=True)
    try:
        run.model.load_state_dict(state["model"])
        # load_state_dict also loads the old run's weight decay and momentum, but this run's configuration counts
        groups = run.optimizer.optimizer.param_groups
        configured = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        run.optimizer.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(run.optimizer.optimizer.param_groups, configured, strict=True):
            group.update(values)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{source}: does not fit this model: {str(error)[:500]}") from error
    if scale := state.get("loss_scale"):  # empty unless the type is float16
        run.precision.scaler.load_state_dict(scale)
    torch.set_rng_state(state["rng"])
    run.step = int(state["step"])
    run.plan = continue_plan(run.plan, theirs, run.step)
    if not run.scaled:  # whose schedule counts no updates
        run.schedule = replace(run.schedule, first_step=run.step - run.position)
    if isinstance(run.optimizer, ModulatedOptimizer):
        run.optimizer.wait_for(run.schedule.first_step + run.schedule.warmup_steps - run.step)
    if run.world.rank == 0 and (text := describe_change(theirs, run.plan, run.step)):
        print(f"re-planned: {text}; rate {run.rate():.4g} at this step", flush=True)
        if gap := run.schedule.clip_gap():
            print(f"warning: {gap}", file=sys.stderr, flush=True)


def begin_average(run: Training, resumed: tuple[Path, dict[str, Any]] | None) -> dict[str, str]:
    """Begin or go on with the moving average of the weights, if there is to be one. Not a collective.

    Args:
        run: training with the weights that it starts with.
        resumed: checkpoint that it goes on from, and its content.

    Returns:
        What to say of it, by heading.

    Raises:
        UserError: the checkpoint's average is another model's.
    """
    config, stored = run.config.solver, resumed[1].get("ema") if resumed else None
    if not config.ema_decay:
        return {"ema": "off; the averaged weights of the checkpoint are left behind"} if stored else {}
    run.average = WeightAverage(run.model, config)
    batch = run.plan.images_at(run.step)
    decay = config.ema_decay ** (batch / config.ema_reference_batch)
    text = f"decay {config.ema_decay:g} ** ({batch} / {config.ema_reference_batch}) = {decay:.6g} an update"
    if stored:
        run.average.load(stored)
        return {"ema": f"{text}; goes on"}
    if resumed:
        return {"ema": f"{text}; begins with the raw weights, since the checkpoint has no averaged ones"}
    return {"ema": f"{text}; begins with the first weights"}


def _harmless(change: str) -> bool:
    """Whether a checkpoint still fits after this change of the model's or the layers' configuration."""
    key = change.split(":")[0]
    return (
        key.startswith(("model.backbone_", "model.weights"))
        or key == "model.fixed_from_scratch"
        or key in ("norm.size", "norm.unit", "norm.exchange", "norm.transport")
    )


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys of two nested configurations whose values differ, as `key: old -> new`."""
    changes: list[str] = []
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict):
            changes += changed_keys(before if isinstance(before, dict) else {}, value, f"{prefix}{key}.")
        elif before != value:
            changes.append(f"{prefix}{key}: {before} -> {value}")
    return changes
