"""tools/gpu_check.py at small sizes on the CPU, and what it says of a part that fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT, environment

PROGRAM = ROOT / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_it_writes_a_table_that_can_be_read(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--device", "cpu", "--only", "dec", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    (part,) = report["parts"]
    assert (part["part"], part["state"]) == ("decoding", "passed")
    assert part["rows"][0]["images/s"] > 0 and part["rows"][0]["mean difference"] == 0
    assert "| decoding | passed |" in (tmp_path / "gpu_check.md").read_text()
    assert report["machine"]["torch"] != "missing"


def test_a_part_that_fails_or_hangs_costs_itself_only(gpu_check: ModuleType, tmp_path: Path) -> None:
    broken = gpu_check.Part("broken", ("-c", "raise SystemExit('no GPU memory left')"), 60)
    found = gpu_check.run(broken, 0, tmp_path, 60)
    assert (found["state"], found["why"]) == ("failed", "status 1: no GPU memory left")
    hanging = gpu_check.Part("hanging", ("-c", "import time; print('begun', flush=True); time.sleep(99)"), 6)
    assert gpu_check.run(hanging, 1, tmp_path, 60)["why"] == "not done in 6 s; last line: begun"
    silent = gpu_check.Part("silent", ("-c", "pass"), 60, gpu_check.step_rows)
    assert "report cannot be read" in gpu_check.run(silent, 2, tmp_path, 60)["why"]
    assert gpu_check.run(broken, 3, tmp_path, 1)["why"] == "no time left"


RANKS = """
import signal, subprocess, sys, time
if len(sys.argv) == 1:
    for number in range(2):
        subprocess.Popen([sys.executable, __file__, str(number)], start_new_session=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("rank", flush=True)
time.sleep(99)
"""


def test_ranks_with_sessions_of_their_own_end_with_their_part(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts them, and deaf to its signal."""
    (tmp_path / "ranks.py").write_text(RANKS)
    ended: list[list[int]] = []
    end, marked = gpu_check.end, gpu_check.marked

    def watched(process: subprocess.Popen[bytes], mark: str) -> None:
        ended.append(marked(mark))
        end(process, mark)
        ended.append(marked(mark))

    monkeypatch.setattr(gpu_check, "end", watched)
    monkeypatch.setattr(gpu_check, "_GRACE_SECONDS", 1.0)
    part = gpu_check.Part("ranks", (str(tmp_path / "ranks.py"),), 6)
    assert "not done in 6 s; last line: rank" in gpu_check.run(part, 0, tmp_path, 60)["why"]
    assert [len(pids) for pids in ended] == [3, 0]


def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str], gpu_check: ModuleType) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--only", "nothing like it"])
    assert ended.value.code == 2
    assert "no part has it; parts: the layer is exact" in capsys.readouterr().err
