from __future__ import annotations

from megdet_hpc.engine.loop import _due, changed_keys


def test_changed_keys_are_named_with_both_values() -> None:
    old = {"seed": 0, "norm": {"kind": "cgbn", "size": 0}}
    new = {"seed": 0, "norm": {"kind": "bn", "size": 0, "unit": "images"}}
    assert changed_keys(old, new) == ["norm.kind: cgbn -> bn", "norm.unit: None -> images"]


def test_periods_in_epochs() -> None:
    assert [step for step in range(1, 31) if _due(step, 1.0, 10)] == [10, 20, 30]
    assert [step for step in range(1, 31) if _due(step, 1.5, 10)] == [15, 30]
    assert [step for step in range(1, 8) if _due(step, 0.25, 10)] == [3, 5]
    assert not any(_due(step, 0, 10) for step in range(1, 31))
