"""Ctrl-C without a traceback: a program ends with one line and status 130, from its first import on."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a program that Ctrl-C ended: 128 + the signal's number, as shells count."""


def program_name() -> str:
    """The name of the running program as users write it: megdet_hpc.train, pack_coco."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name if spec else Path(sys.argv[0]).stem
    return "megdet_hpc" if name == "-m" else name.removesuffix(".__main__")


def end_interrupted(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """End this process at once with EXIT_INTERRUPTED. It is also a signal handler."""
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(EXIT_INTERRUPTED)


def say_interrupted(text: str = "interrupted") -> None:
    """Print one line about the interrupt. From then on another Ctrl-C ends the process at once."""
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, end_interrupted)
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(f"{program_name()}: {text}\n")
        sys.stderr.flush()


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    say_interrupted()
    end_interrupted()


def quiet_interrupts() -> None:
    """Let an uncaught KeyboardInterrupt end this program with one line. Its worker processes ignore Ctrl-C."""
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        sys.excepthook = _hook
        # once this process has ended at once, multiprocessing's helper removes semaphores and would warn of them
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
