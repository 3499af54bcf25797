"""Deterministic operators: asked for, refused by name, and no change of a CPU's bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megdet_hpc.engine.checkpoint import load_checkpoint
from megdet_hpc.engine.deterministic import make_deterministic, naming_operators
from megdet_hpc.errors import UserError
from megdet_hpc.train import main
from tests.parallel.test_training import arguments, newest


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_an_operator_without_such_a_form_is_named() -> None:
    make_deterministic()
    values = torch.zeros(3)
    with (
        pytest.raises(UserError, match=r"no deterministic form of put_ .*--deterministic false"),
        naming_operators(True),
    ):
        values.put_(torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(RuntimeError, match="something else"), naming_operators(True):
        raise RuntimeError("something else")


def test_another_workspace_of_cublas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'; accepted: :4096:8, :16:8"):
        make_deterministic()


def test_a_run_on_a_cpu_has_the_same_bits_with_and_without(shapes: Path, tmp_path: Path) -> None:
    models = []
    for choice in ("true", "false"):
        output = tmp_path / choice
        main(arguments(shapes, output, "--data.val", "null", "--max_steps", "2", "--deterministic", choice)[2:])
        models.append(load_checkpoint(newest(output))["model"])
        assert torch.are_deterministic_algorithms_enabled() is (choice == "true")
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
