from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megdet_hpc.config import Config, DataConfig, DsodConfig, FasterRcnnConfig, MaskRcnnConfig, SolverConfig
from megdet_hpc.engine.arithmetic import has_fixed_shapes, quickest_convolutions, set_arithmetic


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_the_default_is_torchs() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_arithmetic(Config())
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before == (True, False)


@pytest.mark.parametrize(("choice", "convolutions", "products"), [("none", False, False), ("all", True, True)])
def test_tf32_as_asked(choice: Any, convolutions: bool, products: bool) -> None:
    set_arithmetic(Config(solver=SolverConfig(tf32=choice)))
    assert torch.backends.cudnn.allow_tf32 is convolutions
    assert torch.backends.cuda.matmul.allow_tf32 is products


FIXED = DataConfig(padding="fixed")


@pytest.mark.parametrize(
    ("config", "fixed"),
    [
        (Config(), False),
        (Config(data=FIXED), True),
        (Config(data=FIXED, model=MaskRcnnConfig()), False),
        (Config(data=FIXED, model=FasterRcnnConfig(box_head="4conv1fc")), False),
        (Config(data=DataConfig(short_sides=(300,), val_short_side=300, max_side=300), model=DsodConfig()), True),
    ],
)
def test_the_search_is_for_fixed_shapes(config: Config, fixed: bool) -> None:
    assert has_fixed_shapes(config) is fixed
    with quickest_convolutions(config):
        assert torch.backends.cudnn.benchmark is fixed
    assert not torch.backends.cudnn.benchmark


def test_a_deterministic_run_does_not_search() -> None:
    with quickest_convolutions(Config(data=FIXED, deterministic=True)):
        assert not torch.backends.cudnn.benchmark
