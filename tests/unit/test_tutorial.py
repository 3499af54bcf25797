"""The commands of docs/tutorial.md, run in their order as they stand."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, environment

PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


pytestmark = pytest.mark.timeout(900)  # a minute of processor time in all, in one fixture


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all commands of the page have run."""
    folder = tmp_path_factory.mktemp("tutorial")
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 7
    for block in blocks:
        script = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(script, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        with open(folder / "output", "a", encoding="utf-8") as file:
            file.write(done.stdout)
    return folder


def test_it_leaves_what_it_says(walked: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"`((?:look|found|runs|packed|photos)/[\w./]+)`", page)
    assert len(set(named)) >= 8 and [name for name in named if not (walked / name).exists()] == []
    assert (walked / "detector.ts").stat().st_size > 1_000_000
    with Image.open(walked / "drawn.png") as drawn:
        assert drawn.size[0] >= 64


def test_the_detector_has_learnt_something(walked: Path) -> None:
    """A page whose detector finds nothing teaches nothing."""
    printed = (walked / "output").read_text(encoding="utf-8")
    (ap50,) = re.findall(r"^result: AP=[\d.]+ AP50=([\d.]+) output=runs/first$", printed, re.MULTILINE)
    assert float(ap50) > 0.1
    assert len(json.loads((walked / "found" / "detections.json").read_text())) > 10
