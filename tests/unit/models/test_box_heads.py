"""Choices of the heads that look at regions: pooling, sampling, and the from-scratch configurations."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import pytest
import torch
import yaml
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

from megdet_hpc.command_line import config_parser, named_configs, parse_config
from megdet_hpc.config import Config, FasterRcnnConfig, ModelConfig, NormConfig, TwoStageConfig, flatten
from megdet_hpc.data.batch import Batch
from megdet_hpc.engine.emulate import VirtualPasses
from megdet_hpc.engine.passes import Passes, RankPasses
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.models.backbones.base import Stage
from megdet_hpc.models.detector import Detector, Draws, torchvision_targets
from megdet_hpc.models.factory import build_detector
from megdet_hpc.models.heads.boxes import roi_pool
from megdet_hpc.models.heads.context import ContextPool
from megdet_hpc.models.heads.hard_examples import HardSampler, rate_regions
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.plan.__main__ import main as plan
from megdet_hpc.solver.precision import Precision, ready_for_half_precision
from tests import families
from tests.families import FAMILIES, SIDE, batch
from tests.parallel.equivalence import LOSS_TOLERANCE, WEIGHT_TOLERANCE
from tests.parallel.families import Seen, differences, one_update

LEVELS = [Stage(str(level), 2, 4 * 2**level) for level in range(4)]
IMAGES, HEIGHT, WIDTH = 2, 256, 320
BOXES = [
    torch.tensor([[6.0, 10.0, 30.0, 43.0], [0.0, 0.0, 300.0, 256.0], [1.9, 2.1, 2.0, 2.2]], dtype=torch.float64),
    torch.tensor([[17.0, 33.0, 180.0, 200.0], [311.0, 250.0, 320.0, 256.0]], dtype=torch.float64),
]


def maps() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = {stage.name: (IMAGES, 2, HEIGHT // stage.stride, WIDTH // stage.stride) for stage in LEVELS}
    # below 0, so that an empty bin, which is 0, is not what a maximum would be
    return {
        name: torch.rand(shape, generator=draw, dtype=torch.float64).sub(1).requires_grad_()
        for name, shape in shapes.items()
    }


def rounded(value: float) -> int:
    """The nearest whole number, halves away from zero."""
    return math.floor(value + 0.5)


def pooled_by_hand(level: Tensor, box: list[float], stride: int, side: int) -> Tensor:
    """(2, side, side) of one image, (2, H, W)."""
    left, top, right, bottom = (rounded(corner / stride) for corner in box)
    wide, high = max(right - left + 1, 1) / side, max(bottom - top + 1, 1) / side
    found = torch.zeros(2, side, side, dtype=level.dtype)
    for row in range(side):
        for column in range(side):
            rows = range(top + math.floor(row * high), top + math.ceil((row + 1) * high))
            columns = range(left + math.floor(column * wide), left + math.ceil((column + 1) * wide))
            inside = level[:, max(rows.start, 0) : rows.stop, max(columns.start, 0) : columns.stop]
            if inside.numel():
                found[:, row, column] = inside.amax((1, 2))
    return found


def test_roi_pool_takes_the_largest_value_of_whole_cells() -> None:
    """The level of each region is that of torchvision's RoIAlign; order and gradient are the regions'."""
    align, pool = (roi_pool(LEVELS, FasterRcnnConfig(roi_pool=kind)) for kind in ("align", "pool"))
    assert align.map_levels is not None
    levels = align.map_levels(BOXES).tolist()
    assert levels == [0, 2, 0, 1, 0]  # not in the order of the levels
    features = maps()
    found = pool(features, BOXES, [(HEIGHT, WIDTH)] * IMAGES)
    boxes = [(image, box) for image, own in enumerate(BOXES) for box in own.tolist()]
    for region, (image, box), level in zip(found, boxes, levels, strict=True):
        expected = pooled_by_hand(features[str(level)][image].detach(), box, LEVELS[level].stride, 7)
        assert torch.equal(region, expected)
    assert (found == 0).any(), "the box at the corner has bins without a cell"
    found.sum().backward()
    gradients = [features[stage.name].grad for stage in LEVELS]
    hit = [0 if gradient is None else int(gradient.sum()) for gradient in gradients]
    assert hit[3] == 0 and sum(hit) == int((found != 0).sum())
    assert not torch.equal(found, align(features, BOXES, [(HEIGHT, WIDTH)] * IMAGES))


def build(family: str, **keys: object) -> Detector:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, dataclasses.replace(FAMILIES[family], **keys))  # type: ignore[arg-type]
        return families.build(family)


@pytest.mark.parametrize("family", ["faster_rcnn", "cascade_mask_rcnn"])
def test_a_family_trains_and_finds_with_roi_pool(family: str) -> None:
    model = build(family, roi_pool="pool")
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("roi_pool")}
    assert kinds == {"MultiScaleRoIPool"}
    losses = model.losses(batch(), Draws(0, 0))
    torch.stack([loss.value for loss in losses.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all((image.boxes >= 0).all() for image in model.eval().detect(batch()))


def test_hard_sampler_keeps_the_highest_losses_after_nms() -> None:
    """Of two regions of a label that overlap by more than 0.7 the one of lower loss goes; -1 is never chosen."""
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9.5], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]]
    regions = torch.tensor(boxes, dtype=torch.float64)
    sampler = HardSampler(3, "x")
    sampler.rate([regions, regions[:1]], [torch.tensor([5.0, 4.9, 4.0, 3.0, 9.0, 1.0]), torch.tensor([0.1])])
    positive, negative = sampler([torch.tensor([0, 0, 2, 1, -1, 3]), torch.tensor([0])])
    assert [own.nonzero().flatten().tolist() for own in positive] == [[2, 3], []]
    assert [own.nonzero().flatten().tolist() for own in negative] == [[0], [0]]
    assert (int(sampler.num_sampled), int(sampler.num_positive)) == (4, 2)
    with pytest.raises(AssertionError, match="every image"):
        sampler([torch.tensor([0])])  # each call needs losses of its own


@pytest.mark.parametrize("family", ["faster_rcnn", "cascade_rcnn"])
def test_losses_of_regions_are_those_that_the_head_trains_on(family: str) -> None:
    """With all regions chosen, their mean is the sum of the losses; rating changes nothing in the model."""
    model = build(family, sampler="ohem", box_head="2fc")
    given, heads = batch(), model.get_submodule("roi_heads")
    stage = getattr(heads, "each", [heads])[0]
    features = model.backbone(model.normalized(given))  # type: ignore[operator]
    draw = torch.Generator().manual_seed(2)
    corners = torch.rand(4, 30, 2, 2, generator=draw, dtype=torch.float64).mul(SIDE).sort(2).values.flatten(2)
    proposals, targets = list(corners), torchvision_targets(given.targets)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rate_regions(stage, features, proposals, given.sizes, targets)
    rated = [losses for _, losses in stage.fg_bg_sampler.rated]
    assert [len(own) for own in rated] == [31, 33, 30, 30] and not any(own.requires_grad for own in rated)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(part.training for part in model.modules())
    stage.fg_bg_sampler = lambda labels: ([own > 0 for own in labels], [own == 0 for own in labels])
    _, losses = heads(features, proposals, given.sizes, targets)
    own_losses = [float(value.detach()) for value in list(losses.values())[:2]]
    assert float(torch.cat(rated).mean()) == pytest.approx(sum(own_losses), rel=1e-12)


@pytest.mark.parametrize("family", ["mask_rcnn", "cascade_mask_rcnn"])
def test_ohem_chooses_the_same_regions_on_two_ranks(family: str) -> None:
    """Thread ranks, one with all objects and one without any, against one process: losses, gradient, statistics."""

    def passes(kind: Callable[[Detector], Passes], batches: list[Batch]) -> Seen:
        model = build(family, sampler="ohem")
        sgd = SynchronizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
        one_update(model, sgd, kind(model), batches)  # the head's running statistics then are of a batch
        return one_update(model, sgd, kind(model), batches)

    expected = passes(lambda model: RankPasses(model, SerialCommunicator()), [batch()])
    found = passes(lambda model: VirtualPasses(model, BnGroups(2, 2, 0)), [batch(0, 2), batch(2, 4)])
    losses, gradient, statistics = differences(found, expected)
    assert losses < LOSS_TOLERANCE and gradient < WEIGHT_TOLERANCE and statistics < WEIGHT_TOLERANCE


def test_ohem_takes_harder_regions_and_works_in_half_precision() -> None:
    """The same weights, images and proposals; the mean loss of the chosen regions is higher."""
    means = {}
    for sampler in ("random", "ohem"):
        model = build("faster_rcnn", sampler=sampler)
        means[sampler] = float(model.losses(batch(), Draws(0, 0))["loss_classifier"].value.detach())
    assert means["ohem"] > 1.02 * means["random"]
    model = model.float()
    ready_for_half_precision(model)
    with Precision("bfloat16").autocast():
        losses = model.losses(batch(dtype=torch.float32), Draws(0, 0))
    assert float(losses["loss_classifier"].value.detach()) == pytest.approx(means["ohem"], rel=0.2)


def test_ohem_leaves_no_shortened_weights_behind() -> None:
    """torch before 2.11 would use them in the training pass, and the box head would get no gradient."""
    model = build("faster_rcnn", sampler="ohem").float()
    ready_for_half_precision(model)
    seen = []
    for module in model.roi_heads.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(
                lambda _, __: seen.append((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))
            )
    with Precision("bfloat16").autocast():
        losses = model.losses(batch(dtype=torch.float32), Draws(0, 0))
    assert (False, False) in seen and (True, True) in seen and (False, True) not in seen
    sum(loss.value for loss in losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.roi_heads.parameters())


@pytest.mark.parametrize("family", ["mask_rcnn", "cascade_mask_rcnn"])
def test_context_of_a_region_is_the_same_on_two_ranks(family: str) -> None:
    """Large kernels and global context with hard examples: losses, gradient and statistics of ranks and one process."""
    keys = {"large_kernels": 5, "large_kernel_channels": 4, "global_context": True, "sampler": "ohem"}

    def passes(kind: Callable[[Detector], Passes], batches: list[Batch]) -> Seen:
        model = build(family, **keys)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".context." in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(0))
        sgd = SynchronizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
        return one_update(model, sgd, kind(model), batches)

    expected = passes(lambda model: RankPasses(model, SerialCommunicator()), [batch()])
    found = passes(lambda model: VirtualPasses(model, BnGroups(2, 2, 0)), [batch(0, 2), batch(2, 4)])
    losses, gradient, statistics = differences(found, expected)
    assert losses < LOSS_TOLERANCE and gradient < WEIGHT_TOLERANCE and statistics < WEIGHT_TOLERANCE
    assert {f"large_kernels.norm.{level}.running_mean" for level in range(4)} <= set(expected[2])


def test_global_context_is_the_mean_of_the_image_without_its_padding() -> None:
    """It begins at zero; then each region of an image gets the same, whatever lies beyond the image's size."""
    pool = ContextPool(roi_pool(LEVELS, FasterRcnnConfig()), 2).double()
    sizes = [(HEIGHT, WIDTH), (200, 240)]
    plain = pool.pool(maps(), BOXES, sizes)
    assert torch.equal(pool(maps(), BOXES, sizes), plain)
    with torch.no_grad():
        pool.context.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    of_images = torch.tensor([[3.0, 5.0], [-1.0, 7.0]], dtype=torch.float64)
    constant = {name: of_images[:, :, None, None].expand_as(level) for name, level in maps().items()}
    expected = of_images * torch.tensor([1.0, 2.0])
    added = pool(constant, BOXES, sizes) - pool.pool(constant, BOXES, sizes)
    for image, regions in zip(expected, added.split([3, 2]), strict=True):
        assert (regions - image[:, None, None]).abs().max() < 1e-12
    features = maps()
    far = {name: level.detach().clone() for name, level in features.items()}
    for stage in LEVELS:
        far[stage.name][1, :, -(-200 // stage.stride) + 1 :] = 9.0
    assert torch.equal(pool(far, [BOXES[0], BOXES[1][:1]], sizes), pool(features, [BOXES[0], BOXES[1][:1]], sizes))


CONTEXT = [
    ({"large_kernels": 15}, (), 2 * 15 * 256 * 64 * 2 + 2 * (64 + 256)),
    ({"large_kernels": 15}, ("heads",), 2 * 15 * 256 * 64 * 2 + 2 * 64 + 4 * 2 * 256),
    ({"global_context": True}, ("heads",), 256 * 256 + 256),
    (
        {"squeeze_excitation": True},
        (),
        sum(n * (2 * c * c // 16 + c // 16 + c) for c, n in ((256, 3), (512, 4), (1024, 6), (2048, 3))),
    ),
]


@pytest.mark.parametrize(("keys", "where", "expected"), CONTEXT, ids=["kernels", "normalized", "context", "squeeze"])
def test_parameters_of_context_by_hand(keys: dict[str, object], where: tuple[str, ...], expected: int) -> None:
    norm = NormConfig(where=("backbone", "fpn", *where))  # type: ignore[arg-type]
    plain = FasterRcnnConfig(backbone_weights=None)
    without, model = on_meta(plain, norm), on_meta(dataclasses.replace(plain, **keys), norm)  # type: ignore[arg-type]
    numbers = [sum(p.numel() for p in each.parameters()) for each in (without, model)]
    assert numbers[1] - numbers[0] == expected


@pytest.mark.parametrize("length", [-3, 1, 2, 14])
def test_kernels_of_no_middle_are_refused(length: int) -> None:
    with pytest.raises(UserError, match=f"model.large_kernels is {length}; accepted: 0, or an odd number from 3 on"):
        Config(model=FasterRcnnConfig(large_kernels=length))


def named(name: str) -> Config:
    return parse_config(config_parser("megdet_hpc.train", "test"), ["--config", name])[0]


RETHINKING = [name for name in named_configs() if name.startswith("rethinking")]
ALIKE = re.compile(r"rethinking_(mask_)?r50_fpn_(gn|cgbn)_(\d)x")


def on_meta(model: ModelConfig, norm: NormConfig) -> Detector:
    with torch.device("meta"):
        return build_detector(Config(model=model, norm=norm), num_categories=80, group=SerialCommunicator())


def test_from_scratch_configurations_differ_in_their_name_alone() -> None:
    expected = {(mask, kind, n) for mask in (None, "mask_") for kind in ("gn", "cgbn") for n in "23456"}
    assert {ALIKE.fullmatch(name).groups() for name in RETHINKING} == expected  # type: ignore[union-attr]
    files = named_configs()
    base = flatten(yaml.safe_load(files["rethinking_r50_fpn_gn_2x"].read_text()))
    for name in RETHINKING:
        mask, kind, n = ALIKE.fullmatch(name).groups()  # type: ignore[union-attr]
        own = flatten(yaml.safe_load(files[name].read_text()))
        assert (own["norm.kind"], own["solver.policy"], own["solver.policy_n"]) == (kind, "nx", float(n))
        assert own["model.detector"] == ("mask_rcnn" if mask else "faster_rcnn")
        free = {"norm.kind", "solver.policy_n", "model.detector"}
        assert own.keys() == base.keys() and {key for key in own if own[key] != base[key]} <= free


@pytest.mark.parametrize("name", ["rethinking_r50_fpn_gn_2x", "rethinking_mask_r50_fpn_cgbn_6x"])
def test_from_scratch_nothing_is_frozen_and_no_norm_is_missing(name: str) -> None:
    """Counts by hand, 80 categories: torchvision's with 2 fully connected layers, 4 convolutions in place of one."""
    config = named(name)
    model = on_meta(config.model, config.norm)
    assert isinstance(config.model, TwoStageConfig) and config.model.backbone_weights is None
    assert all(p.requires_grad for p in model.parameters())
    norms = (nn.GroupNorm, CrossGpuBatchNorm2d)
    kinds = {type(module) for module in model.modules() if "Norm" in type(module).__name__}
    kinds -= {Conv2dNormActivation}
    assert kinds == {norms[config.norm.kind == "cgbn"]}
    # behind every convolution of backbone, FPN and heads there is a layer; the RPN and the last layers have none
    number = dict.fromkeys(("backbone.body", "backbone.fpn", "rpn", "roi_heads"), 0)
    convolutions = dict(number)
    for path, module in model.named_modules():
        part = next((part for part in number if path.startswith(part)), "")
        if isinstance(module, norms):
            number[part] += 1
        elif isinstance(module, nn.Conv2d) and "mask_predictor" not in path:
            convolutions[part] += 1
    heads = 8 if "mask" in name else 4
    assert number == {"backbone.body": 53, "backbone.fpn": 8, "rpn": 0, "roi_heads": heads}
    assert convolutions == number | {"rpn": 3}
    labels, width = 81, 256
    backbone = 23_508_032  # 25,557,032 of the classifier without its last layer
    fpn = (256 + 512 + 1024 + 2048) * width + 4 * 9 * width**2 + 8 * 2 * width  # no biases beside norms
    rpn = 9 * width**2 + width + 15 * (width + 1)
    box = 4 * (9 * width**2 + 2 * width) + 49 * width * 1024 + 1024 + 5 * labels * 1025
    mask = 4 * (9 * width**2 + 2 * width) + 4 * width**2 + width + labels * (width + 1)
    expected = backbone + fpn + rpn + box + (mask if "mask" in name else 0)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("name", ["rethinking_r50_fpn_gn_2x", "rethinking_mask_r50_fpn_cgbn_6x"])
def test_the_plan_of_a_from_scratch_configuration(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan(["--config", name, "--ranks", "8"])
    printed, end = capsys.readouterr(), int(name[-2]) * 90_000
    assert f"{end} in all" in printed.out and printed.err == ""
    rows = [line.split() for line in printed.out.splitlines() if "drop x 0.1" in line]
    assert [(int(row[0]), float(row[2])) for row in rows] == [(end - 60_000, 0.002), (end - 20_000, 0.0002)]


def test_the_challenge_configuration_joins_its_parts_and_trains() -> None:
    """Every part that its page names is on; at a small width each parameter gets a finite gradient."""
    config = named("megdet_challenge")
    wanted = {
        "detector": "mask_rcnn",
        "sampler": "ohem",
        "dilated_c5": True,
        "large_kernels": 15,
        "global_context": True,
        "roi_pool": "align",
    }
    assert {key: getattr(config.model, key) for key in wanted} == wanted
    assert len(config.data.short_sides) > 1 and len(config.evaluation.scales) > 1 and config.evaluation.flip
    keys = wanted | {"large_kernel_channels": 4, "box_head": "2fc"}
    del keys["detector"]
    model = families.build("mask_rcnn", norm=dataclasses.replace(config.norm, size=0), **keys)
    losses = model.losses(batch(), Draws(0, 0))
    torch.stack([loss.value for loss in losses.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(image.masks is not None for image in model.eval().detect(batch()))
