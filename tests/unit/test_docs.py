"""The site and its links, what the README and its neighbours point at, and messages that the code has."""

from __future__ import annotations

import configparser
import dataclasses
import re
import sys
from pathlib import Path

import pytest
import yaml

from megdet_hpc import __version__
from megdet_hpc.commands import COMMANDS
from megdet_hpc.config import DETECTORS, Config, flatten, to_dict
from tests.conftest import ROOT, run

# Pages that the site does not hold, or that are read outside of it first.
OUTSIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "data_prep/README.md")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SOURCES = [
    *(file for folder in ("megdet_hpc", "data_prep", "tools") for file in sorted((ROOT / folder).rglob("*.py"))),
    *(file for folder in ("jobs", "tools") for file in sorted((ROOT / folder).glob("*.sh"))),
]
SHORTEST_PIECE = 6


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A link to a page or heading that is not there fails the build."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--jobs", "2"]
    built = run([*build, "docs", str(folder)])
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    pages = {file.stem for file in (ROOT / "docs").glob("*.md")}
    assert pages == {file.stem for file in site.glob("*.html")} - {"genindex", "search", "py-modindex"}
    listed = re.findall(r'class="reference internal" href="([\w-]+)\.html"', (site / "index.html").read_text())
    assert pages - {"index"} <= set(listed), "a page that the index does not name"


def test_the_pages_load_nothing_from_elsewhere(site: Path) -> None:
    """A login node has no internet, and a reader's address is nobody's business."""
    loaded = re.compile(r'<(?:link|script|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"|@import|url\(https?:')
    files = [file for file in site.rglob("*") if file.suffix in (".html", ".css")]
    assert len(files) > 20
    assert [(file.name, found[0]) for file in files if (found := loaded.search(file.read_text()))] == []


def test_the_search_knows_the_pages(site: Path) -> None:
    """Its index is a script beside the pages, so it also works where they are opened as files."""
    index = (site / "searchindex.js").read_text()
    assert "troubleshooting" in index and "data_format" in index


def test_python_is_documented_from_the_code(site: Path) -> None:
    text = (site / "api.html").read_text()
    assert all(f'id="megdet_hpc.{name}"' in text for name in ("predict.detector.load", "data.packed_coco.PackedCoco"))


def test_every_key_is_in_the_tables(site: Path) -> None:
    """A family that is entered in DETECTORS comes to the page by itself."""
    text = (site / "configuration.html").read_text()
    known = [key for key in flatten(to_dict(Config())) if not key.startswith("model.")]
    known += [f"model.{field.name}" for family in DETECTORS.values() for field in dataclasses.fields(family)]
    assert len(known) > 50
    assert [key for key in known if f'<span class="pre">{key}</span>' not in text] == []


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", OUTSIDE)
def test_links_outside_of_the_site(name: str) -> None:
    page, dead = ROOT / name, []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if not target.startswith("https://") and not (there.is_file() and (not anchor or anchor in anchors(there))):
            dead.append(target)
    assert dead == []


def test_the_readme_begins_with_what_a_visitor_looks_for() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    order = ("![", "make demo", "make test", "\n| `megdet train` |", "three lines", "python data_prep/pack_coco.py")
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    for command in ("horovodrun -np 128 python -m megdet_hpc.train", "sbatch jobs/megdet_128gpu.sh"):
        assert f"    {command}\n" in text
    (picture,) = re.findall(r"!\[[^]]*\]\((.+?)\)", text)
    assert (ROOT / picture).stat().st_size < 300_000


def test_every_command_has_a_page() -> None:
    pages = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "docs").glob("*.md"))
    pages += (ROOT / "data_prep" / "README.md").read_text(encoding="utf-8")
    programs = {name: Path(command.program.replace(".", "/")).stem for name, command in COMMANDS.items()}
    assert [n for n, p in programs.items() if f"megdet {n}" not in pages and not re.search(rf"\b{p}\b", pages)] == []


def source_text() -> str:
    """All sources with texts that go over several lines joined."""
    joined = (re.sub(r'"\s*\\?\n\s*(?:\+ )?f?"', "", file.read_text(encoding="utf-8")) for file in SOURCES)
    return "\n".join(joined)


def test_messages_of_the_troubleshooting_page_are_in_the_code() -> None:
    """What stands between the dots of a message is a text of a program."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    first = re.findall(r"^\| (`.+?) \| ", page, re.MULTILINE)
    ours = [row for row in first if "PMI2" not in row and "orted" not in row]
    text, missing = source_text(), []
    for message in (message for row in ours for message in re.findall("`(.+?)`", row)):
        pieces = [piece.strip("() ") for piece in message.split("...")]
        missing += [message for piece in pieces if len(piece) >= SHORTEST_PIECE and piece not in text]
    assert len(ours) > 35 and missing == []


def test_the_version_is_one() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert setup["metadata"]["version"] == __version__
    released = re.search(r"^## \[([\d.]+)\] - (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert released and released.groups() == (cited["version"], cited["date-released"]) == (__version__, released[2])


def test_the_citation_has_what_its_schema_demands() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert all({"type", "title", "authors"} <= set(work) for work in cited["references"])
    assert all(isinstance(cited[key], str) for key in ("version", "date-released"))
