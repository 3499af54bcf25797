"""Docstrings, their entries and the help of options begin with a subject, so that nobody must read a line twice."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megdet_hpc", "data_prep", "tools", "jobs")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
# "Of lamb: weight of the past", "folder: of the run", "name: as solver.precision"
OPENINGS = "after|as|at|before|besides|by|for|from|ibid|in|likewise|of|on|over|per|so|than|that|to|under|with|without"
SUBJECTLESS = re.compile(rf"({OPENINGS})\b", re.IGNORECASE)
SECTION = re.compile(r"( *)(Args|Attributes|Raises):$")
ENTRY = re.compile(r"( *)[\w*., ]+: (.*)$")


def openings(docstring: str) -> Iterator[tuple[int, str]]:
    """Line within the docstring and text of its beginning and of each entry of its sections."""
    indent = None
    for number, line in enumerate(docstring.splitlines()):
        if number == 0:
            yield number, line
        elif section := SECTION.match(line):
            indent = len(section[1]) + 4
        elif (entry := ENTRY.match(line)) and len(entry[1]) == indent:
            yield number, entry[2]


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, also of attributes, of each entry in it, and of each option's help."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from ((node.lineno + number, text) for number, text in openings(node.value.value))
        elif isinstance(node, ast.keyword) and node.arg == "help" and isinstance(node.value, ast.Constant):
            yield node.value.lineno, str(node.value.value)


def faults(file: Path) -> list[str]:
    found = texts(ast.parse(file.read_text()))
    return [f"{file.relative_to(ROOT)}:{line}: {text}" for line, text in found if SUBJECTLESS.match(text)]


def test_every_text_begins_with_its_subject() -> None:
    assert len(FILES) > 180
    assert [fault for file in FILES for fault in faults(file)] == []


ENTRIES = '''
def f(a, b):
    """A function.

    Args:
        a: of the run
            of it.
        b: folder of the run.

    Note: of no section.
    """
'''


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ('"""Of lamb: weight of the past."""', [1]),
        ("class A:\n    b: int = 0\n    '''In place of c.'''", [3]),
        (ENTRIES, [6]),
        ("parser.add_argument('--a', help='to measure')", [1]),
    ],
)
def test_what_counts_as_a_fault(source: str, lines: list[int]) -> None:
    assert [line for line, text in texts(ast.parse(source)) if SUBJECTLESS.match(text)] == lines
