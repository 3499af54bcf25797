"""The package alone, installed from its wheel and used from another folder: no checkout is near."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

Call = Callable[..., subprocess.CompletedProcess[str]]
SUBMIT = ["--scheduler", "slurm", "--walltime", "1:00", "--config", "tiny", "--ranks", "2", "--dry-run"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("megdet_hpc", "data_prep"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*install, "--target", str(folder / "site"), str(source)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture
def call(site: Path, tmp_path: Path) -> Call:
    """call("-m", "module", ...) runs the installed package in an empty folder."""

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI", "SLURM"))}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**kept, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )

    return start


def test_the_packer_that_train_names_packs(call: Call, site: Path, tmp_path: Path) -> None:
    """The way of a user: train without data, then the commands of its message, with a set that is drawn."""
    asked = call("-m", "megdet_hpc.train")
    assert asked.returncode == 2
    assert "data_prep/" not in asked.stderr
    named = re.search(r"COCO packed once: +python (-m [\w.]+) ", asked.stderr)
    drawn = re.search(r"^python (-m data_prep\.make_shapes)\.", asked.stderr, re.MULTILINE)
    assert named and drawn, asked.stderr
    numbers = ["--train", "3", "--val", "2", "--size", "64"]
    shown = call(*drawn[1].split(), "--output", "shapes", *numbers)
    assert shown.returncode == 0, shown.stderr
    data = ["--annotations", "shapes/annotations/instances_train.json", "--images", "shapes/train"]
    packed = call(*named[1].split(), *data, "--output", "packed/train", "--workers", "2")
    assert packed.returncode == 0, packed.stderr
    assert re.search(r"^images +3$", packed.stdout, re.MULTILINE)
    checked = call("-m", "data_prep.verify_pack", "packed/train")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    which = call("-c", "import data_prep, megdet_hpc; print(data_prep.__file__, megdet_hpc.__file__)")
    assert which.stdout.split() == [str(site / name / "__init__.py") for name in ("data_prep", "megdet_hpc")]


def test_messages_name_what_is_there(call: Call, site: Path) -> None:
    unpacked = call("-m", "data_prep.pack_coco")
    script = re.search(r"no such folder; bash (\S+) gets it", unpacked.stderr)
    assert unpacked.returncode != 0 and script, unpacked.stderr
    assert Path(shlex.split(script[1])[0]) == site / "data_prep" / "fetch_coco.sh"
    assert Path(script[1]).is_file()
    for module in ("pack_coco", "verify_pack", "stage_pack", "show_pack", "voc_to_coco", "rebuild_coco", "make_shapes"):
        text = call("-m", f"data_prep.{module}", "--help").stdout
        assert f"python -m data_prep.{module} " in text, text
        assert f"data_prep/{module}.py" not in text


def test_submit_refuses_the_same_with_and_without_dry_run(call: Call, site: Path) -> None:
    for arguments in (SUBMIT, SUBMIT[:-1]):
        refused = call("-m", "megdet_hpc.submit", *arguments)
        assert refused.returncode == 2
        assert refused.stdout == ""
        assert f"no jobs/common.sh in {site}; name a checkout that all nodes see with --root" in refused.stderr
    assert not (site / "runs").exists()
    rendered = call("-m", "megdet_hpc.submit", *SUBMIT, "--root", str(ROOT))
    assert rendered.returncode == 0, rendered.stderr
    assert f'root=${{MEGDET_ROOT:-"{ROOT}"}}' in rendered.stdout
