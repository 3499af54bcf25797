"""Two ends of a program without a traceback, from its first import on.

Ctrl-C ends it with one line and status 130. A reader of its output that leaves, as head does in
`megdet plan ... | head`, ends it silently with status 141.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a program that Ctrl-C ended: 128 + the signal's number, as shells count."""
EXIT_NO_READER = 128 + signal.SIGPIPE
"""Exit status of a program whose output has no reader any more."""

# Time after which an interrupt comes again that a destructor has lost or an import has put off [seconds].
_AGAIN_SECONDS = 0.01
_IMPORTING = "<frozen importlib._bootstrap>"


def program_name() -> str:
    """The name of the running program as users write it: megdet_hpc.train, pack_coco."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name if spec else Path(sys.argv[0]).stem
    return "megdet_hpc" if name == "-m" else name.removesuffix(".__main__")


def end_interrupted(number: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    """End this process at once with EXIT_INTERRUPTED. It is also a signal handler."""
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(EXIT_INTERRUPTED)


def say_interrupted(text: str = "interrupted") -> None:
    """Print one line about the interrupt. From then on another Ctrl-C ends the process at once."""
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, end_interrupted)
    # Python notes an interrupt of exec("..."), which dataclasses use, and would end `python -m` by SIGINT, whatever the
    # status it leaves with. The next exec of a text clears the note.
    exec("")
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(f"{program_name()}: {text}\n")
        sys.stderr.flush()


class _Output(io.TextIOWrapper):
    """Standard output that ends the program once its reader has left. SystemExit passes where OSError is caught."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._end()

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._end()

    def _end(self) -> NoReturn:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # what is written from here on, also by Python at its end, is lost
        os.close(nowhere)
        raise SystemExit(EXIT_NO_READER) from None


def _flush_output() -> None:
    """The last flush, before Python's own. The program's work is done, so its exit status stays."""
    with suppress(SystemExit):
        sys.stdout.flush()


def _end_without_reader() -> None:
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out is sys.__stdout__:
        sys.stdout = _Output(
            out.buffer,
            encoding=out.encoding,
            errors=out.errors,
            line_buffering=out.line_buffering,
            write_through=out.write_through,
        )
        atexit.register(_flush_output)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    _end_by_interrupt()


def _end_by_interrupt() -> NoReturn:
    say_interrupted()
    end_interrupted()


def _end_if_it_waits() -> None:
    """End the process by an interrupt that is yet to come again. Python runs this last, and no handler after it."""
    if _asked and signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        _end_by_interrupt()


_asked = False


def _come_again() -> None:
    """Send this process its interrupt once more, soon. No thread does it: this may run where a lock is held."""
    if sys.is_finalizing():
        _end_by_interrupt()  # no handler runs from here on

    def alarm(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)

    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, outside imports: C++ that imports a module, as torch's does, aborts at an exception.

    The second Ctrl-C within one import ends the process at once.
    """
    global _asked
    again = signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
    outer = frame
    while outer is not None and outer.f_code.co_filename != _IMPORTING:
        outer = outer.f_back
    if outer is not None and _asked and again:
        _end_by_interrupt()
    _asked = True
    if outer is not None:
        _come_again()
        return
    raise KeyboardInterrupt


def raise_dropped_interrupt() -> None:
    """Raise an interrupt that came earlier and got lost on its way to the main program.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed since the program began.
    """
    if _asked:
        raise KeyboardInterrupt


def _unraisable(error: sys.UnraisableHookArgs) -> None:
    """Send an interrupt again that came within a destructor, where Python drops exceptions.

    Nothing is said of a destructor that fails once Ctrl-C was pressed: its object may have been half made.
    """
    if issubclass(error.exc_type, KeyboardInterrupt):
        _come_again()
    elif not _asked:
        sys.__unraisablehook__(error)


@contextmanager
def children_deaf() -> Iterator[None]:
    """Keep Ctrl-C, which a terminal sends to all, from the processes that start within the block and from theirs.

    They inherit that it is blocked, so it breaks off not even their first imports. One that comes to this process
    meanwhile waits for the end of the block.
    """
    from multiprocessing import resource_tracker  # late: few programs start processes

    resource_tracker.ensure_running()  # it ends the block once it starts
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def quiet_interrupts() -> None:
    """Let Ctrl-C end this program with one line, and a reader of its output that leaves without any.

    Its worker processes ignore Ctrl-C.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        sys.excepthook, sys.unraisablehook = _hook, _unraisable
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            with suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGINT, _interrupt)
                atexit.register(_end_if_it_waits)
        _end_without_reader()
        # once this process has ended at once, multiprocessing's helper removes semaphores and would warn of them
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
