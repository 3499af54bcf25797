"""Every family: torchvision's numbers where it has the model, parameters, half precision, parts and classes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from megdet_hpc.config import (
    CascadeMaskRcnnConfig,
    CascadeRcnnConfig,
    Config,
    EvaluationConfig,
    FasterRcnnConfig,
    MaskRcnnConfig,
    ModelConfig,
    NormConfig,
    RetinaNetConfig,
)
from megdet_hpc.data.masks import decode_masks
from megdet_hpc.errors import UserError
from megdet_hpc.layers.norm import LevelNorms
from megdet_hpc.models.detector import Detector, Draws, torchvision_targets
from megdet_hpc.models.factory import build_detector
from megdet_hpc.models.transfer import Source, transfer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.solver.precision import Precision, ready_for_half_precision
from tests import families
from tests.families import FAMILIES, NUM_CATEGORIES, SIDE, batch

CLASSES = NUM_CATEGORIES + 1
SCORE = 0.004  # below the first scores of RetinaNet, 0.01, so that many boxes are compared
KEPT = 40
WITHOUT_NECK = ("dsod", "scratchdet", "scratchdet_pre", "pelee")


def plain(family: str) -> Detector:
    """The family as torchvision has it: batch norm in the backbone, two fully connected layers in the box head."""
    model = FAMILIES[family]
    if hasattr(model, "box_head"):
        model = dataclasses.replace(model, box_head="2fc")
    config = Config(
        model=model,
        norm=NormConfig(kind="bn"),
        evaluation=EvaluationConfig(score_threshold=SCORE, max_detections=KEPT),
    )
    built = build_detector(config, num_categories=NUM_CATEGORIES, group=SerialCommunicator()).double()
    exact = families.build(family)
    built.pixel_mean, built.pixel_std = exact.pixel_mean, exact.pixel_std
    return built


def torchvisions(family: str) -> nn.Module:
    """torchvision's own class with the same sizes."""
    keys: Any = FAMILIES[family]
    first = 2 if family == "retinanet" else 1
    layers = {f"layer{layer}": str(layer - first) for layer in range(first, 5)}
    extra = LastLevelP6P7(8, 8) if family == "retinanet" else LastLevelMaxPool()
    widths = [64 * 2 ** (layer - 1) for layer in range(first, 5)]
    backbone = BackboneWithFPN(ResNet(BasicBlock, [1, 1, 1, 1]), layers, widths, 8, extra)
    same_size = {"min_size": SIDE, "max_size": SIDE}
    if family == "retinanet":
        sizes = tuple((size, int(size * 2**0.5)) for size in keys.anchor_sizes)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        return RetinaNet(
            backbone, CLASSES, anchor_generator=anchors, score_thresh=SCORE, detections_per_img=KEPT, **same_size
        )
    further = {
        "rpn_anchor_generator": AnchorGenerator(tuple((s,) for s in keys.anchor_sizes), ((0.5, 1.0, 2.0),) * 5),
        "rpn_pre_nms_top_n_train": keys.rpn_pre_nms_top_n,
        "rpn_pre_nms_top_n_test": keys.rpn_pre_nms_top_n // 2,
        "rpn_post_nms_top_n_train": keys.rpn_post_nms_top_n,
        "rpn_post_nms_top_n_test": keys.rpn_post_nms_top_n // 2,
        "box_head": TwoMLPHead(8 * 49, keys.box_head_channels),
        "box_predictor": FastRCNNPredictor(keys.box_head_channels, CLASSES),
        "box_score_thresh": SCORE,
        "box_detections_per_img": KEPT,
        **same_size,
    }
    if family == "faster_rcnn":
        return FasterRCNN(backbone, **further)
    heads = {"mask_head": MaskRCNNHeads(8, [8] * 4, 1), "mask_predictor": MaskRCNNPredictor(8, 8, CLASSES)}
    return MaskRCNN(backbone, **further, **heads)


@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn", "retinanet"])
def test_losses_and_detections_are_torchvisions(family: str) -> None:
    """RetinaNet's losses for one image: with more, torchvision's mean is another one (see its docstring)."""
    ours, theirs = plain(family), torchvisions(family)
    if family == "retinanet":  # torchvision finds label 0 too, which takes places among those that are kept
        with torch.no_grad():
            ours.head.classification_head.cls_logits.bias[::CLASSES] = -100.0  # type: ignore[union-attr,index,operator]
    theirs.load_state_dict(ours.state_dict())
    theirs.double()
    given = batch(1, 2) if family == "retinanet" else batch()
    losses = ours.losses(given, Draws(0, 0))
    if family != "retinanet":  # the same anchors and proposals: drawn by image, so once more alike
        theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler = (  # type: ignore[union-attr]
            ours.rpn.fg_bg_sampler,  # type: ignore[union-attr]
            ours.roi_heads.fg_bg_sampler,  # type: ignore[union-attr]
        )
    pixels = [image.double() / 255 for image in given.images]
    expected = theirs(pixels, torchvision_targets(given.targets))
    values = [float(loss.value.detach() * loss.divided_by / loss.count) for loss in losses.values()]
    names = {"classification": "loss_classifier", "bbox_regression": "loss_box_reg"}
    assert {names.get(key, key): float(value.detach()) for key, value in expected.items()} == pytest.approx(
        dict(zip(losses, values, strict=True)), rel=1e-6
    )
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        detected, expected = ours.detect(given), theirs(pixels)
    assert sum(len(image["boxes"]) for image in expected) >= 20
    for found, image in zip(detected, expected, strict=True):
        torch.testing.assert_close(found.boxes, image["boxes"], rtol=0, atol=1e-9)
        torch.testing.assert_close(found.scores, image["scores"], rtol=0, atol=1e-9)
        assert torch.equal(found.labels, image["labels"])
        if family == "mask_rcnn":
            assert found.masks is not None
            masks = torch.from_numpy(decode_masks(found.masks, SIDE, SIDE))
            assert torch.equal(masks, image["masks"][:, 0] > 0.5) and masks.any()


@pytest.mark.parametrize(
    ("model", "norm", "published", "parameters"),
    [
        (FasterRcnnConfig(), NormConfig(), fasterrcnn_resnet50_fpn, 41_808_406),
        (MaskRcnnConfig(), NormConfig(), maskrcnn_resnet50_fpn, 44_454_513),
        (RetinaNetConfig(), NormConfig(), retinanet_resnet50_fpn, 34_068_119),
        (
            RetinaNetConfig(p6_from="c5"),
            NormConfig(kind="gn", where=("backbone", "heads")),
            retinanet_resnet50_fpn_v2,
            38_198_935,
        ),
        # three heads of two layers with boxes of one class in place of one head with boxes of 91
        (CascadeRcnnConfig(), NormConfig(), None, 41_808_406 + 2 * (13_895_680 + 93_275) + (3 - 91) * 4 * 1025),
        (CascadeMaskRcnnConfig(), NormConfig(), None, 69_425_516 + 44_454_513 - 41_808_406),
    ],
)
def test_parameters(model: ModelConfig, norm: NormConfig, published: Any, parameters: int) -> None:
    """Counts of the facts' tables, with torchvision's 91 labels; keys and shapes are torchvision's."""
    config = Config(model=dataclasses.replace(model, backbone_weights=None), norm=norm)
    with torch.device("meta"):
        ours = build_detector(config, num_categories=90, group=SerialCommunicator())
        theirs = published(weights=None, weights_backbone=None) if published else None
    assert sum(p.numel() for p in ours.parameters()) == parameters
    if theirs is not None:
        shapes = {key: value.shape for key, value in ours.state_dict().items()}
        # our backbone has group norm there too, which has no statistics
        skipped = ("running_mean", "running_var", "num_batches_tracked") if norm.kind == "gn" else ()
        assert shapes == {k: v.shape for k, v in theirs.state_dict().items() if not k.endswith(skipped or ("?",))}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_keeps_the_interface(family: str) -> None:
    """Half precision, parts, outputs of each class, and what the planner counts."""
    model = families.build(family).float()
    given = batch(dtype=torch.float32)
    exact = {key: float(loss.value.detach()) for key, loss in model.losses(given, Draws(0, 0)).items()}
    ready_for_half_precision(model)
    with Precision("bfloat16").autocast():
        losses = model.losses(given, Draws(0, 0))
    for key, loss in losses.items():
        # 8 bits of every activation; the regions of the later stages move with them
        assert loss.value.dtype == torch.float32, key
        assert float(loss.value.detach()) == pytest.approx(exact[key], rel=0.2), key
    torch.stack([loss.value for loss in losses.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    parts = model.parts()
    assert next(iter(parts)) == "backbone" and sum(map(len, parts.values())) == len(list(model.parameters()))
    without = {"fpn", "rpn"} if family in WITHOUT_NECK else {"rpn"} if family == "retinanet" else set()
    assert set(parts) == {"backbone", "fpn", "rpn", "heads"} - without
    for path, (before, after) in model.class_layers().items():
        assert len(model.get_submodule(path).weight) == before * CLASSES * after  # type: ignore[arg-type]
    outputs = model.dense(torch.zeros(2, 3, SIDE, SIDE))
    assert all(output.isfinite().all() for output in outputs) and len(outputs) >= 7


def test_a_level_has_statistics_of_its_own() -> None:
    """Evaluation after training on one batch normalizes it as training did, whatever the levels' means are."""
    model = families.build("retinanet", norm=dataclasses.replace(families.EVERYWHERE, momentum=1.0))
    norms = [module for module in model.modules() if isinstance(module, LevelNorms)]
    assert len(norms) == 8 and all(len(norm) == 5 for norm in norms)
    pixels = model.normalized(batch())
    trained = [output.detach() for output in model.dense(pixels)]
    model.eval()
    with torch.no_grad():
        evaluated = model.dense(pixels)
    means = torch.stack([layer.running_mean for layer in norms[0]])  # type: ignore[misc]
    assert float(means.std(0).max()) > 0.01
    for one, other in zip(trained[5:], evaluated[5:], strict=True):
        # unbiased variance in evaluation: the last level has four values, 4 / 3 of the variance
        assert float((one - other).abs().max()) < 0.25 * float(one.abs().max())
    with pytest.raises(UserError, match=r"level 4 of 5 is 1 x 1 cells of 1 image\(s\).*norm.kind gn"):
        model.train().dense(pixels[:1])


def test_retinanet_counts_over_all_images_and_never_finds_the_background() -> None:
    model = families.build("retinanet")
    bias = model.head.classification_head.cls_logits.bias  # type: ignore[union-attr]
    assert float(bias.detach().sigmoid().mean()) == pytest.approx(0.01)  # type: ignore[operator]
    losses = model.losses(batch(), Draws(0, 0))
    assert set(losses) == {"loss_classifier", "loss_box_reg"}
    counts = {int(loss.count) for loss in losses.values()}
    assert len(counts) == 1 and counts.pop() >= 4
    none = model.losses(batch(2, 4), Draws(0, 0))
    assert all(int(loss.count) == 0 for loss in none.values())
    assert float(none["loss_classifier"].value) > 0 and float(none["loss_box_reg"].value) == 0
    model.eval()
    with torch.no_grad():
        bias[::CLASSES] = 5.0  # type: ignore[index]
        found = model.detect(batch())
    assert all((image.labels > 0).all() for image in found)


def test_stages_of_a_cascade() -> None:
    """Box coders and thresholds of each stage; boxes that were added go no further; scores are means."""
    model = families.build("cascade_mask_rcnn")
    stages = list(model.roi_heads.stages)  # type: ignore[union-attr,arg-type]
    assert [stage.box_coder.weights for stage in stages] == [
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    ]
    assert [stage.proposal_matcher.high_threshold for stage in stages] == [0.5, 0.6, 0.7]
    assert model.roi_heads.loss_weights == (1.0, 0.5, 0.25)  # type: ignore[union-attr]
    losses = model.losses(batch(), Draws(0, 0))
    assert list(losses)[2:] == [
        *(f"loss_{kind}_{stage}" for stage in (1, 2, 3) for kind in ("classifier", "box_reg")),
        "loss_mask",
    ]
    counts = {key: int(loss.count) for key, loss in losses.items()}
    assert 4 <= counts["loss_mask"] < counts["loss_classifier_1"] == 4 * 16
    # two images have objects, whose boxes among the first sample are dropped and then added anew
    assert counts["loss_classifier_2"] <= 4 * 16
    model.eval()
    for image in model.found(batch()):
        assert image["masks"].shape == (len(image["boxes"]), 1, 28, 28)


@pytest.mark.parametrize(
    ("family", "renamed", "first"),
    [
        ("mask_rcnn", (r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}."), "mask_fcn1"),
        ("retinanet", (r"(head\.\w+_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}."), "conv.6"),
    ],
)
def test_names_of_torchvisions_published_files(family: str, renamed: Any, first: str) -> None:
    """They were written before torchvision put a normalization layer beside each convolution."""
    state = plain(family).state_dict()
    old = {re.sub(*renamed, key): value for key, value in state.items()}
    assert len(set(old) - set(state)) in (8, 16) and any(first in key for key in old)
    model = plain(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    taken = transfer(model, Source(Path("x.pth"), "state dict", old, None), ["a", "b", "c"])
    assert taken.missing == [] and taken.unused == [] and taken.drawn == []
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("ious", "message"),
    [
        ((0.5,), "2 to 4 IoUs"),
        ((0.5, 0.6, 0.7, 0.8, 0.9), "2 to 4 IoUs"),
        ((0.5, 1.5), "each over 0 and below 1"),
        ((0.7, 0.5), "rise from stage to stage"),
    ],
)
def test_stages_that_cannot_be(ious: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=rf"model.stage_ious is .*{message}"):
        Config(model=CascadeRcnnConfig(stage_ious=ious))


def test_a_batch_without_any_region_has_no_objects() -> None:
    model = families.build("cascade_mask_rcnn").eval()
    given = batch()
    heads, features = model.get_submodule("roi_heads"), model.get_submodule("backbone")(model.normalized(given))
    found, losses = heads(features, [torch.empty(0, 4, dtype=torch.float64)] * 4, given.sizes)
    assert not losses and [len(image["boxes"]) for image in found] == [0] * 4
