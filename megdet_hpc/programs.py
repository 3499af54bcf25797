"""Names of this package's programs as they are called here: by `megdet`, as modules, or as files of a checkout."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from megdet_hpc.commands import COMMANDS
from megdet_hpc.errors import UserError

_ROOT = Path(__file__).resolve().parents[1]
_MODULE = re.compile(r"python -m ((?:megdet_hpc|data_prep)\.\w+)\b")
_PYTHON = re.compile(r"(?:python )?(?<![\w/])data_prep/(\w+)\.py\b")
_SHELL = re.compile(r"(?<![\w/])data_prep/\w+\.sh\b")
_BY_PROGRAM = {command.program: f"megdet {command.name}" for command in COMMANDS.values()}
_through_megdet = False


def use_megdet_names() -> None:
    """Let this process's messages name all programs as commands of megdet, by which it was called."""
    global _through_megdet
    _through_megdet = True


def called_as(module: str) -> str:
    """The name of a program in its usage and errors: `megdet train`, `python -m megdet_hpc.train`, `pack_coco`.

    Args:
        module: such as megdet_hpc.train or data_prep.pack_coco.
    """
    if _through_megdet and module in _BY_PROGRAM:
        return _BY_PROGRAM[module]
    return module.removeprefix("data_prep.") if module.startswith("data_prep.") else f"python -m {module}"


def as_called_here(text: str) -> str:
    """A message that names programs in a form that works in the current folder.

    Args:
        text: message with the names used in a checkout: `python -m megdet_hpc.train`, `python data_prep/pack_coco.py`,
            `data_prep/fetch_coco.sh`.

    Returns:
        `megdet pack` and the like where megdet was called. Else the same text in a checkout. Elsewhere
        `python -m data_prep.pack_coco`, and the full path of a shell script.
    """
    if _through_megdet:
        text = _PYTHON.sub(lambda found: called_as(f"data_prep.{found[1]}"), text)
        text = _SHELL.sub(lambda found: _BY_PROGRAM.get(found[0], found[0]), text)
        return _MODULE.sub(lambda found: called_as(found[1]), text)
    if Path("data_prep", "pack_coco.py").is_file():
        return text
    text = _PYTHON.sub(r"python -m data_prep.\1", text)
    return _SHELL.sub(lambda found: f"bash {shlex.quote(str(_ROOT / found[0]))}", text)


def empty_text(arguments: Sequence[str]) -> str:
    """An error for an empty text on a command line; "" where there is none.

    An empty path would be the current folder. It is never meant: a variable of the shell was not set.
    """
    for before, word in pairwise(["", *arguments]):
        option, equals, value = word.partition("=")
        if not word:
            option = before if before.startswith("--") else "an argument"
        elif value or not equals or not option.startswith("--"):
            continue
        return f"{option} is empty, as of a variable of the shell that is not set; give a value or leave it out"
    return ""


class Collected(argparse.Action):
    """The values of an option of several. Given twice, it has those of both; argparse forgets the first ones."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, list(values) if before is self.default else [*before, *values])


class ProgramParser(argparse.ArgumentParser):
    """A parser of argparse whose errors are one line and where to read more. The usage, which is long, is in --help.

    An empty text is an error. An option of several values may be given more than once.
    """

    def add_argument(self, *names: Any, **options: Any) -> Any:
        if options.get("nargs") in ("+", "*") and names[0].startswith("-"):
            options.setdefault("action", Collected)
        return super().add_argument(*names, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # parse_args calls it too
        words = sys.argv[1:] if args is None else list(args)
        if wrong := empty_text(words):
            self.error(wrong)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {as_called_here(message)}\nSee {self.prog} --help\n")


def drawing_lack() -> str:
    """Why matplotlib cannot be loaded, as the end of a sentence about it; "" where it can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "matplotlib"
        return "is not installed" if missing else f"cannot be loaded ({error})"
    return ""


def require_drawing(option: str) -> None:
    """Refuse an option that asks for a picture where none can be drawn.

    Args:
        option: the option as it was given, such as --png rate.png.

    Raises:
        UserError: matplotlib cannot be loaded.
    """
    if lack := drawing_lack():
        raise UserError(f"{option} is drawn by matplotlib, which {lack}; pip install matplotlib")


@contextmanager
def errors_in_one_line(module: str) -> Iterator[None]:
    """The end of a program by what a user can mend: one line on stderr that begins with the program's name.

    Args:
        module: such as megdet_hpc.analyze.

    Raises:
        SystemExit: a UserError was raised, whose status it has; or the program draws, and matplotlib is missing (2).
    """
    try:
        yield
    except UserError as error:
        print(f"{called_as(module)}: error: {as_called_here(str(error))}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        lack = "draws its pictures by matplotlib, which is not installed; pip install matplotlib"
        print(f"{called_as(module)}: error: {lack}", file=sys.stderr)
        raise SystemExit(2) from None
