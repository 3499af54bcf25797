"""DSOD: parameters and boxes as published, memory with recomputation, recipes that can be planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megdet_hpc.config import Config, DsodConfig, NormConfig, from_dict
from megdet_hpc.errors import UserError
from megdet_hpc.models.factory import build_detector
from megdet_hpc.models.ssd import Ssd
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.plan.__main__ import main as plan
from tests import families

SMALLEST = {"bottleneck_channels": 64, "growth": 16}


def on_meta(categories: int, **keys: Any) -> Ssd:
    with torch.device("meta"):
        config = Config(model=DsodConfig(**keys), norm=NormConfig(where=("backbone", "heads")))
        model = build_detector(config, num_categories=categories, group=SerialCommunicator())
    assert isinstance(model, Ssd)
    return model


@pytest.mark.parametrize(
    ("categories", "keys", "parameters", "statistics"),
    [(20, {}, 14_715_804, 79_932), (80, {}, 21_700_524, 83_532), (20, SMALLEST, 5_833_372, 38_908)],
)
def test_parameters_as_published(categories: int, keys: dict[str, int], parameters: int, statistics: int) -> None:
    model = on_meta(categories, **keys)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(b.numel() for name, b in model.named_buffers() if "running" in name) == statistics
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 92
    assert sum(len(part) for part in model.parts().values()) == len(list(model.parameters()))


def test_maps_of_300_pixels_round_up() -> None:
    model = on_meta(20)
    *levels, boxes, classes = model.eval().dense(torch.empty(1, 3, 300, 300, device="meta"))
    assert [(level.shape[1], level.shape[2]) for level in levels] == [
        (800, 38), (512, 19), (512, 10), (256, 5), (256, 3), (256, 2)
    ]  # fmt: skip
    assert boxes.shape == (1, 8744, 4) and classes.shape == (1, 8744, 21)


def test_recomputed_detector_has_the_same_losses_and_gradients() -> None:
    seen = []
    for memory_efficient in (False, True):
        model = families.build("dsod", memory_efficient=memory_efficient)
        losses = model.losses(families.batch(), families.DRAWS)
        sum(loss.value for loss in losses.values()).backward()  # type: ignore[union-attr]
        seen.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert len(seen[0]) > 100 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))  # type: ignore[arg-type]


def test_one_cell_and_one_image_are_refused() -> None:
    model = families.build("dsod")
    with pytest.raises(UserError, match=r"smallest maps of \(64, 64\) pixels have one value"):
        model.losses(families.batch(0, 1), families.DRAWS)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"box_steps": (8, 16)}, r"model.box_steps is \(8, 16\); accepted: 6 numbers"),
        ({"box_scales": (0.1,)}, "model.box_scales .* accepted: 7 numbers"),
        ({"frozen_stages": 1}, "model.frozen_stages is 1; accepted: 0 with dsod"),
        ({"backbone_weights": "auto"}, "model.backbone_weights is 'auto'; accepted: null"),
        ({"block_layers": (6, 8)}, "model.block_layers .* accepted: four numbers"),
    ],
)
def test_keys_that_do_not_fit(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict({"model": {"detector": "dsod", **keys}})


@pytest.mark.parametrize(("name", "images", "steps"), [("voc", 16_551, 100_000), ("coco", 118_287, 320_000)])
def test_recipes(name: str, images: int, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    plan(["--config", f"dsod300_{name}", "--ranks", "8", "--images", str(images)])
    out = capsys.readouterr().out
    assert f"{steps} in all" in out and "x 4 passes = 128 images" in out
