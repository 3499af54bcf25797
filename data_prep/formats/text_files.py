"""Text, JSON and XML from files whose faults are told with their line."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any
from xml.parsers import expat

from megdet_hpc.errors import UserError

MOST = 1e15  # far beyond any image


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        UserError: it cannot be read or is in another encoding; does not name the file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        text = f"line {line}: not UTF-8 ({error.reason}); convert it, as by iconv -f latin1 -t utf-8"
        raise UserError(text) from error


def read_json(path: Path) -> Any:
    """The value of a JSON file; raises UserError with line and column, without the file's name."""
    try:
        return json.loads(read_text(path))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from error


def number(value: Any, what: str) -> float:
    """A finite number, also from text and with a decimal comma.

    Args:
        value: what the file has.
        what: its name in the message.

    Raises:
        UserError: it is none.
    """
    found = value
    if isinstance(value, str):
        text = value.strip()
        if text.count(",") == 1 and "." not in text:
            text = text.replace(",", ".")
        try:
            found = float(text)
        except ValueError:
            found = None
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < MOST:  # NaN fails it
        raise UserError(f"{what} is {value!r:.40}, expected a finite number")
    return float(found)


class Element(ElementTree.Element):
    """An XML element that knows its line."""

    line = 0


def read_xml(path: Path) -> Element:
    """The outermost element of an XML file. A document type is refused, and with it every entity.

    Raises:
        UserError: not readable or no XML; says the line, not the file.
    """
    parser = expat.ParserCreate()
    lines: list[int] = []

    def made(tag: str, attributes: dict[str, str]) -> Element:
        element = Element(tag, attributes)
        element.line = lines[-1]
        return element

    builder = ElementTree.TreeBuilder(element_factory=made)

    def start(tag: str, attributes: dict[str, str]) -> None:
        lines.append(parser.CurrentLineNumber)
        builder.start(tag, attributes)

    def refuse(*_: Any) -> None:
        raise UserError("has a DOCTYPE, which is not accepted")

    parser.StartElementHandler, parser.EndElementHandler = start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    parser.buffer_text = True
    try:
        with open(path, "rb") as file:
            parser.ParseFile(file)
        root = builder.close()
    except UserError:
        raise
    except (expat.ExpatError, LookupError, ValueError, AssertionError) as error:
        raise UserError(f"not valid XML ({error})") from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from error
    assert isinstance(root, Element)
    return root


def flag(value: Any) -> bool:
    """Whether a value of any tool says yes."""
    return str(value).strip().lower() in ("1", "1.0", "true", "yes")
