"""`megdet`: its table, what it says of a wrong name, and that a command is the module that it stands for."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megdet_hpc import programs
from megdet_hpc.commands import COMMANDS, GROUPS
from megdet_hpc.interrupts import EXIT_NO_READER
from megdet_hpc.predict.__main__ import _parser as predict_parser
from megdet_hpc.programs import ProgramParser
from tests.conftest import ROOT, Launch, environment, run

MEGDET = [sys.executable, "-m", "megdet_hpc"]


def test_the_table_has_each_command_in_a_line() -> None:
    shown = run(MEGDET)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert [line[:-1] for line in lines if re.fullmatch(r"\w+:", line)] == list(GROUPS)
    for name, command in COMMANDS.items():
        assert [line for line in lines if line.split()[:1] == [name]] == [f"  {name:15} {command.text}"]
    assert max(map(len, lines)) <= 100
    assert run([*MEGDET, "--help"]).stdout == shown.stdout


def test_the_table_needs_no_library() -> None:
    """It answers at once on a login node whose file system is slow."""
    code = (
        "import sys; sys.argv = ['megdet']; from megdet_hpc.__main__ import main; main(); "
        "print([name for name in sys.modules if name in ('torch', 'numpy', 'h5py', 'yaml', 'jsonargparse')])"
    )
    shown = run([sys.executable, "-c", code])
    assert shown.stdout.splitlines()[-1] == "[]", shown.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [("trian", "train"), ("pack_coco", "pack"), ("verify_pack.py", "verify"), ("bncheck", "bn-check"), ("xyzzy", "")],
)
def test_a_wrong_name(name: str, meant: str) -> None:
    shown = run([*MEGDET, name, "--help"])
    assert (shown.returncode, shown.stdout) == (2, "")
    hint = f"; did you mean {meant}? " if meant else "; "
    assert shown.stderr == f"megdet: error: no command {name!r}{hint}megdet alone lists all\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_speaks_of_the_command_as_it_was_typed(name: str) -> None:
    shown = run([*MEGDET, name, "--help"])
    assert shown.returncode == 0, shown.stderr
    if not COMMANDS[name].program.endswith(".sh"):
        assert f"usage: megdet {name} " in shown.stdout.replace("\n", " ")
    assert "python -m megdet_hpc." not in shown.stdout and "python data_prep/" not in shown.stdout
    assert len(shown.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("evaluate --checkpoint= --data.val val", "--checkpoint is empty"),
        ("evaluate --results  --data.val val", "--results is empty"),
        ("evaluate --checkpoint x --report ", "--report is empty"),
        ("predict --checkpoint  a.jpg --output out", "--checkpoint is empty"),
        ("export --checkpoint x --output=", "--output is empty"),
        ("analyze ", "an argument is empty"),
        ("compare a ", "an argument is empty"),
        ("eigenspectrum --checkpoint  --output out", "--checkpoint is empty"),
        ("submit --scheduler slurm --walltime 1:00 --script ", "--script is empty"),
        ("verify --annotations= pack", "--annotations is empty"),
    ],
)
def test_an_empty_text_is_never_the_current_folder(
    arguments: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of an option whose variable is not set in a job's script."""
    (tmp_path / "best.detections.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    name, *words = arguments.split(" ")
    module = COMMANDS[name].program
    is_folder = (ROOT / module.replace(".", "/")).is_dir()
    program = importlib.import_module(f"{module}.__main__" if is_folder else module)
    try:
        status = program.main(words)
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and f": error: {said}, as of a variable of the shell" in capsys.readouterr().err


def test_a_command_ends_with_the_status_of_its_program() -> None:
    """2 for bad input, on one line that names the command."""
    refused = run([*MEGDET, "plan", "--config", "tiny", "--ranks", "0"])
    assert refused.returncode == 2
    assert refused.stderr.startswith("megdet plan: error: "), refused.stderr
    as_module = run([sys.executable, "-m", "megdet_hpc.plan", "--config", "tiny", "--ranks", "0"])
    assert as_module.returncode == 2
    assert as_module.stderr.replace("python -m megdet_hpc.plan", "megdet plan") == refused.stderr


def unread(arguments: list[str], unbuffered: str) -> tuple[int, str]:
    """Status and stderr of a command whose output has no reader, as after `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nowhere:
        env = {**environment(), "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(arguments, cwd=ROOT, env=env, stdout=nowhere, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "unbuffered", "status"),
    [
        ([], "", 0),  # its work is done when Python writes what it printed
        ([], "1", EXIT_NO_READER),
        (["plan", "--config", "tiny", "--ranks", "1"], "", EXIT_NO_READER),
        (["fetch-coco", "--help"], "", EXIT_NO_READER),
        (["rebuild", "{shapes}/val", "--output", "{folder}/coco.json"], "1", EXIT_NO_READER),
    ],
)
def test_output_without_a_reader_ends_a_command_silently(
    arguments: list[str], unbuffered: str, status: int, shapes: Path, tmp_path: Path
) -> None:
    """Neither a traceback, nor Python's complaint at its end, nor an error of a program that catches OSError."""
    words = [word.format(shapes=shapes, folder=tmp_path) for word in arguments]
    assert unread([*MEGDET, *words], unbuffered) == (status, "")


def test_the_programs_are_there() -> None:
    for command in COMMANDS.values():
        place = ROOT / command.program.removesuffix(".sh").replace(".", "/")
        suffix = ".sh" if command.program.endswith(".sh") else ".py"
        assert place.with_suffix(suffix).is_file() or (place / "__main__.py").is_file(), command


def test_the_readme_lists_them_all() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `megdet ([\w-]+)` \|", text, re.MULTILINE)
    assert named == list(COMMANDS)


@pytest.mark.parallel
def test_megdet_under_mpirun_is_one_world(launch: Launch) -> None:
    """A wrong name is said once, and bn-check sees both ranks."""
    shown = launch(2, "-m", "megdet_hpc", "trian")
    assert shown.returncode == 2 and shown.stderr.count("no command 'trian'") == 1, shown.stderr
    checked = launch(2, "-m", "megdet_hpc", "bn-check", "--device", "cpu")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.startswith("2 ranks, "), checked.stdout


def test_a_command_that_draws_says_in_one_line_that_matplotlib_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "megdet_hpc.compare.figure", raising=False)
    with pytest.raises(SystemExit) as ended, programs.errors_in_one_line("megdet_hpc.compare"):
        importlib.import_module("megdet_hpc.compare.figure")
    assert ended.value.code == 2
    assert "error: draws its pictures by matplotlib, which is not installed" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"), programs.errors_in_one_line("megdet_hpc.compare"):
        importlib.import_module("no_such_thing")


def test_an_option_of_several_values_may_be_given_twice() -> None:
    """argparse takes the last one alone, without a word."""
    parser = ProgramParser()
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--probe", nargs="*")
    given = parser.parse_args(
        ["--only", "a", "b", "--sizes", "3", "--only", "c", "--sizes", "4", "5", "--probe", "x", "--probe", "y"]
    )
    assert (given.only, given.sizes, given.probe) == (["a", "b", "c"], [3, 4, 5], ["x", "y"])
    left = parser.parse_args([])
    assert (left.only, left.sizes, left.probe) == ([], [1, 2], None)
    twice = [word for name in ("a.jpg", "b.jpg") for word in ("--input", name)]
    assert predict_parser().parse_args(["--checkpoint", "x", "--output", "y", *twice]).input == ["a.jpg", "b.jpg"]
