"""The tables of docs/design.md say what the code is: its layers, and every collective by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

from tests.unit.test_layers import ENTRY_POINTS, FILES, LAYERS, PACKAGE

PAGE = (PACKAGE.parent / "docs" / "design.md").read_text()
# They send messages only to look at the machine.
INSTRUMENTS = ("doctor", "bench", "bn_check", "link_check")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    lines = PAGE.partition(f"\n## {heading}\n")[2].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|---")) + 1
    found = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_part_of_the_package_stands_in_its_layer() -> None:
    table = {name: int(layer) for layer, names, _ in rows("Layers") for name in quoted(names)}
    assert all((PACKAGE / name).exists() for name in table)
    assert {
        name.removesuffix(".py").strip("/"): layer for name, layer in table.items() if layer != ENTRY_POINTS
    } == LAYERS
    parts = {path.name + "/" * path.is_dir() for path in {PACKAGE / f.relative_to(PACKAGE).parts[0] for f in FILES}}
    assert set(table) == parts - {"__init__.py"}


def test_files_named_in_a_layer_lie_there() -> None:
    missing, named = [], 0
    for layer, names, what in rows("Layers"):
        parts = {name.strip("/") for name in quoted(names)}
        here = [str(f.relative_to(PACKAGE)) for f in FILES if f.relative_to(PACKAGE).parts[0] in parts]
        for name in quoted(what):
            named += 1
            folder = name.endswith("/") and any(f"/{name}" in f"/{file}" for file in here)
            file = any(file.split("/")[-1] == name for file in here)
            if not (folder or file or name.startswith("docs/") or name in ("megdet", "__main__.py")):
                missing.append(f"layer {layer}: {name}")
    assert named > 40 and missing == []


def methods() -> set[str]:
    """The collectives of the interface."""
    tree = ast.parse((PACKAGE / "parallel" / "communicator.py").read_text())
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any(arg.arg == "name" for arg in node.args.kwonlyargs)
    }


def collectives() -> Iterator[tuple[str, str]]:
    """Part of the package and message name of each call of a collective, `*` for what is put in at run time."""
    called = {*methods(), "alone"}  # of the watchdog, which broadcasts
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in called):
                continue
            part = file.relative_to(PACKAGE).with_suffix("").parts[0]
            for keyword in node.keywords:
                if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                    yield part, str(keyword.value.value)
                elif keyword.arg == "name" and isinstance(keyword.value, ast.JoinedStr):
                    pieces = keyword.value.values
                    yield part, "".join(str(p.value) if isinstance(p, ast.Constant) else "*" for p in pieces)
                elif keyword.arg == "name":
                    assert isinstance(keyword.value, ast.Name), f"{file}:{node.lineno}: neither a name nor passed on"


def test_every_collective_is_in_the_table() -> None:
    assert len(methods()) == 7
    sent = list(collectives())
    code = {name for part, name in sent if part not in INSTRUMENTS}
    table = {name for row in rows("Collectives") for name in quoted(row[-1])}
    assert len(table) > 25
    assert [name for name in sorted(code) if not any(fnmatchcase(known, name) for known in table)] == []
    assert [known for known in sorted(table) if not any(fnmatchcase(known, name) for name in code)] == []


def test_instruments_name_their_messages_after_themselves() -> None:
    own = [(part, name) for part, name in collectives() if part in INSTRUMENTS]
    assert len(own) > 10
    assert [name for part, name in own if not name.startswith(f"{part}.")] == []
    assert all(f"`{part}.`" in PAGE for part in INSTRUMENTS)
