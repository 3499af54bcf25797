from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from megdet_hpc.config import Config, DsodConfig, EmulateConfig, FasterRcnnConfig
from megdet_hpc.engine.compiled import compile_dense
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.parallel.serial import SerialCommunicator


class Trunk(nn.Module):
    """What compile_dense asks of a detector, small enough to compile in seconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = CrossGpuBatchNorm2d(4, group=SerialCommunicator())
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 1))
        self.register_buffer("pixel_mean", torch.zeros(1), persistent=False)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_a_compiled_trunk_gives_the_same_under_the_same_keys() -> None:
    plain = Trunk().double()
    compiled = copy.deepcopy(plain)
    compile_dense(compiled)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):
        found = [model.backbone(x) for model in (plain, compiled)]
        for one in found:
            one.square().sum().backward()
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    assert float((gradient(compiled) - gradient(plain)).abs().max() / gradient(plain).abs().max()) < 1e-12
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for name, value in compiled.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
    plain.load_state_dict(compiled.state_dict())
    with torch.compiler.set_stance("fail_on_recompile"):  # an evaluation compiles nothing
        for side in (9, 11):
            image = torch.ones(1, 3, side, side, dtype=torch.float64)
            assert torch.equal(compiled.eval().backbone(image), plain.eval().backbone(image))


def test_a_host_that_cannot_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/such/compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.raises(UserError, match=r"model.compile is true, but torch .* cannot compile for cpu on this host: .*"):
        compile_dense(Trunk())  # type: ignore[arg-type]


def test_what_it_does_not_go_with_is_refused() -> None:
    for model, ranks, key in (
        (FasterRcnnConfig(compile=True), 2, "emulate.ranks"),
        (DsodConfig(compile=True, memory_efficient=True), 0, "model.memory_efficient"),
    ):
        with pytest.raises(UserError, match=f"model.compile is True; accepted: false with {key}"):
            Config(model=model, emulate=EmulateConfig(ranks=ranks))
