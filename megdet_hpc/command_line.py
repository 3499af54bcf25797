"""Command lines of the configuration: named configs, dotted keys, errors that suggest the nearest key."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import sys
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from megdet_hpc.config import DEFAULT_DETECTOR, DETECTORS, Config, detector_family
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launch import note_status, speaks_for_all
from megdet_hpc.programs import as_called_here, called_as, empty_text

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def named_configs() -> dict[str, Path]:
    """The configs shipped in the package, as a dict from name to file."""
    folder = Path(str(resources.files("megdet_hpc") / "configs"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _resolve(name: str) -> str:
    """The path of a config that is given by name or path. A path that exists wins.

    Raises:
        UserError: neither a file nor a shipped name.
    """
    configs = named_configs()
    if Path(name).is_file() or name not in configs:
        if not Path(name).is_file():
            near = difflib.get_close_matches(name, configs, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--config {name}: no such file, and the shipped configs are {', '.join(configs)}{hint}")
        _check_groups(name)
        return name
    return str(configs[name])


def _check_groups(file: str) -> None:
    """Refuse a configuration file whose form is wrong. The parser checks keys and values, without the file's name.

    Raises:
        UserError: it is no YAML, holds no keys, or a group of keys is something else.
    """
    try:
        content = yaml.safe_load(Path(file).read_text())
    except yaml.YAMLError as error:
        raise UserError(f"--config {file}: is no YAML ({str(error).replace(chr(10), ' ')})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: cannot be read ({error})") from error
    accepted = "keys with values, such as solver: {epochs: 12}"
    if not isinstance(content, dict):
        said = "no keys" if content is None else f"{content!r:.60}"
        raise UserError(f"--config {file}: holds {said}; accepted: {accepted}")
    groups = [field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default_factory)]
    for group in groups:
        if group in content and not isinstance(content[group], dict):
            said = "nothing" if content[group] is None else f"{content[group]!r:.60}"
            raise UserError(f"--config {file}: {group} holds {said}; accepted: keys with values")


def resolve_config_names(arguments: list[str]) -> list[str]:
    """Replace each `--config NAME` by the path of the shipped file."""
    resolved: list[str] = []
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            argument = "--config=" + _resolve(argument.removeprefix("--config="))
        elif index > 0 and arguments[index - 1] == "--config":
            argument = _resolve(argument)
        resolved.append(argument)
    return resolved


def refuse_output(arguments: list[str], output: str, instead: str) -> None:
    """Refuse `--output`, which every configuration has, for a program that trains nothing.

    Args:
        arguments: words of the command line.
        output: its value.
        instead: the program's own options, and what they name.

    Raises:
        UserError: it is among the words.
    """
    if any(word.split("=")[0] == "--output" for word in arguments):
        raise UserError(f"--output {output} is the folder of a training; {instead}")


def _detector_in(file: str) -> Any:
    """The value of model.detector in a YAML file; None where it names none. The parser reports a file that is wrong."""
    with contextlib.suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
        content = yaml.safe_load(Path(file).read_text())
        model = content.get("model") if isinstance(content, dict) else None
        return model.get("detector") if isinstance(model, dict) else None
    return None


def chosen_detector(arguments: list[str]) -> str | None:
    """The detector family that a command line asks for last; None where it names none.

    Args:
        arguments: the command line, the names of shipped configs resolved.
    """
    chosen = None
    for option, value in pairwise([word for argument in arguments for word in argument.split("=", 1)] + [""]):
        if option == "--config":
            chosen = _detector_in(value) or chosen
        elif option == "--model.detector":
            chosen = value
    return chosen


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser. Its errors suggest the nearest key, and one rank alone prints them. An empty text is one.

    The keys of `model` are those of one detector family, which `use_detector` or the first parsing adds.
    """

    detector: str | None = None

    def use_detector(self, name: str | None) -> None:
        """Add the keys of a detector family, unless one has been added.

        Args:
            name: value of model.detector; None for the default.

        Raises:
            UserError: there is no such family.
        """
        if self.detector is None:
            family = detector_family(name or DEFAULT_DETECTOR)
            self.add_class_arguments(family, "model")
            self.detector = name or DEFAULT_DETECTOR

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        if wrong := empty_text(words):
            self.error(wrong)
        return super().parse_args(words, *more, **options)

    def parse_named(self, arguments: list[str]) -> Any:
        """The namespace of a command line that may name shipped configs and a detector family.

        Raises:
            SystemExit, UserError: a name, key or value is wrong.
        """
        resolved = resolve_config_names(arguments)
        self.use_detector(chosen_detector(resolved))
        return self.parse_args(resolved)

    def _other_family(self, key: str) -> str:
        """A line for a key of `model` that other detector families have, and this one has not; "" for all others."""
        owners = [name for name, family in DETECTORS.items() if key in family.__dataclass_fields__]
        names = ", ".join(configs_of(self.detector)) if self.detector else ""
        if not owners or not names or self.detector in owners:  # a family of the user's own has no shipped config
            return ""
        return (
            f"\nmodel.{key} is a key of {', '.join(owners)}, and model.detector is {self.detector}. Each family has "
            f"keys of its own; configs of this one: {names}"
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        wrong = re.findall(r"--[\w.-]+", message)
        wrong += [
            "--" + ".".join(pair) for pair in re.findall(r"Group '([\w.]+)' does not accept option '(\w+)'", message)
        ]
        near = [match for option in wrong for match in difflib.get_close_matches(option, known, n=1)]
        near = [option for option in near if option not in wrong]
        hint = f"\nDid you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
        for option in wrong:
            hint = self._other_family(option.removeprefix("--model.")) or hint
        message = as_called_here(_type_in_a_line(message))
        if speaks_for_all():
            sys.stderr.write(f"{self.prog}: error: {message}{hint}\nSee {self.prog} --help\n")
        note_status(2)
        sys.exit(2)


def configs_of(detector: str) -> list[str]:
    """The names of the shipped configs of a detector family."""
    return [name for name, file in named_configs().items() if (_detector_in(str(file)) or DEFAULT_DETECTOR) == detector]


def _type_in_a_line(message: str) -> str:
    """A message of jsonargparse about a value of another type, in one line and without Python's names of types."""
    words = {"bool": "true, false", "float": "a number", "int": "a whole number", "NoneType": "null", "str": "a text"}
    words["tuple"] = "a list, such as [3]"
    key = r'Parser key "([\w.]+)":\s+'
    plain = re.fullmatch(key + r"Expected a <class '(\w+)'>\. Got value: (.*)", message.strip(), re.DOTALL)
    if plain:
        return f"{plain[1]} is {plain[3]!r}; accepted: {words.get(plain[2], plain[2])}"
    choices = r"Expected a (?:typing\.)?Literal\[(.*)\]\. Got value: (.*)"
    choice = re.fullmatch(key + choices, message.strip(), re.DOTALL)
    if choice:
        return f"{choice[1]} is {choice[3]!r}; accepted: " + choice[2].replace("'", "")
    pattern = key + r"Does not validate against any of the Union subtypes\s+Subtypes: \[(.*?)\]\n.*"
    found = re.fullmatch(pattern + r"Given value: (.*)", message.strip(), re.DOTALL)
    if not found:
        return message
    kinds = re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]", found[2] + "]")
    accepted = ", ".join(words.get(kind, kind) or values.replace("'", "") for kind, values in kinds)
    return f"{found[1]} is {found[3]!r}; accepted: {accepted}"


def config_parser(module: str, description: str) -> Parser:
    """A parser with `--config`, `--print_config` and every key of Config except the detector's."""
    parser = Parser(
        prog=called_as(module),
        description=as_called_here(description),
        usage=f"{called_as(module)} [--config NAME_OR_PATH] [--KEY VALUE ...]",
    )
    names = ", ".join(named_configs())
    parser.add_argument(
        "--config",
        action="config",
        help=f"Named config ({names}) or YAML file; it overrides all that stands before it, keys too.",
    )
    parser.add_class_arguments(Config, skip={"model"})
    return parser


def parse_config(parser: Parser, arguments: list[str]) -> tuple[Config, Any]:
    """Parse a command line.

    Returns:
        The checked configuration, and the namespace, which has the parser's further arguments.

    Raises:
        SystemExit: status 2 after one line that names the bad key or value; 0 after --help and --print_config.
    """
    try:
        namespace = parser.parse_named(arguments)
        built = parser.instantiate(namespace)
        fields = {name: built[name] for name in Config.__dataclass_fields__}
        return Config(**fields), namespace
    except UserError as error:
        parser.error(str(error))
