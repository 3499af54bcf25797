from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megdet_hpc.bench.__main__ import main
from megdet_hpc.bench.messages import gradient_messages, kind_of
from megdet_hpc.parallel.buckets import BucketOptimizer
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from tests.conftest import HAS_HOROVOD, Here, Launch


def test_messages_of_layers_differ_by_their_path_alone() -> None:
    assert kind_of("cgbn.backbone.body.layer1.0.bn1.mean") == "cgbn.*.mean"
    assert kind_of("losses") == "losses"


@pytest.mark.parametrize(("most_bytes", "messages"), [(None, 1), (40, 2), (1, 4)])
def test_gradients_are_as_many_messages_as_their_carrier_sends(most_bytes: int | None, messages: int) -> None:
    """Two layers of 3 x 3 weights and 3 offsets: 36 and 12 bytes each."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    sent: list[str] = []

    def send(buffer: Tensor, name: str) -> Callable[[], object]:
        sent.append(name)
        return lambda: None

    buckets = BucketOptimizer(inner, model, 1, "none", False, size=2, send=send, most_bytes=most_bytes)
    model(torch.ones(1, 3)).sum().backward()
    buckets.synchronize()
    trained = list(model.parameters())
    assert gradient_messages(buckets, trained) == len(sent) == messages
    assert gradient_messages(SynchronizedOptimizer(inner), trained) == 4


@pytest.mark.timeout(400)
def test_the_messages_of_a_step(launch: Launch, tmp_path: Path) -> None:
    small = ["--backbone", "resnet18", "--images", "1", "--image-size", "64", "--device", "cpu", "--overlap", "false"]
    options = [*small, "--repeats", "1", "--warmup", "1", "--json", str(tmp_path / "r.json")]
    done = launch(2, "-m", "megdet_hpc.bench", "messages", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    counts = {row["collective"]: row["messages a step"] for row in report["messages of a step"]}
    # 20 layers of the backbone and 8 of the FPN; two messages forward and one backward
    layers = dict.fromkeys(("cgbn.*.mean", "cgbn.*.var", "cgbn.*.backward"), 28)
    gradients = 98 if HAS_HOROVOD else 3  # a parameter, or 25 MiB of 47 MB that begin with the last layers
    assert counts == {**layers, "losses": 1, "gradients": gradients, "all": 85 + gradients}
    shares = [row["share of the step"] for row in report["messages of a step"]]
    assert 0 < shares[-1] < 1 and sum(shares[:-1]) == pytest.approx(shares[-1])
    assert "after the backward pass" in report["transports"]


def test_one_rank_is_refused(here: Here) -> None:
    done = here(main, ["messages"])
    assert done.returncode == 2 and "one rank sends no messages; start two or more" in done.stderr
