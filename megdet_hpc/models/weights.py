"""The source of a detector's first weights, and the cost of having none. This file loads no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megdet_hpc.config import NX_BATCH, NX_ITERATIONS, Config, ModelConfig
from megdet_hpc.errors import UserError
from megdet_hpc.files import file_sha256

AUTO = "auto"
SETTING = "MEGDET_BACKBONE"
"""Environment variable with the file that `auto` means. A configuration that begins from scratch stays so."""
PUBLISHED = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    *("densenet121", "densenet169"),
)
"""Backbones of which torchvision publishes ImageNet weights."""
_CHECKOUT = Path(__file__).resolve().parents[2]
# He, Girshick, Dollar, Rethinking ImageNet Pre-training (ICCV 2019): Mask R-CNN R50-FPN with GN, n x 90,000 iterations
# of 16 images. Each row: n, box AP from scratch, box AP pretrained.
_SCRATCH_AP = ((2, 36.8, 40.3), (4, 40.6, 40.9), (6, 41.3, 41.1))


def default_file(backbone: str) -> Path:
    """The path, relative to a folder, that fetch_backbone writes and `auto` looks for."""
    return Path("weights") / f"{backbone}.pth"


def find_weights(model: ModelConfig, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file that model.backbone_weights means on this host; None: from scratch.

    `auto` is the file of MEGDET_BACKBONE, a setting of the job scripts. Without one it looks in the working folder, in
    MEGDET_ROOT, which job scripts set, and in the checkout of this code. A file that is named is returned even if it is
    missing.
    """
    value = model.backbone_weights
    if value is None or value.lower() == "none":
        return None
    if value != AUTO:
        return Path(value)
    if environ.get(SETTING):
        return Path(environ[SETTING])
    folders = [Path(), *([Path(environ["MEGDET_ROOT"])] if environ.get("MEGDET_ROOT") else []), _CHECKOUT]
    return next((file for file in (f / default_file(model.backbone) for f in folders) if file.is_file()), None)


def resolve_weights(model: ModelConfig, environ: Mapping[str, str] = os.environ) -> ModelConfig:
    """The configuration with the full path and the SHA-256 of the file of weights; null where there is none.

    Raises:
        UserError: the file is missing, or is not the one whose SHA-256 is given, or both a backbone and a detector are.
    """
    if model.weights:
        return _resolve_detector(model)
    file = find_weights(model, environ)
    if file is None:
        if model.backbone_sha256:
            raise UserError(
                f"model.backbone_sha256 is {model.backbone_sha256}, but model.backbone_weights is "
                f"{model.backbone_weights} and names no file here; give the file, or --model.backbone_sha256 null"
            )
        return replace(model, backbone_weights=None)
    if not file.is_file():
        key = "model.backbone_weights"
        named_by = f"{SETTING} ({key} is auto)" if model.backbone_weights == AUTO else key
        raise UserError(f"{named_by} {file}: no such file ({_fetch(model.backbone)})")
    found = _digest(file, "model.backbone_weights", "model.backbone_sha256", model.backbone_sha256)
    return replace(model, backbone_weights=str(file.resolve()), backbone_sha256=found)


def _resolve_detector(model: ModelConfig) -> ModelConfig:
    file = Path(model.weights or "")
    if model.backbone_weights not in (None, AUTO, "none"):
        raise UserError(
            f"model.weights is {file} and model.backbone_weights is {model.backbone_weights}; a detector brings its "
            "backbone: give one of the two"
        )
    if not file.is_file():
        raise UserError(f"model.weights {file}: no such file")
    found = _digest(file, "model.weights", "model.weights_sha256", model.weights_sha256)
    return replace(
        model, weights=str(file.resolve()), weights_sha256=found, backbone_weights=None, backbone_sha256=None
    )


def _digest(file: Path, key: str, sha_key: str, wanted: str | None) -> str:
    """SHA-256 of a file; raises UserError where another one is wanted."""
    found = file_sha256(file)
    if wanted not in (None, found):
        raise UserError(
            f"{key} {file}: its SHA-256 is {found}, {sha_key} says {wanted}; give that file, or --{sha_key} null to "
            "take this one"
        )
    return found


def resumed_weights(model: ModelConfig, stored: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a run that goes on. Its first weights are the stored run's, and no file is read.

    Args:
        model: today's configuration.
        stored: `model` of the checkpoint's configuration.
    """
    first: dict[str, Any] = {
        key: stored.get(key) for key in ("backbone_weights", "backbone_sha256", "weights", "weights_sha256")
    }
    return replace(model, **first)


def random_constants(config: Config) -> list[str]:
    """The keys that keep parts of the backbone as they begin, for the whole run."""
    model, norm, found = config.model, config.norm, []
    if model.frozen_stages:
        found.append(f"model.frozen_stages {model.frozen_stages}")
    if norm.kind == "frozen":
        found.append("norm.kind frozen")
    elif "backbone" not in norm.where:
        found.append(f"norm.where [{','.join(norm.where)}], which leaves the backbone fixed statistics")
    return found


def check_constants(config: Config, weights: Path | str | None) -> None:
    """Refuse frozen stages and fixed statistics on random weights.

    Args:
        config: configuration of a run that does not go on from a checkpoint.
        weights: file of the backbone; None: from scratch, or with the detector of model.weights.

    Raises:
        UserError: names the keys, what to change, and the key that accepts them.
    """
    keys = random_constants(config)
    if weights is not None or config.model.weights or not keys or config.model.fixed_from_scratch:
        return
    missing = (
        f", and {default_file(config.model.backbone)} is not here" if config.model.backbone_weights == AUTO else ""
    )
    raise UserError(
        f"{' and '.join(keys)} would keep random weights or statistics for the whole run: model.backbone_weights is "
        f"{config.model.backbone_weights or 'null'}{missing}; give ImageNet weights ({_fetch(config.model.backbone)}), "
        "or norm.kind cgbn, bn or gn with backbone in norm.where and model.frozen_stages 0, or accept it with "
        "--model.fixed_from_scratch true"
    )


def scratch_warning(model: ModelConfig, num_images: float, environ: Mapping[str, str] = os.environ) -> str | None:
    """The warning for a run that begins with random weights though nobody asked for it: its cost, and how to mend it.

    Args:
        model: configuration that is not resolved yet.
        num_images: images of all epochs together [images].

    Returns:
        Text of several lines. None where there are weights, where none are published, and where null was asked for.
    """
    if (
        model.weights
        or model.backbone_weights != AUTO
        or model.backbone not in PUBLISHED
        or find_weights(model, environ)
    ):
        return None
    file = default_file(model.backbone)
    known = "; ".join(f"{scratch} against {tuned} at {n}x" for n, scratch, tuned in _SCRATCH_AP)
    return (
        f"the backbone begins with random weights: model.backbone_weights is auto, and {file} is neither in "
        f"{Path.cwd()} nor in the checkout. Elsewhere that costs box AP unless the run is long: {known} (from scratch "
        "against pretrained; Mask R-CNN R50-FPN with GN in He et al., Rethinking ImageNet Pre-training, ICCV 2019; "
        f"1x = {NX_ITERATIONS:,} iterations of {NX_BATCH} images). This run is "
        f"{num_images / NX_BATCH / NX_ITERATIONS:.2g}x. Two commands mend it, the first on a machine with internet "
        f"access:\n    {_fetch(model.backbone)}\n    the same start with --model.backbone_weights {file}\n"
        "(--model.backbone_weights null: from scratch on purpose)"
    )


def _fetch(backbone: str) -> str:
    if backbone not in PUBLISHED:
        return f"torchvision has weights of {', '.join(PUBLISHED)}, and none of {backbone}"
    return f"python -m megdet_hpc.fetch_backbone --backbone {backbone} --output {default_file(backbone)}"
