"""The end of tools/demo.sh, whose programs are stand-ins here; tests/cases and the tutorial run the programs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.unit.test_setup_choices import command
from tests.unit.test_setup_env import ROOT, run

PYTHON = f"""
case "$1" in
-) exec {sys.executable} "$@" ;;
data_prep/pack_coco.py) for last; do :; done; mkdir -p "$last"; echo '{{"skipped": []}}' >"$last/manifest.json" ;;
esac
"""


@pytest.mark.parametrize(
    ("said", "status", "last"),
    [
        ("result: AP=0.123 AP50=0.456 images=8", 0, "result: AP=0.123 AP50=0.456 output={}"),
        ("result: nothing to score images=8", 0, "result: nothing to score output={}"),
        ("stopped", 1, "demo: the evaluation printed no result"),
    ],
)
def test_the_demo_ends_with_a_result_or_a_reason(tmp_path: Path, said: str, status: int, last: str) -> None:
    data, output = tmp_path / "data", tmp_path / "output"
    (data / "images").mkdir(parents=True)
    (data / "annotations").mkdir()
    for split in ("train", "val"):
        (data / "annotations" / f"instances_{split}.json").touch()
    command(tmp_path / "env" / "bin", "python", PYTHON)
    train = f"mkdir -p {output}/run/checkpoints; touch {output}/run/checkpoints/step_00000001.pt"
    command(
        tmp_path / "env" / "bin",
        "horovodrun",
        f'case "$*" in *megdet_hpc.evaluate*) echo "[1,0]<stdout>:{said}" ;; *) {train} ;; esac',
    )
    done = run(ROOT / "tools" / "demo.sh", data, VENV=str(tmp_path / "env"), DEMO_OUTPUT=str(output))
    assert done.returncode == status, done.stdout + done.stderr
    assert (done.stderr if status else done.stdout).splitlines()[-1] == last.format(output)
