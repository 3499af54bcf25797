"""Tables of all keys of a configuration, for docs/configuration.md, from the fields, their ranges and docstrings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import docstring_parser

from megdet_hpc.config import DETECTORS, Config, ModelConfig

_HEAD = ["", "| key | default | accepted | meaning |", "|---|---|---|---|"]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`" if value != "" else ""


def _accepted(field: dataclasses.Field[Any]) -> str:
    """The range of a field, or the words of its Literal type."""
    words = re.findall(r"Literal\[([^\]]+)\]", str(field.type))
    choices = ", ".join(f"`{word}`" for word in re.findall(r"[\"']([^\"']+)[\"']", words[0])) if words else ""
    ranged = field.metadata.get("accepted")
    return ranged.text if ranged else choices or {"bool": "`true`, `false`"}.get(str(field.type), "")


def _rows(part: type[Any], prefix: str, without: set[str]) -> Iterator[str]:
    kinds = [kind for kind in reversed(part.__mro__) if dataclasses.is_dataclass(kind)]
    entries = [entry for kind in kinds for entry in docstring_parser.parse_from_object(kind).params]
    texts = {entry.arg_name: entry.description or "" for entry in entries}
    for field in dataclasses.fields(part):
        if field.name in without:
            continue
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(made):
            yield from _rows(type(made), f"{prefix}{field.name}.", set())
            continue
        text = " ".join(texts.get(field.name, "").split())
        cells = [f"`{prefix}{field.name}`", _shown(made), _accepted(field), text]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def tables() -> str:
    """The tables of all parts as Markdown, each below a heading."""
    parts = {
        field.name: type(field.default_factory())
        for field in dataclasses.fields(Config)
        if field.default_factory is not dataclasses.MISSING
    }
    lines = ["", "## The run", *_HEAD, *_rows(Config, "", set(parts))]
    for name, part in parts.items():
        lines += ["", f"## {name}"]
        if name != "model":
            lines += [*_HEAD, *_rows(part, f"{name}.", set())]
            continue
        common = {field.name for field in dataclasses.fields(ModelConfig)} - {"detector", "backbone"}
        lines += ["", "Every family of detectors has these keys:"]
        lines += [*_HEAD, *_rows(ModelConfig, "model.", {"detector", "backbone"})]
        for family, keys in DETECTORS.items():
            lines += ["", f"### {family}", "", f"`--model.detector {family}`", *_HEAD, *_rows(keys, "model.", common)]
    return "\n".join(lines) + "\n"
