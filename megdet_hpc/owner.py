"""The owner of a folder: the one live process or job that writes into it. So two runs never mix there.

FOLDER/owner/holder.json names the holder: host, process, job. While the holder lives, it counts up in `beat-TOKEN`.
When it leaves, it removes that file. Whoever takes the folder over from the holder TOKEN makes `after-TOKEN` by
link(2). Only one of several can do so, even on parallel file systems without locks. The clocks of two hosts are never
compared: an observer sees by its own clock whether the count moves.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megdet_hpc.errors import MachineError, UserError, file_error
from megdet_hpc.files import sync_folder

EXIT_DISPLACED = 76
"""Exit status of a run whose folder another start has taken over. It wrote nothing after that."""

OWNER_VARIABLE = "MEGDET_OWNER"
"""Variable with the claim of a job's script on the run's folder; the job's training joins it."""
CONTINUES_VARIABLE = "MEGDET_CONTINUES"
"""Variable with the claim of the job that submitted this one as its successor."""
RUN_COUNT_VARIABLE = "MEGDET_RUN_COUNT"
"""Variable with the number of times that PBS has started this job. PBS itself tells qstat only."""

SINCE = "%Y-%m-%d %H:%M:%S"
"""Form of the local time in a mark."""

_FOLDER, _HOLDER = "owner", "holder.json"
_BEAT_SECONDS = 5.0
# Time after which a holder on another host is dead if its count does not move. A file system that stalls, or a library
# that keeps the interpreter to itself, stops the count of a live holder for seconds. That holder finds out before its
# next write.
DEAD_SECONDS = 60.0
_LOOK_SECONDS = 0.25
# Errors of file systems that have no hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES}


class DisplacedError(UserError):
    """The folder belongs to another start now. This process must not write there any more."""

    status = EXIT_DISPLACED


@dataclass(frozen=True)
class Mark:
    """The holder of a folder, as its file names it."""

    token: str
    """Name that no other holder has."""
    claim: str
    """Name that a job's script and its training share. They hold the folder one after the other."""
    host: str = ""
    machine: str = ""
    """The running kernel and its namespace of process numbers. Where both are equal, `pid` means the same process."""
    pid: int = 0
    started: str = ""
    """The time when the process began, in ticks of the kernel. It tells a later process with the same number."""
    job: str = ""
    run: int | None = None
    """The number of times that the scheduler has started this job again; None where it does not say."""
    since: str = ""

    def __str__(self) -> str:
        job = f"{self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"


def _read_text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


def _machine() -> str:
    boot = _read_text(Path("/proc/sys/kernel/random/boot_id")).strip() or socket.gethostname()
    try:
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return boot


def _start_of(pid: int) -> str | None:
    """The time when a process of this machine began; "" where the kernel does not say, None if there is no process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    fields = _read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    if fields and fields[0] in "ZX":
        return None
    return fields[19] if fields else ""


def _own_mark(claim: str, environ: Mapping[str, str]) -> Mark:
    job, run = "", None
    if number := environ.get("SLURM_JOB_ID"):
        job, run = f"SLURM job {number}", int(environ.get("SLURM_RESTART_COUNT") or 0)
    elif number := environ.get("PBS_JOBID"):
        count = environ.get(RUN_COUNT_VARIABLE, "")
        job, run = f"PBS job {number}", int(count) if count.isdigit() else None
    token = secrets.token_hex(8)
    since = time.strftime(SINCE)
    pid = os.getpid()
    return Mark(token, claim or token, socket.gethostname(), _machine(), pid, _start_of(pid) or "", job, run, since)


def _read_mark(path: Path) -> Mark | None:
    """The mark in a file; None where there is no file.

    A content that cannot be understood gives a mark without a beat, which nobody holds.

    Raises:
        OSError: the file is there and cannot be read.
    """
    for left in (2, 1, 0):
        try:
            text = path.read_text()
            break
        except FileNotFoundError:
            return None
        except OSError as error:
            # NFS: the file was replaced between opening and reading
            if error.errno != errno.ESTALE or not left:
                raise
    try:
        return Mark(**json.loads(text))
    except (ValueError, TypeError):
        token = f"damaged-{len(text)}"
        return Mark(token, token)


def _chain(folder: Path) -> list[Mark]:
    """The holder in holder.json, and the holders after it, which have not written that file or never will."""
    home = folder / _FOLDER
    chain: list[Mark] = []
    following = _read_mark(home / _HOLDER) or _read_mark(home / "after-start")
    while following is not None:
        chain.append(following)
        following = _read_mark(home / f"after-{following.token}")
    return chain


def current(folder: Path) -> Mark | None:
    """The holder of a folder, alive or dead; None if there never was one.

    Raises:
        OSError: the file system failed.
    """
    return next(reversed(_chain(folder)), None)


def seen_alive(folder: Path, mark: Mark) -> bool | None:
    """Whether the holder of a folder lives, as far as one look tells; None on another machine, where it may."""
    if not _read_text(folder / _FOLDER / f"beat-{mark.token}"):
        return False
    return _start_of(mark.pid) in ("", mark.started) if mark.machine == _machine() else None


def may_be_held_by(folder: Path) -> Mark | None:
    """The holder of a folder, unless one look tells that it is dead; None if there never was one.

    Raises:
        OSError: the file system failed.
    """
    mark = current(folder)
    return None if mark is None or seen_alive(folder, mark) is False else mark


def is_alive(folder: Path, mark: Mark) -> bool:
    """Whether the holder of a folder lives. On this machine its process tells, elsewhere its count."""
    beat = folder / _FOLDER / f"beat-{mark.token}"
    first = _read_text(beat)
    if (seen := seen_alive(folder, mark)) is not None:
        return seen
    sys.stderr.write(f"{folder}: held by {mark}; watching for at most {DEAD_SECONDS:.0f} s whether it lives\n")
    sys.stderr.flush()
    end = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
        now = _read_text(beat)
        if now != first:
            return bool(now)
    return False


def check_claim(folder: Path, claim: str) -> None:
    """Make sure that this claim still holds the folder. Called before each write to it. Not a collective.

    Raises:
        DisplacedError: another claim holds it.
        MachineError: the file system failed.
    """
    try:
        mark = current(folder)
    except OSError as error:
        raise MachineError(f"{folder}: the mark of its owner cannot be read ({error.strerror})") from error
    if mark is None:
        raise DisplacedError(f"{folder}: the mark of its owner was removed; this run writes there no more")
    if mark.claim != claim:
        raise DisplacedError(f"{folder} was taken over by {mark}; this run writes there no more")


class Claim:
    """The hold of this process on a folder. `take` begins it, `release` ends it."""

    def __init__(self, folder: Path, mark: Mark, *, joins: bool = False) -> None:
        self.folder, self.mark, self._joins = folder, mark, joins
        self._home, self._beat = folder / _FOLDER, folder / _FOLDER / f"beat-{mark.token}"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._count, name="owner", daemon=True)

    def _count(self) -> None:
        number = 0
        while not self._end.wait(_BEAT_SECONDS):
            number += 1
            # written in place: a file that was removed must not come back
            with suppress(OSError), open(self._beat, "r+b", buffering=0) as file:
                file.write(b"%020d" % number)
                os.fsync(file.fileno())

    def follow(self, before: Mark | None) -> bool:
        """Take the folder over from a holder, unless another process does. Returns whether it worked."""
        mark = self._home / f"mark-{self.mark.token}"
        link = self._home / f"after-{before.token if before else 'start'}"
        content = json.dumps(asdict(self.mark), indent=1).encode("ascii")
        try:
            for path, text in ((self._beat, b"%020d" % 0), (mark, content)):
                with open(path, "wb") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            if not _make_once(mark, link, content):
                return False
            chain = _chain(self.folder)
            if chain[-1:] != [self.mark]:  # the holder was another by then
                link.unlink(missing_ok=True)
                return False
            os.replace(mark, self._home / _HOLDER)
            sync_folder(self._home)
        finally:
            mark.unlink(missing_ok=True)
            if current(self.folder) != self.mark:
                self._beat.unlink(missing_ok=True)
        for token in ["start", *(earlier.token for earlier in chain[:-1])]:
            (self._home / f"after-{token}").unlink(missing_ok=True)
            (self._home / f"beat-{token}").unlink(missing_ok=True)
        self._thread.start()
        return True

    def check(self) -> None:
        """Make sure that this process still holds the folder (see `check_claim`)."""
        check_claim(self.folder, self.mark.claim)

    def release(self) -> None:
        """Leave the folder. The process that made the claim also removes a folder with nothing else in it."""
        self._end.set()
        with suppress(OSError):
            if not self._joins and os.listdir(self.folder) == [_FOLDER] and current(self.folder) == self.mark:
                for path in (self._home / _HOLDER, *self._home.glob("after-*")):  # after-*: left by an interruption
                    path.unlink(missing_ok=True)
        with suppress(OSError):
            self._beat.unlink(missing_ok=True)
            self._home.rmdir()
            self.folder.rmdir()


def _make_once(source: Path, target: Path, content: bytes) -> bool:
    """Give a file a second name, which must be new. Returns whether it was."""
    try:
        os.link(source, target)
        return True
    except FileExistsError:
        # a server that answers a repeated request says this of the link that it made itself
        return os.stat(source).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        with open(target, "xb", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())
        return True
    except FileExistsError:
        return False


def _may_displace(mine: Mark, holder: Mark, continues: str, script: bool) -> bool:
    """Whether a holder that may still write must give way to its own job, started again, or to its successor."""
    if continues and holder.claim == continues:
        return True
    if not mine.job or mine.job != holder.job:
        return False
    if mine.run is None or holder.run is None:
        return script  # a job has one script at a time
    return mine.run > holder.run


def take(folder: Path, environ: Mapping[str, str] = os.environ, *, claim: str = "") -> Claim:
    """Take a folder for this process. A folder that is missing is made.

    A dead holder loses the folder. A holder on another host is watched until its count moves, or for DEAD_SECONDS. Two
    starts take the folder even from a live holder: the next start of the same job by the scheduler, and the successor
    that a job submits.

    Args:
        folder: folder of the run.
        environ: environment, which names the scheduler's job and the claim of its script, which this process joins.
        claim: claim of the job's script, if this process belongs to the script.

    Raises:
        UserError: the folder cannot be made, or another process or job holds it.
        DisplacedError: the job's script has lost it.
    """
    joins = "" if claim else environ.get(OWNER_VARIABLE, "")
    mine = _own_mark(claim or joins, environ)
    try:
        while True:
            (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
            holder = current(folder)
            if joins and (holder is None or holder.claim != joins):
                check_claim(folder, joins)
            if (
                holder
                and not joins
                and not _may_displace(mine, holder, environ.get(CONTINUES_VARIABLE, ""), script=bool(claim))
                and is_alive(folder, holder)
            ):
                raise UserError(
                    f"output {folder} is held by {holder}, which is alive; wait for its end, or name another --output"
                )
            held = Claim(folder, mine, joins=bool(joins))
            try:
                if held.follow(holder):
                    return held
            except FileNotFoundError:
                pass  # another process has left the folder and removed it
            except BaseException:
                held.release()
                raise
            time.sleep(_LOOK_SECONDS / 10)
    except OSError as error:
        raise file_error(error, f"output {folder}: cannot be made ({error.strerror})") from error


def main(arguments: list[str] | None = None) -> None:
    """Hold a folder for a job's script until standard input ends: `python -m megdet_hpc.owner FOLDER CLAIM`.

    It prints "held", or the exit status of a refusal, whose reason goes to standard error.
    """
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # these signals are for the script, which lives on for a while
    folder, claim = sys.argv[1:] if arguments is None else arguments
    try:
        held = take(Path(folder), claim=claim)
    except UserError as error:
        print(f"megdet_hpc: error: {error}", file=sys.stderr, flush=True)
        print(error.status, flush=True)
        sys.stdin.read()  # a coprocess that ends early is forgotten by the shell before it is asked
        raise SystemExit(error.status) from None
    print("held", flush=True)
    sys.stdin.read()
    held.release()


if __name__ == "__main__":
    main()
