"""The recipes of packaging/, the Dockerfile and the container definition follow setup.cfg and each other."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

from megdet_hpc import __version__

ROOT = Path(__file__).resolve().parents[2]
SPACK = ROOT / "packaging" / "spack" / "megdet_hpc" / "packages" / "py_megdet_hpc" / "package.py"
[EASYBUILD] = (ROOT / "packaging" / "easybuild").glob("*.eb")
# names that a recipe has for them, or what they come with
OTHER_NAMES = {"torch": ("torch", "PyTorch"), "pillow": ("pil", "torchvision"), "numpy": ("numpy", "SciPy-bundle")}


def required() -> list[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["options"]["install_requires"].split("\n")
    return [re.split(r"[^\w-]", line)[0] for line in lines if line]


def test_recipes_name_every_requirement() -> None:
    assert len(required()) == 11
    for file in (SPACK, EASYBUILD):
        text = file.read_text(encoding="utf-8")
        ast.parse(text)
        named = {name.lower() for name in re.findall(r"[\w-]+", text)}
        for name in required():
            names = OTHER_NAMES.get(name, (name,))
            assert named & {word.lower() for own in names for word in (own, f"py-{own}")}, (file.name, name)
        assert __version__ in text


def test_what_sites_lack_is_not_required_and_still_installed() -> None:
    """A recipe without a required package fails `pip check`."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert "hotcoco" not in required() and "hotcoco>=1.3" in config["options.extras_require"]["fast"].split()
    conda = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "- hotcoco>=1.3\n" in conda
    for name in ("setup_env.sh", "setup_site.sh"):
        script = (ROOT / "tools" / name).read_text(encoding="utf-8")
        assert re.search(r'"install_requires"\] \+ .*\["fast"\]', script), name


def test_both_images_have_the_same_packages_of_debian() -> None:
    found = []
    for file in (ROOT / "Dockerfile", ROOT / "jobs" / "megdet.def"):
        text = file.read_text(encoding="utf-8")
        assert "debian:bookworm-slim" in text and "HOROVOD_BUILD=nccl" in text
        [packages] = re.findall(r"--no-install-recommends ([\w+ \\\n-]+?)(?:\s+&&|\n    rm)", text)
        found.append(sorted(packages.replace("\\", "").split()))
    assert found[0] == found[1] and "libopenmpi-dev" in found[0]
