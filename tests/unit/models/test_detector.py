from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from megdet_hpc.config import Config, FasterRcnnConfig, NormConfig, SolverConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.sample import Target
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.layers.frozen import FrozenNorm
from megdet_hpc.models.detector import Draws
from megdet_hpc.models.detectors.faster_rcnn import FasterRcnn
from megdet_hpc.models.factory import build_detector
from megdet_hpc.models.sampling import SeededSampler
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.solver.optimizer import build_optimizer

TINY = FasterRcnnConfig(
    backbone="resnet10",
    neck_channels=32,
    box_head_channels=64,
    anchor_sizes=(12, 24, 48, 96, 160),
    rpn_samples_per_image=32,
    roi_samples_per_image=32,
)


def build(model: FasterRcnnConfig = TINY, norm: NormConfig | None = None, seed: int = 0) -> FasterRcnn:
    config = Config(model=model, norm=norm or NormConfig(), seed=seed)
    model = build_detector(config, num_categories=3, group=SerialCommunicator())
    assert isinstance(model, FasterRcnn)
    return model


def batch() -> Batch:
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[10.0, 10.0, 50.0, 60.0]])
    some = Target.ordinary(boxes, torch.tensor([2]))
    none = Target.ordinary(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return Batch(images, [(96, 120), (90, 128)], [(1.0, 1.0)] * 2, [11, 12], [some, none])


def test_state_dict_has_torchvisions_keys_and_shapes() -> None:
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4).state_dict()
    ours = build(FasterRcnnConfig()).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("norm", "backbone", "neck"),
    [
        (NormConfig(kind="cgbn", where=("backbone", "fpn")), CrossGpuBatchNorm2d, CrossGpuBatchNorm2d),
        (NormConfig(kind="bn"), nn.BatchNorm2d, None),
        (NormConfig(kind="gn", where=("backbone", "fpn")), nn.GroupNorm, nn.GroupNorm),
        (NormConfig(kind="cgbn", where=("fpn",)), FrozenNorm, CrossGpuBatchNorm2d),
    ],
)
def test_norm_layers_by_part(norm: NormConfig, backbone: type, neck: type | None) -> None:
    model = build(norm=norm)
    kinds = (nn.BatchNorm2d, nn.GroupNorm, FrozenNorm)

    def found(part: nn.Module) -> set[type]:
        return {type(m) for m in part.modules() if isinstance(m, kinds)}

    assert found(model.backbone.body) == {backbone}  # type: ignore[arg-type]
    assert found(model.backbone.fpn) == ({neck} if neck else set())  # type: ignore[arg-type]
    assert found(model.roi_heads) == set()


def test_losses_gradients_and_detections() -> None:
    model = build(dataclasses.replace(TINY, box_head="4conv1fc"), NormConfig(where=("backbone", "fpn", "heads")))
    losses = model.losses(batch(), Draws(0, 0))
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    torch.stack([loss.value for loss in losses.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    for found in model.detect(batch()):
        assert found.boxes.shape == (len(found.scores), 4) and found.labels.shape == found.scores.shape


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build(seed=3).state_dict()
    torch.manual_seed(2)
    second = build(seed=3).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = build(seed=4).state_dict()
    assert not torch.equal(first["backbone.body.conv1.weight"], other["backbone.body.conv1.weight"])


def test_box_sampling_depends_on_image_and_step_alone() -> None:
    labels = [(torch.arange(200) % 3 == 0).float(), (torch.arange(300) % 5 == 0).float()]

    def draw(step: int, ids: list[int], which: list[int]) -> list[torch.Tensor]:
        sampler = SeededSampler(20, 0.5, "rpn")
        sampler.prepare(Draws(0, step), ids)
        return sampler([labels[i] for i in which])[1]

    together = draw(5, [100, 200], [0, 1])
    assert torch.equal(together[1], draw(5, [200], [1])[0])
    assert torch.equal(together[0], draw(5, [200, 100], [1, 0])[1])
    assert not torch.equal(together[0], draw(6, [100], [0])[0])
    assert int(together[0].sum()) == 10


def test_padding_is_zero_after_normalization() -> None:
    """What lies beyond an image's size must not reach the model, whatever the loader put there."""
    model = build().eval()
    given = batch()
    clean = given.images.clone()
    clean[0, :, :, 120:], clean[1, :, 90:] = 0, 0
    first, second = model.detect(given), model.detect(dataclasses.replace(given, images=clean))
    assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(first, second, strict=True))


def test_backbone_weights_from_a_local_file(tmp_path: Path) -> None:
    file = tmp_path / "resnet18.pth"
    theirs = resnet18()
    torch.save(theirs.state_dict(), file)
    model = build(dataclasses.replace(TINY, backbone="resnet18", backbone_weights=str(file), frozen_stages=2))
    body = model.backbone.body
    assert torch.equal(body.layer3[0].conv1.weight, theirs.layer3[0].conv1.weight)  # type: ignore[union-attr,index]
    frozen = {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad}  # type: ignore[union-attr]
    assert frozen == {"conv1", "layer1"}
    assert isinstance(body.bn1, FrozenNorm)  # its statistics stay as loaded, and it sends no messages
    assert not any(isinstance(m, CrossGpuBatchNorm2d) for m in body.layer1.modules())  # type: ignore[union-attr]
    assert any(isinstance(m, CrossGpuBatchNorm2d) for m in body.layer2.modules())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("norm", "frozen_stages", "refused"),
    [
        (NormConfig(kind="frozen"), 0, True),
        (NormConfig(where=("fpn",)), 0, True),
        (NormConfig(), 1, True),
        (NormConfig(), 0, False),
        (NormConfig(kind="gn"), 2, False),  # has no statistics
    ],
)
def test_weights_without_statistics_are_no_constants(
    tmp_path: Path, norm: NormConfig, frozen_stages: int, refused: bool
) -> None:
    file = tmp_path / "group_norm.pth"
    torch.save({key: value for key, value in resnet18().state_dict().items() if "running" not in key}, file)
    model = dataclasses.replace(TINY, backbone="resnet18", backbone_weights=str(file), frozen_stages=frozen_stages)
    if not refused:
        body = build(model, norm).backbone.body.state_dict()  # type: ignore[union-attr]
        assert torch.equal(body["conv1.weight"], torch.load(file)["conv1.weight"])
        return
    with pytest.raises(UserError, match=rf"{file}: has no running statistics \(bn1\.running_mean"):
        build(model, norm)


def test_bad_backbone_weights_name_the_file(tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.pth", tmp_path / "other.pth"
    broken.write_bytes(b"no tensors")
    torch.save({"conv1.weight": torch.zeros(1)}, other)
    for file, message in ((tmp_path / "none.pth", "no such file"), (broken, "not a file of tensors"), (other, "fit")):
        with pytest.raises(UserError, match=f"{file.name}.*{message}"):
            build(dataclasses.replace(TINY, backbone_weights=str(file)))


def test_a_boxs_share_of_the_loss_is_its_share_of_all_ranks_boxes() -> None:
    model = build()
    losses = model.losses(batch(), Draws(0, 0))
    assert all(1 <= int(loss.count) <= 2 * 32 for loss in losses.values())  # sampled boxes of both images
    assert all(loss.divided_by is loss.count for loss in losses.values())


@pytest.mark.parametrize(
    ("choice", "trained", "decays"), [("decay", True, True), ("no_decay", True, False), ("frozen", False, True)]
)
def test_norm_parameters_are_one_switch(choice: str, trained: bool, decays: bool) -> None:
    model = build(norm=NormConfig(parameters=choice))  # type: ignore[arg-type]
    optimizer = build_optimizer(model, SolverConfig(weight_decay=0.5), decay_norm=choice == "decay")
    norm = model.backbone.body.bn1.weight  # type: ignore[union-attr]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert norm.requires_grad == trained
    assert decay.get(id(norm)) == ((0.5 if decays else 0.0) if trained else None)
    assert decay[id(model.backbone.body.conv1.weight)] == 0.5  # type: ignore[union-attr]


def test_roi_strides_do_not_come_from_the_first_batchs_padding() -> None:
    """torchvision's own inference takes 24 / 40 for stride 4 here, and would keep stride 2 for the whole run."""
    model = build().eval()
    model.detect(Batch(torch.zeros(1, 3, 96, 96, dtype=torch.uint8), [(40, 96)], [(1.0, 1.0)], [1], []))
    assert model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]  # type: ignore[union-attr]
