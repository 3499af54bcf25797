"""Imports point down the written list of layers (docs/design.md), and Horovod stays in one place."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "megdet_hpc"
LAYERS = {
    "errors": -2,
    "commands": -1,
    "files": -1,
    "guard": -1,
    "interrupts": -1,
    "programs": 0,
    "seeds": 0,
    "config": 0,
    "devices": 0,
    "owner": 0,
    "versions": 0,
    "log": 1,
    "parallel": 1,
    "command_line": 2,
    "layers": 2,
    "record": 2,
    "data": 2,
    "models": 3,
    "solver": 4,
    "evaluation": 4,
    "report": 5,
    "engine": 5,
    "plan": 5,
    "predict": 6,
    "analyze": 6,
    "validation": 6,
}
ENTRY_POINTS = 7
LAYERS["link_check"] = ENTRY_POINTS + 1  # takes the steps of bench


def _imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def _imported_files(file: Path) -> set[Path]:
    """The package's files that a file imports, at its head or in its functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from a.b import c` loads a/b.py, or a/b/c.py
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = PACKAGE.parent.joinpath(*name.split("."))
            found |= {other for other in (path.with_suffix(".py"), path / "__init__.py") if other.is_file()}
    return found & set(FILES)


def _part(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(f for f in PACKAGE.rglob("*.py"))


def test_imports_only_point_down() -> None:
    wrong = []
    for file in FILES:
        part = _part(file)
        for name in _imports(file):
            if name.startswith("megdet_hpc."):
                other = name.split(".")[1]
                if other != part and LAYERS.get(other, ENTRY_POINTS) >= LAYERS.get(part, ENTRY_POINTS):
                    wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert len(FILES) > 30
    assert wrong == []


def test_only_parallel_imports_horovod_and_mpi4py() -> None:
    users = {_part(file) for file in FILES for name in _imports(file) if name.split(".")[0] in ("horovod", "mpi4py")}
    assert users == {"parallel"}


def test_no_two_files_import_each_other_in_a_circle() -> None:
    graph = {file: _imported_files(file) for file in FILES}
    assert sum(map(len, graph.values())) > 300
    # what imports nothing that is left is in no circle
    while done := {file for file, imported in graph.items() if not imported & set(graph)}:
        graph = {file: imported for file, imported in graph.items() if file not in done}
    circle = {
        str(file.relative_to(PACKAGE)): sorted(str(f.relative_to(PACKAGE)) for f in imported & set(graph))
        for file, imported in graph.items()
    }
    assert circle == {}


def test_a_class_has_a_name_of_its_own() -> None:
    """One public name for two things makes a reader look twice."""
    places: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(file.relative_to(PACKAGE)))
    assert len(places) > 80
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
