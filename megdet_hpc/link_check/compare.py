"""The plan's time of a step beside the measured one, for settings of the links between nodes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from megdet_hpc.errors import UserError
from megdet_hpc.link_check.nodes import LinkedNodes
from megdet_hpc.parallel.local_launch import error_of_ranks
from megdet_hpc.plan.cost import StepTime, Work, step_time
from megdet_hpc.plan.network import Network, exchanges

_END = 60  # s in which ranks end


@dataclass(frozen=True)
class LinkSetting:
    """A link: its delay [s], and the rate at which a node sends [bytes/s]."""

    delay: float
    rate: float


@dataclass(frozen=True)
class LinkRow:
    """One setting of the links: what was measured, and the step that is predicted from it.

    Attributes:
        setting: delay and rate.
        alone: step that sends nothing, of the ranks beside each other; median [s].
        software: time of a short message beyond its work and the link's delay [s].
        long_rate: rate of long messages over links without limit [bytes/s].
        predicted: parts of the step by the plan, from the four above [s].
        measured: real step, of the slowest rank; median [s].
        quickest: the quickest of them [s].
        steps: number of them.
        load: mean number of the machine's busy processes in the minute before.
    """

    setting: LinkSetting
    alone: float
    software: float
    long_rate: float
    predicted: StepTime
    measured: float
    quickest: float
    steps: int
    load: float

    @property
    def error(self) -> float:
        """Error of the prediction, relative to the measured step."""
        return self.predicted.total / self.measured - 1


def network_of(setting: LinkSetting, software: float, long_rate: float) -> Network:
    """The network of nodes with one rank each: the link, and the software before it.

    The software's time adds to the link's delay. Of the two rates the lower one holds, since the kernel sends while the
    library copies.
    """
    alpha, bandwidth = setting.delay + software, min(setting.rate, long_rate)
    return Network("linked nodes", alpha, bandwidth, alpha, bandwidth)


class LinkedRanks:
    """Ranks on linked nodes, one on each, that measure on demand. A context manager.

    Args:
        nodes: nodes, which are up.
        arguments: command line of `ranks.py`.

    Raises:
        UserError: the ranks ended; the message holds their last line.
    """

    def __init__(self, nodes: LinkedNodes, arguments: list[str]) -> None:
        # a shell on the nodes reads the words again
        program = map(shlex.quote, [sys.executable, "-m", "megdet_hpc.link_check.ranks", *arguments])
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__; a pipe that nobody reads fills up
        self._ranks = subprocess.Popen(
            [*nodes.mpirun(len(nodes.names)), *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> LinkedRanks:
        self._read()
        return self

    def _read(self) -> dict[str, Any]:
        assert self._ranks.stdout
        for line in self._ranks.stdout:
            if line.startswith("{"):
                row: dict[str, Any] = json.loads(line)
                return row
        status = self._ranks.wait()
        self._errors.seek(0)
        raise UserError(f"the ranks ended with status {status}: {error_of_ranks(self._errors.read())}")

    def ask(self, what: str) -> dict[str, Any]:
        """Let the ranks measure `long_messages` or `steps`."""
        with suppress(OSError):  # the ranks have ended; what they said is read below
            self._say(what)
        found = self._read()
        self._read()  # they are ready again
        return found

    def _say(self, line: str) -> None:
        assert self._ranks.stdin
        self._ranks.stdin.write(f"{line}\n")
        self._ranks.stdin.flush()

    def __exit__(self, *_: object) -> None:
        try:
            if self._ranks.poll() is None:
                self._say("end")
            self._ranks.communicate(timeout=_END)
        except (OSError, subprocess.TimeoutExpired):
            self._ranks.kill()
            self._ranks.wait()
        finally:
            self._errors.close()


def compare(nodes: LinkedNodes, arguments: list[str], work: Work, settings: Sequence[LinkSetting]) -> list[LinkRow]:
    """Measure each setting, and predict its step from messages and from steps that send nothing.

    Args:
        nodes: nodes, which are up; each gets one rank.
        arguments: command line of `ranks.py`.
        work: the work of a rank. The steps that send nothing replace its images_per_second.
        settings: delays and rates. BBR, the TCP of some hosts, remembers the shortest delay for 10 s and sends too
            little over a longer one, so the settings are taken by falling delay, and the links without delay come last.
    """
    ranks, found = len(nodes.names), list[tuple[LinkSetting, float, dict[str, list[float]]]]()
    with LinkedRanks(nodes, arguments) as started:
        for setting in sorted(settings, key=lambda own: (-own.delay, own.rate)):
            nodes.set_links(setting.delay, setting.rate)
            load = os.getloadavg()[0]
            found.append((setting, load, started.ask("steps")))
        nodes.set_links(0.0, 0.0)
        long_rate = started.ask("long_messages")["bandwidth"]
    return [_row(setting, load, times, long_rate, work, ranks) for setting, load, times in found]


def _row(
    setting: LinkSetting, load: float, times: dict[str, list[float]], long_rate: float, work: Work, ranks: int
) -> LinkRow:
    alone, together = median(times["alone"]), times["together"]
    rounds = exchanges(ranks)
    software = max((median(times["message"]) - median(times["work"])) / rounds - setting.delay, 0.0)
    predicted = step_time(
        replace(work, images_per_second=work.images_per_rank * work.accumulate / alone),
        network_of(setting, software, long_rate),
        ranks=ranks,
        ranks_per_node=1,
        group_ranks=ranks,
        group_nodes=ranks,
    )
    measured = median(together)
    return LinkRow(setting, alone, software, long_rate, predicted, measured, min(together), len(together), load)
