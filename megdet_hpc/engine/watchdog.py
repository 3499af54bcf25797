"""The watchdog, which ends a run that hangs and names the rank that is the cause.

A rank that hangs leaves the others waiting silently in a collective. So each rank has a watchdog thread that looks at
the clock. If a step takes too long, the thread writes the position of its rank into a common folder, and waits for the
others to do so. The first rank then prints a summary and ends the job. Nothing is written or sent before that.

With `watchdog_minutes auto` the limit of a step comes down from 15 minutes to ten times the longest step so far, but
not below 5 minutes. All ranks agree on the limit: a rank with another limit would report too late, and would be blamed.

Rank 0 does some work alone, such as scoring and saving, which may take longer than any step (`Watchdog.alone`). Its own
time does not count then. The others wait as long as rank 0 gives signs of life in the folder.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write, write_json
from megdet_hpc.guard import Guard
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.groups import rank_ranges
from megdet_hpc.parallel.launch import note_status
from megdet_hpc.parallel.runtime import SynchronizedOptimizer

T = TypeVar("T")

# Time between two looks at the clock. Watchdogs of one hang fire within this time of each other [seconds].
_LOOK_SECONDS = 1.0
_GATHER_SECONDS = 5.0
# Time within which a watchdog that has fired ends its rank, even if a file system does not answer [seconds].
_FIRED_SECONDS = 30.0
# `auto` with several ranks. The first is the limit until the time of a step is known, since libraries and loaders start
# slowly, and for work that is no step, such as an evaluation. The second is the least limit of a step, since a shared
# file system may stop for minutes while one of its servers is replaced [minutes].
_MOST_MINUTES, _LEAST_MINUTES = 15.0, 5.0
# Limit of a step, as a multiple of the longest step so far.
_TIMES_LONGEST = 10
# Number of signs of life that a rank working alone gives within the time that the others wait for one.
_SIGNS_PER_LIMIT = 3
# If a call holds the interpreter, the watchdog thread cannot run. Several ranks have the watchdogs of the others, but
# calls of all ranks may hold it. Then, and in a single process, a guard ends the process this much later [seconds].
_BACKSTOP_SECONDS = 30.0


def where(frames: dict[int, FrameType]) -> tuple[str, str]:
    """The wait of a process: (collective, place).

    Args:
        frames: sys._current_frames() of the process.

    Returns:
        Method and name of the collective in which one of its threads is, "" for none; and the innermost line of the
        main thread.
    """
    collective = ""
    for innermost in frames.values():
        frame: FrameType | None = innermost
        while frame is not None and not collective:
            owner = frame.f_locals.get("self")
            if isinstance(owner, Communicator) and isinstance(frame.f_locals.get("name"), str):
                collective = f"{frame.f_code.co_name} '{frame.f_locals['name']}' over {owner.transport}"
            elif isinstance(owner, SynchronizedOptimizer) and frame.f_code.co_name == "synchronize":
                collective = "the gradients' allreduce"
            frame = frame.f_back
    main = frames.get(threading.main_thread().ident or 0)
    if main is None:
        return collective, "unknown"
    return collective, f"{main.f_code.co_filename}:{main.f_lineno} in {main.f_code.co_name}"


class Watchdog:
    """A thread that ends the job when `tick` has not been called for too long.

    Args:
        minutes: longest time between two ticks; 0: no watchdog; auto: learnt from the steps [minutes].
        folder: folder that all ranks share. It is used only after a hang is found, and for signs of life.
        world: all ranks.
        abort: function that ends every process of the job.
        check: raises if another start has taken the folder. Then nothing is written there.
        held: whether all ranks may hold their interpreters while they wait, as with groups over Horovod.
    """

    def __init__(
        self,
        minutes: float | Literal["auto"],
        folder: Path,
        world: Communicator,
        abort: Callable[[], None],
        check: Callable[[], None] = lambda: None,
        *,
        held: bool = False,
    ) -> None:
        self._check = check
        self._learns = minutes == "auto"
        self._seconds, self._folder = 60 * (_MOST_MINUTES if minutes == "auto" else minutes), folder
        self._step_seconds = self._seconds  # the limit of a step, the same on all ranks
        self._in_step, self._longest, self._lessons = False, 0.0, 0
        self._world, self._rank, self._abort = world, world.rank, abort
        self._alone, self._works = False, 0  # whether rank 0 works alone, and how often it has
        self._signs, self._heard = 0, b""
        self._hosts: list[str] = world.allgather_object(socket.gethostname(), name="watchdog.hosts")
        self._guard: Guard | None = None
        self._step, self._time, self._end = 0, time.monotonic(), threading.Event()
        if self._seconds:
            if held or len(self._hosts) == 1:
                self._guard = Guard(spares_stopped=True, stacks=True)
            self.tick()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def tick(self, step: int | None = None) -> None:
        """Report that this rank makes progress.

        Args:
            step: updates done, at the beginning of a step; None for work that is no step.
        """
        now = time.monotonic()
        if step is not None and self._in_step:
            self._longest = max(self._longest, now - self._time)
        self._time, self._in_step = now, step is not None
        self._step = self._step if step is None else step
        if self._guard is not None:
            limit = self._seconds + _BACKSTOP_SECONDS
            held = f"rank {self._rank} on {self._hosts[self._rank]}: a call has held the interpreter for {limit:.0f} s"
            self._guard.expect(limit, f"megdet_hpc: watchdog: {held}; ending the job")

    def learn(self) -> None:
        """Set the limit of a step from the steps so far, if watchdog_minutes is auto. Collective of the world; blocks.

        The steps before the first call do not count, since libraries and loaders start in them.
        """
        if not self._learns or len(self._hosts) == 1:
            return
        self._lessons += 1
        if self._lessons > 1:
            longest = max(self._world.allgather_object(self._longest, name="watchdog.steps"))
            self._step_seconds = min(max(_TIMES_LONGEST * longest, 60 * _LEAST_MINUTES), 60 * _MOST_MINUTES)
        else:
            self._longest, self._in_step = 0.0, False

    @property
    def hosts(self) -> list[str]:
        """Host of each rank."""
        return self._hosts

    @property
    def limit(self) -> float:
        """Time that this rank may now take without a tick [seconds]."""
        return self._step_seconds if self._in_step else self._seconds

    def alone(self, work: Callable[[], T], *, name: str) -> T:
        """Let rank 0 do something that may take longer than a step. Collective of the world; blocks.

        Args:
            work: called on rank 0 only.
            name: name of the message, a broadcast of the result.

        Returns:
            The result of `work`, on every rank.
        """
        self.tick()
        if self._guard is not None:
            self._guard.rest()
        self._works, self._alone = self._works + 1, True
        result: Any = None
        try:
            if self._rank == 0:
                result = work()
                self._alone = False  # from here a rank that does not come to the broadcast is a hang
                self.tick()
            result = self._world.broadcast_object(result, name=name)
        finally:
            self._alone = False
            self.tick()
        done: T = result
        return done

    def close(self) -> None:
        """Stop the watchdog."""
        self._end.set()
        if self._guard is not None:
            self._guard.close()
            self._guard = None

    def _watch(self) -> None:
        pause = min(_LOOK_SECONDS, self._seconds / 10)
        while True:
            before = time.monotonic()
            if self._end.wait(pause):
                return
            asleep = time.monotonic() - before - pause
            if asleep > self.limit / 2:  # the whole job was suspended, which is no hang
                self._time = time.monotonic()
            elif self._alone and self._rank == 0:
                self._give_sign()
            elif time.monotonic() - self._time > self.limit and not (self._alone and self._hears()):
                self._fire()

    @property
    def _sign(self) -> Path:
        return self._folder / "rank_00000.working"

    def _give_sign(self) -> None:
        """Give the others a sign of life of rank 0 from time to time. Short work writes nothing."""
        if len(self._hosts) > 1 and time.monotonic() - self._time > self._seconds / _SIGNS_PER_LIMIT:
            self._time, self._signs = time.monotonic(), self._signs + 1
            _try_for(_GATHER_SECONDS, self._write_sign, f"{self._works} {self._signs}".encode())

    def _write_sign(self, text: bytes) -> None:
        with suppress(OSError, UserError):
            self._check()
            with atomic_write(self._sign) as file:
                file.write(text)

    def _hears(self) -> bool:
        """Whether rank 0 has given a new sign of life; if so, the time starts again. Not for rank 0."""
        found: list[bytes] = []
        _try_for(_GATHER_SECONDS, self._read_sign, found)
        if not found or found[0] == self._heard or found[0].split()[:1] != [str(self._works).encode()]:
            return False
        self._heard, self._time = found[0], time.monotonic()
        return True

    def _read_sign(self, found: list[bytes]) -> None:
        with suppress(OSError):
            found.append(self._sign.read_bytes())

    def _fire(self) -> None:
        frames = sys._current_frames()
        collective, place = where(frames)
        main = frames.get(threading.main_thread().ident or 0)
        report = {
            "rank": self._rank,
            "host": self._hosts[self._rank],
            "step": self._step,
            "seconds": round(time.monotonic() - self._time, 1),
            "collective": collective,
            "place": place,
            "stack": "".join(traceback.format_stack(main)) if main else "",
        }
        limit = threading.Timer(_FIRED_SECONDS, os._exit, (1,))
        limit.daemon = True
        limit.start()
        # a file system that hangs may be the cause, so reading has a limit
        reports = {self._rank: report}
        _try_for(3 * _GATHER_SECONDS, self._gather, report, reports)
        reports = dict(reports)
        if self._end.is_set() or time.monotonic() - self._time < self.limit:
            limit.cancel()
            return  # the step has ended meanwhile
        if self._rank != min(reports):
            time.sleep(_GATHER_SECONDS)  # the first rank ends the job; if it fails, this one does
        else:
            sys.stdout.flush()
            print(hang_report(reports, self._hosts, self.limit), file=sys.stderr, flush=True)
        # the launcher may wait for a node that does not answer; the job's script does not
        _try_for(_GATHER_SECONDS, note_status, 1)
        self._abort()
        os._exit(1)

    def _gather(self, report: dict[str, Any], reports: dict[int, dict[str, Any]]) -> None:
        """Add the reports of the others to `reports`."""
        with suppress(OSError, UserError):
            self._check()
            self._write(report)
            time.sleep(_GATHER_SECONDS)
            reports.update(self._read())

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"

    def _write(self, report: dict[str, Any]) -> None:
        write_json(self._path(self._rank), report)

    def _read(self) -> dict[int, dict[str, Any]]:
        """The reports of this hang. Files of an older hang have other times and are left out."""
        found = {}
        for rank in range(len(self._hosts)):
            path = self._path(rank)
            if path.is_file() and abs(path.stat().st_mtime - self._path(self._rank).stat().st_mtime) < self._seconds:
                found[rank] = json.loads(path.read_bytes())
        return found


def _try_for(seconds: float, function: Callable[..., object], *arguments: Any) -> None:
    """Call a function that may never return, and wait for it for a limited time."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)


def hang_report(reports: dict[int, dict[str, Any]], hosts: list[str], seconds: float) -> str:
    """The message of a hang: the ranks that wait and where, the others, and the stacks of the others."""
    lines = [f"megdet_hpc: watchdog: no step ended for {seconds:.0f} s; ending the job"]
    waiting: dict[str, list[int]] = {}
    outside = []
    for rank, report in sorted(reports.items()):
        if report["collective"]:
            waiting.setdefault(f"step {report['step']}, in {report['collective']}", []).append(rank)
        else:
            outside.append(rank)
    for text, ranks in waiting.items():
        lines.append(f"  rank(s) {rank_ranges(ranks, ', ')} wait after {text}")
    entered = " or ".join(text.split(", in ")[1] for text in waiting)
    missed = f"did not enter {entered}" if waiting else "is in no collective"
    for rank in outside:
        report = reports[rank]
        lines.append(f"  rank {rank} on {report['host']} {missed}: after step {report['step']} at {report['place']}")
    for rank in sorted(set(range(len(hosts))) - set(reports)):
        lines.append(f"  rank {rank} on {hosts[rank]} does not answer: stopped, or its host or shared folder is gone")
    if not outside and len(reports) == len(hosts) and len(waiting) > 1:
        lines.append(f"  all ranks wait, in different collectives: {entered}")
    shown = outside or [ranks[0] for ranks in waiting.values()]
    for rank in shown[:4]:
        lines.append(f"stack of rank {rank} on {reports[rank]['host']}, newest call last:\n{reports[rank]['stack']}")
    return "\n".join(lines)
