"""Dense layers with and without recomputation: the same bits, the same messages, statistics that move once."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import DenseNet

from megdet_hpc.config import NormConfig
from megdet_hpc.layers.norm import norm_layer
from megdet_hpc.models.backbones.base import Backbone
from megdet_hpc.models.backbones.dense_layer import DenseBlock
from megdet_hpc.models.backbones.densenet import DenseNetBackbone
from megdet_hpc.models.backbones.peleenet import build_peleenet
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks

LOCK = threading.Lock()


class Listening(SerialCommunicator):
    """A group of one rank that notes the names of its messages."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        self.names.append(name)
        super().allreduce_sum_(tensor, name=name)

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        self.names.append(name)
        return super().allgather_tensor(tensor, name=name)


def passed(norm: NormConfig, memory_efficient: bool) -> tuple[list[Tensor], dict[str, Tensor], list[str], int]:
    """Gradients, state and messages of a pass, and the bytes that autograd saves."""
    group = Listening()
    torch.manual_seed(0)
    make = norm_layer(norm, "backbone", group)
    assert make is not None
    block = DenseBlock(3, 4, 8, 4, make, memory_efficient)
    x = torch.randn(2, 4, 9, 9).mul_(3).add_(20).requires_grad_()  # far from 0: the layer then centres its values
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(x)
    out.square().sum().backward()
    gradients = [p.grad for p in (x, *block.parameters())]
    return [g for g in gradients if g is not None], block.state_dict(), group.names, sum(kept.values())


@pytest.mark.parametrize("kind", ["cgbn", "packed", "bn", "gn"])
def test_recomputation_changes_no_bit_and_sends_nothing(kind: str) -> None:
    norm = NormConfig(kind="cgbn", exchange="packed") if kind == "packed" else NormConfig(kind=kind)  # type: ignore[arg-type]
    gradients, state, names, saved = passed(norm, False)
    again, state_again, names_again, saved_again = passed(norm, True)
    assert len(gradients) == 19
    assert all(torch.equal(own, other) for own, other in zip(gradients, again, strict=True))
    assert all(torch.equal(value, state_again[key]) for key, value in state.items())
    assert names == names_again and len(names) == {"cgbn": 18, "packed": 12}.get(kind, 0)
    if kind != "gn":
        assert state["0.norm1.num_batches_tracked"] == 1
    assert saved_again < 0.75 * saved


def dense_network(name: str, group: Communicator, memory_efficient: bool) -> Backbone:
    torch.manual_seed(0)
    make = norm_layer(NormConfig(), "backbone", group)
    if name == "peleenet":
        return build_peleenet(make, (1, 3, 1, 1), growth=8, stem_width=8, memory_efficient=memory_efficient)
    return DenseNetBackbone(DenseNet(4, (1, 4, 1, 4), num_init_features=16, bn_size=2), make, memory_efficient)


@pytest.mark.parametrize("name", ["densenet", "peleenet"])
def test_recomputed_networks_on_two_ranks(name: str) -> None:
    """Ranks with three images and with one: the bits of the gradients and of the running statistics."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def rank(group: Communicator) -> list[tuple[dict[str, Tensor], dict[str, Tensor], int]]:
        seen = []
        for memory_efficient in (False, True):
            with LOCK:  # first weights come from the generator that threads share
                body = dense_network(name, group, memory_efficient)
            kept: dict[int, int] = {}

            def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                levels = body(images.split([3, 1])[group.rank]).values()
            sum((level.square().sum() for level in levels), start=torch.zeros(())).backward()
            gradients = {key: p.grad for key, p in body.named_parameters() if p.grad is not None}
            weights = {p.untyped_storage()._cdata for p in body.parameters()}
            seen.append((gradients, body.state_dict(), sum(size for key, size in kept.items() if key not in weights)))
        return seen

    for (gradients, state, saved), (again, state_again, saved_again) in run_ranks(2, rank):
        assert list(gradients) == list(again) and len(gradients) > 50
        assert all(torch.equal(value, again[key]) for key, value in gradients.items())
        assert list(state) == list(state_again)
        assert all(torch.equal(value, state_again[key]) for key, value in state.items())
        assert saved_again < 0.93 * saved


def test_evaluation_keeps_nothing_and_computes_the_same() -> None:
    make = norm_layer(NormConfig(), "backbone", SerialCommunicator())
    assert make is not None
    block = DenseBlock(2, 4, 8, 4, make, True)
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        block(x)
    tracked = block.get_submodule("0.norm1").num_batches_tracked
    assert tracked == 1
    block.eval()
    assert torch.equal(block(x), block(x)) and isinstance(block[0], nn.Module)
