"""Batches that are on their way one update ahead, by the streams that torch has for CPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megdet_hpc.data.ahead import Update, ahead_on, on_device
from megdet_hpc.data.batch import Batch
from megdet_hpc.errors import UserError

CPU = torch.device("cpu")


def updates(number: int, read: list[int], bad: int = -1) -> Iterator[Update]:
    for step in range(number):
        read.append(step)
        if step == bad:
            raise UserError(f"picture {step} is damaged")
        yield [Batch(torch.full((1, 3, 2, 2), step, dtype=torch.uint8), [], [], [step, part], []) for part in (0, 1)]


def test_the_same_batches_in_the_same_order_one_update_ahead() -> None:
    read: list[int] = []
    seen = []
    for step, update in enumerate(ahead_on(updates(4, read), CPU)):
        assert read == list(range(min(step + 2, 4)))
        seen.append([batch.image_ids for batch in update])
    assert seen == [[batch.image_ids for batch in update] for update in updates(4, [])]
    assert list(ahead_on(updates(0, []), CPU)) == []


def test_an_error_comes_with_its_own_update() -> None:
    found = ahead_on(updates(4, [], bad=2), CPU)
    assert [next(found)[0].image_ids[0] for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match="picture 2 is damaged"):
        next(found)


def test_a_cpu_reads_nothing_ahead() -> None:
    read: list[int] = []
    found = on_device(updates(4, read), CPU)
    next(found)
    assert read == [0]
