"""What the site's ReFrame checks take as a pass, from the output of a run. ReFrame's decorators do nothing here."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.unit.test_setup_env import ROOT

FINE = "preflight of 2 rank(s): 7 fine, 1 slow, 0 wrong\nmegdet status 0\n"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """The classes of tests/site/megdet_reframe.py."""
    sanity = {
        "assert_found": lambda pattern, text: bool(re.search(pattern, text)),
        "all": all,
        "assert_eq": lambda a, b: a == b,
        "count": len,
        "findall": re.findall,
    }
    builtins = {
        "performance_function": lambda unit: lambda body: body,
        "run_before": lambda stage: lambda body: body,
        "sanity_function": lambda body: body,
        "variable": lambda kind, value: value,
    }
    frame = {"RunOnlyRegressionTest": object, "simple_test": lambda check: check}
    for name, content in (
        ("reframe", frame),
        ("reframe.utility", {}),
        ("reframe.utility.sanity", sanity),
        ("reframe.core", {}),
        ("reframe.core.builtins", builtins),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            monkeypatch.setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module, raising=False)
    found: dict[str, type] = {"__file__": str(ROOT / "tests" / "site" / "megdet_reframe.py")}  # type: ignore[dict-item]
    exec((ROOT / "tests" / "site" / "megdet_reframe.py").read_text(), found)
    return found


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (FINE, True),
        (FINE.replace("0 wrong", "1 wrong"), False),
        (FINE.replace("status 0", "status 1"), False),
        (FINE.replace("of 2", "of 1"), False),
    ],
)
def test_a_preflight_that_found_a_fault_does_not_pass(checks: dict[str, type], text: str, passes: bool) -> None:
    check = SimpleNamespace(num_tasks=2, stdout=text)
    check.ended_well = lambda: checks["MegdetCheck"].ended_well(check)
    assert bool(checks["PreflightCheck"].all_ranks_are_fine(check)) is passes
