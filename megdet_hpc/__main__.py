"""One way to all commands: `megdet NAME [options]`, or `python -m megdet_hpc NAME [options]`.

A command runs as `python -m` runs its module, which is loaded only then.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

from megdet_hpc import __version__, programs
from megdet_hpc.commands import COMMANDS, nearest, table
from megdet_hpc.interrupts import quiet_interrupts


def _refuse(name: str) -> None:
    from megdet_hpc.parallel.launch import note_status, speaks_for_all

    if speaks_for_all():
        meant = nearest(name)
        hint = f"; did you mean {meant}?" if meant else ";"
        print(f"megdet: error: no command {name!r}{hint} megdet alone lists all", file=sys.stderr)
    note_status(2)
    raise SystemExit(2)


def main() -> None:
    """Entry point.

    Raises:
        SystemExit: the command's status; 2 where there is no such command.
    """
    quiet_interrupts()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(table())
        return
    if name == "--version":
        print(f"megdet_hpc {__version__}")
        return
    command = COMMANDS.get(name.replace("_", "-"))
    if command is None:
        _refuse(name)
        return
    programs.use_megdet_names()
    if command.program.endswith(".sh"):
        script = Path(__file__).resolve().parents[1] / command.program
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and the shell would inherit that
        os.execvp("bash", ["bash", str(script), *sys.argv[2:]])
    del sys.argv[1]
    runpy.run_module(command.program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
