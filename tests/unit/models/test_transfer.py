"""A detector that begins with another one: torchvision's, one of other classes, one that does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from megdet_hpc.config import Config, EvaluationConfig, FasterRcnnConfig, NormConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.errors import UserError
from megdet_hpc.models.detector import PIXEL_MEAN, PIXEL_STD
from megdet_hpc.models.detectors.faster_rcnn import FasterRcnn
from megdet_hpc.models.factory import build_detector
from megdet_hpc.models.transfer import _COCO_91, read_source, transfer
from megdet_hpc.parallel.serial import SerialCommunicator
from tests.families import EVERYWHERE, FAMILIES

SMALL = FasterRcnnConfig(
    backbone="resnet10", neck_channels=8, box_head_channels=16, anchor_sizes=(16, 24, 32, 48, 64), backbone_weights=None
)
OF = Config(model=SMALL, norm=NormConfig(kind="cgbn"))
CLASS_LAYERS = ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred")


def build(num_categories: int, seed: int, config: Config = OF) -> FasterRcnn:
    model = build_detector(
        dataclasses.replace(config, seed=seed), num_categories=num_categories, group=SerialCommunicator()
    )
    assert isinstance(model, FasterRcnn)
    return model


def saved(file: Path, content: object) -> Path:
    torch.save(content, file)
    return file


def test_torchvisions_detector_finds_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, box_score_thresh=0.0).eval().double()
    config = Config(
        model=FasterRcnnConfig(backbone_weights=None),
        norm=NormConfig(kind="bn", where=("backbone",)),
        evaluation=EvaluationConfig(score_threshold=0.0),
    )
    ours = build(len(_COCO_91), 5, config).eval().double()
    # random weights make large activations of the rounding of the pixels' mean, so that nothing is rounded to float32
    ours.pixel_mean, ours.pixel_std = (
        torch.tensor(value, dtype=torch.float64).view(1, 3, 1, 1) * 255 for value in (PIXEL_MEAN, PIXEL_STD)
    )
    taken = transfer(ours, read_source(saved(tmp_path / "tv.pth", theirs.state_dict())), _COCO_91)
    assert taken.missing == [] and taken.unused == [] and taken.drawn == []
    pixels = torch.randint(0, 256, (3, 160, 192), dtype=torch.uint8)
    theirs.transform.min_size, theirs.transform.max_size = (160,), 192  # it resizes by itself: not here
    with torch.no_grad():
        (expected,) = theirs([pixels.double() / 255])
        (found,) = ours.detect(Batch(pixels[None], [(160, 192)], [(1.0, 1.0)], [0], []))
    assert len(expected["boxes"]) > 50
    for one, other in ((found.boxes, expected["boxes"]), (found.scores, expected["scores"])):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.labels, expected["labels"])


def test_rows_go_by_name(tmp_path: Path) -> None:
    source = build(3, 1)
    file = saved(
        tmp_path / "step_00000040.pt",
        {
            "model": source.state_dict(),
            "category_ids": [1, 2, 5],
            "category_names": ["cat", "dog", "Red  cell"],
            "step": 40,
        },
    )
    model = build(4, 2)
    drawn = {key: value.clone() for key, value in model.state_dict().items()}
    taken = transfer(model, read_source(file), ["red cell", "bird", "cat", "cow"])
    own, given = model.state_dict(), source.state_dict()
    assert (taken.kept, taken.drawn) == (["red cell", "cat"], ["bird", "cow"])
    for layer, outputs in zip(CLASS_LAYERS, (1, 4), strict=True):
        for kind in ("weight", "bias"):
            rows, theirs = (state[f"{layer}.{kind}"].unflatten(0, (-1, outputs)) for state in (own, given))
            before = drawn[f"{layer}.{kind}"].unflatten(0, (-1, outputs))
            for label, other in ((0, 0), (1, 3), (3, 1)):
                assert torch.equal(rows[label], theirs[other])
            for label in (2, 4):
                assert torch.equal(rows[label], before[label])
    others = [key for key in own if not key.startswith(CLASS_LAYERS) and "num_batches" not in key]
    assert all(torch.equal(own[key], given[key]) for key in others)
    lines = taken.lines()
    assert "step 40" in lines["begins with"] and set(lines) == {"begins with", "class layers"}
    assert lines["class layers"].endswith("kept for red cell, cat, drawn anew for bird, cow")


def test_statistics_behind_a_class_layer_go_by_name_too(tmp_path: Path) -> None:
    """DSOD's heads end in a normalization, whose channels are the classes' too."""
    config = Config(model=FAMILIES["dsod"], norm=dataclasses.replace(EVERYWHERE, kind="bn"))
    source, model = (
        build_detector(config, num_categories=2, group=SerialCommunicator(), pretrained=False) for _ in range(2)
    )
    state = source.state_dict()
    layers = [layer for layer in source.class_layers() if f"{layer}.running_mean" in state]
    for layer in layers:
        state[f"{layer}.running_mean"].copy_(torch.arange(len(state[f"{layer}.running_mean"])))
    checkpoint = {"model": state, "category_ids": [1, 2], "category_names": ["cat", "dog"], "step": 1}
    taken = transfer(model, read_source(saved(tmp_path / "step_00000001.pt", checkpoint)), ["dog", "cat"])
    assert layers and taken.missing == []
    for layer in layers:
        means = model.state_dict()[f"{layer}.running_mean"].unflatten(0, (-1, 3))
        swapped = state[f"{layer}.running_mean"].unflatten(0, (-1, 3))[:, [0, 2, 1]]
        assert torch.equal(means, swapped)


def test_torchvisions_91_classes_have_names(tmp_path: Path) -> None:
    source = build(90, 1)
    model = build(3, 2)
    taken = transfer(model, read_source(saved(tmp_path / "tv.pth", source.state_dict())), ["zebra", "N/A", "cell"])
    assert (taken.kept, taken.drawn) == (["zebra"], ["N/A", "cell"])
    zebra = _COCO_91.index("zebra") + 1
    row = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(model.state_dict()[row][1], source.state_dict()[row][zebra])


def test_a_file_without_names(tmp_path: Path) -> None:
    source = build(3, 1)
    file = saved(tmp_path / "model_20.pth", {"model": {f"module.{k}": v for k, v in source.state_dict().items()}})
    same = build(3, 2)
    assert "in their order" in transfer(same, read_source(file), ["a", "b", "c"]).lines()["class layers"]
    assert torch.equal(same.roi_heads.box_predictor.cls_score.weight, source.roi_heads.box_predictor.cls_score.weight)
    other = transfer(build(2, 2), read_source(file), ["a", "b"])
    assert other.kept == [] and "names none of its 3 classes" in other.lines()["class layers"]


def test_names_of_layers_from_before(tmp_path: Path) -> None:
    """torchvision's published files still have them."""
    state = build(3, 1).state_dict()
    old = {k.replace("blocks.0.0.", "blocks.0.").replace("head.conv.0.0.", "head.conv."): v for k, v in state.items()}
    assert set(old) - set(state) == {
        "rpn.head.conv.weight", "rpn.head.conv.bias",
        *(f"backbone.fpn.{part}_blocks.0.{kind}" for part in ("inner", "layer") for kind in ("weight", "bias")),
    }  # fmt: skip
    model = build(3, 2)
    taken = transfer(model, read_source(saved(tmp_path / "old.pth", old)), ["a", "b", "c"])
    assert taken.missing == [] and torch.equal(model.state_dict()["rpn.head.conv.0.0.bias"], old["rpn.head.conv.bias"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no torch file", "not a file of tensors saved by torch"),
        ({"epoch": 3}, "holds no state dict; accepted: a checkpoint of megdet_hpc"),
        (resnet18().state_dict(), "it looks like a classifier's, which model.backbone_weights takes"),
        ({"backbone.body.conv1.weight": torch.zeros(8, 3, 3, 3)}, "only 0% of the configured detector's values"),
        (torch.jit.script(torch.nn.ReLU()), "a TorchScript export; name the checkpoint that it was made of"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "file.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, torch.jit.ScriptModule):
        content.save(str(file))
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=str(file)) as refused:
        transfer(build(3, 1), read_source(file), ["a", "b", "c"])
    assert message in str(refused.value)


def test_fixed_statistics_are_needed(tmp_path: Path) -> None:
    group_norm = build(3, 1, dataclasses.replace(OF, norm=NormConfig(kind="gn", where=("backbone",))))
    frozen = build(3, 1, dataclasses.replace(OF, norm=NormConfig(kind="frozen")))
    with pytest.raises(UserError, match="has no running statistics"):
        transfer(frozen, read_source(saved(tmp_path / "gn.pth", group_norm.state_dict())), ["a", "b", "c"])
