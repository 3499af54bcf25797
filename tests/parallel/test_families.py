"""Every family on real ranks, and a run with another backbone that is cut; see tests/unit/test_every_family.py too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megdet_hpc import train
from megdet_hpc.config.models import DETECTORS
from megdet_hpc.engine.checkpoint import load_checkpoint
from tests.conftest import Launch

pytestmark = pytest.mark.parallel


def test_ranks_compute_what_one_process_does(launch: Launch) -> None:
    """The cascade without masks has nothing that the one with masks has not."""
    families = ["mask_rcnn", "cascade_mask_rcnn", "retinanet", "faster_rcnn+crowds", "retinanet+crowds"]
    families += ["dsod", "dsod+efficient", "scratchdet", "scratchdet_pre", "pelee", "pelee+efficient"]
    done = launch(2, "-m", "tests.parallel.families", *families, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    for family in families:
        for ranks in ("2 ranks", "4 emulated ranks"):
            assert f"{family}, {ranks}: losses differ by" in done.stdout
    assert done.stdout.count("recomputation changes no bit of the gradient") == 4


def arguments(shapes: Path, output: Path, *more: str) -> list[str]:
    data = ["--data.train", str(shapes / "train"), "--data.val", "null", "--device", "cpu"]
    data += ["--data.short_sides", "[64]", "--data.val_short_side", "64", "--data.max_side", "96"]
    narrow = ["--data.images_per_rank", "4", "--solver.epochs", "1", "--model.neck_channels", "16"]
    narrow += ["--solver.drop_epochs", "[]", "--solver.drop_factors", "[]"]
    end = ["--checkpoints.every_epochs", "0", "--output", str(output)]
    return ["--config", "tiny_retinanet", *data, *narrow, *end, *more]


def state(output: Path, step: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_checkpoint(output / "checkpoints" / f"step_{step:08d}.pt")["model"]
    return found


def test_agvm_and_squeeze_and_excitation_on_real_ranks(launch: Launch) -> None:
    done = launch(2, "-m", "tests.parallel.modulated", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"(\w+): AGVM's factors", done.stdout)) == set(DETECTORS)
    assert "squeeze and excitation: losses, gradient, statistics differ by" in done.stdout


def test_a_run_with_another_backbone_is_cut_and_resumed(shapes: Path, tmp_path: Path) -> None:
    """DenseNet and deformable convolutions, in bfloat16: the same bits; its weights begin another run."""
    keys = ["--model.backbone", "densenet121", "--model.conv", "deformable", "--model.conv_stages", "[5]"]
    keys += ["--solver.precision", "bfloat16"]
    whole, cut, more = (arguments(shapes, tmp_path / name, *keys) for name in ("whole", "cut", "more"))
    train.main([*whole, "--max_steps", "2"])
    for limit in ("1", "2"):
        train.main([*cut, "--max_steps", limit, "--resume", "auto"])
    mine, resumed = state(tmp_path / "whole", 2), state(tmp_path / "cut", 2)
    assert all(torch.equal(value, resumed[key]) for key, value in mine.items())
    offsets = [value for key, value in mine.items() if "denseblock4" in key and key.endswith("offset.weight")]
    assert len(offsets) == 16 and all(value.abs().max() > 0 for value in offsets)
    train.main([*more, "--model.weights", str(tmp_path / "cut"), "--model.frozen_stages", "5", "--max_steps", "1"])
    begun = state(tmp_path / "more", 1)
    backbone = [key for key in begun if ".body." in key and "num_batches" not in key]
    assert len(backbone) > 500 and all(torch.equal(begun[key], resumed[key]) for key in backbone)
