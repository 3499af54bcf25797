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
SUBMIT = ["--scheduler", "slurm", "--walltime", "1:00", "--config", "tiny", "--ranks", "2"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs; `megdet` is in its bin/."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("megdet_hpc", "data_prep", "jobs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip"]
    wheel = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    built = subprocess.run([*wheel, str(source)], capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = folder.glob("megdet_hpc-*.whl")
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder / "site"), str(file)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(source)
    return folder / "site"


def started(site: Path, words: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the installed package in a folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI", "SLURM", "VENV"))}
    environment = {**kept, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture
def call(site: Path, tmp_path: Path) -> Call:
    """call("-m", "module", ...) runs the installed package in an empty folder."""
    return lambda *arguments: started(site, [sys.executable, *arguments], tmp_path)


@pytest.fixture
def megdet(site: Path, tmp_path: Path) -> Call:
    """megdet("NAME", ...) runs the installed command in an empty folder."""
    return lambda *arguments: started(site, [str(site / "bin" / "megdet"), *arguments], tmp_path)


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


def test_megdet_leads_from_nothing_to_a_pack(megdet: Call) -> None:
    """Each command is taken from what the one before has printed."""
    listed = megdet()
    assert listed.returncode == 0 and listed.stderr == ""
    for name in ("shapes", "pack", "verify", "plan", "submit", "train", "evaluate", "doctor"):
        assert re.search(rf"^  {name} +\w", listed.stdout, re.MULTILINE), name
    asked = megdet("train")
    assert asked.returncode == 2
    assert "python" not in asked.stderr and "data_prep" not in asked.stderr
    assert re.search(r"COCO packed once: +megdet pack ", asked.stderr)
    assert re.search(r"^megdet shapes\.", asked.stderr, re.MULTILINE), asked.stderr
    drawn = megdet("shapes", "--output", "shapes", "--train", "3", "--val", "2", "--size", "64")
    assert drawn.returncode == 0, drawn.stderr
    data = ["--annotations", "shapes/annotations/instances_train.json", "--images", "shapes/train"]
    packed = megdet("pack", *data, "--output", "packed/train", "--workers", "2")
    assert packed.returncode == 0, packed.stderr
    assert re.search(r"^images +3$", packed.stdout, re.MULTILINE)
    assert megdet("verify", "packed/train").returncode == 0
    again = megdet("pack", *data, "--output", "packed/train")
    assert again.returncode != 0 and again.stderr.startswith("megdet pack: error: "), again.stderr
    planned = megdet("plan", "--config", "tiny", "--ranks", "2", "--data.train", "packed/train")
    assert planned.returncode == 0, planned.stderr
    assert "3 images" in planned.stdout, planned.stdout


@pytest.mark.parallel
def test_horovodrun_starts_megdet(megdet: Call, site: Path, tmp_path: Path) -> None:
    """Two ranks of the installed command are one run."""
    if not shutil.which("horovodrun"):
        pytest.skip("no horovodrun; tools/setup_env.sh installs it")
    megdet("shapes", "--output", "shapes", "--train", "2", "--val", "1", "--size", "64")
    data = ["--annotations", "shapes/annotations/instances_train.json", "--images", "shapes/train"]
    assert megdet("pack", *data, "--output", "packed/train").returncode == 0
    train = [str(site / "bin" / "megdet"), "train", "--config", "tiny", "--device", "cpu", "--output", "run"]
    keys = ["--data.train", "packed/train", "--data.val", "null", "--data.images_per_rank", "1"]
    words = ["timeout", "150", "horovodrun", "-np", "2", *train, *keys, "--max_steps", "1"]
    done = started(site, words, tmp_path, OMPI_MCA_rmaps_base_oversubscribe="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s)" in done.stdout and "trained 1 steps" in done.stdout, done.stdout
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001.pt"]


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


def test_submit_finds_the_files_of_its_jobs(megdet: Call, site: Path, tmp_path: Path) -> None:
    """The script runs in the folder of submission, with what the wheel holds, up to the launcher's command."""
    refused = megdet("submit", *SUBMIT, "--root", "/nowhere", "--dry-run")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "megdet submit: error: --root /nowhere: no such folder\n"
    rendered = megdet("submit", *SUBMIT, "--dry-run")
    assert rendered.returncode == 0, rendered.stderr
    assert f'root=${{MEGDET_ROOT:-"{tmp_path}"}}' in rendered.stdout
    script = tmp_path / "job.sh"
    script.write_text(rendered.stdout)
    shown = started(site, ["bash", str(script)], tmp_path, MEGDET_DRY_RUN="1", MEGDET_DATA="/my data")
    assert shown.returncode == 0, shown.stderr
    words = shlex.split(shown.stdout.splitlines()[-1])
    assert words[words.index("-m") - 1] == f"{sys.prefix}/bin/python" and "megdet_hpc.train" in words
    assert "/my data/train" in words and words[words.index("--output") + 1].startswith(f"{tmp_path}/runs/")


def test_submit_submits_from_any_folder(site: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(f'#!/bin/sh\nprintf "%s" "$1" > "{tmp_path}/submitted"\n')
    (programs / "sbatch").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = started(site, [str(site / "bin" / "megdet"), "submit", *SUBMIT], tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    script = Path((tmp_path / "submitted").read_text())
    assert script == tmp_path / "runs" / "submitted" / "tiny-2.sh"
    assert f"source {site}/megdet_hpc/jobs/common.sh" in script.read_text()
