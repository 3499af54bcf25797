"""Times of a run's steps, for the log and to know whether another step fits into the run's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from megdet_hpc.engine.energy import energy_row
from megdet_hpc.parallel.communicator import MESSAGES, Communicator

Joules = tuple[float | None, float | None]


def _between(before: Joules, after: Joules) -> Joules:
    """The energy of processors and of the GPU between two readings [J]; None where it was not read."""
    cpu, gpu = (
        None if earlier is None or later is None else later - earlier
        for earlier, later in zip(before, after, strict=True)
    )
    return cpu, gpu


class StepClock:
    """Times the steps since the last row of the log, and keeps the longest step, save and evaluation so far.

    Pauses are left out of the steps' time.

    Args:
        hears: whether MESSAGES has all messages of a step, so that the rest of its time is a rank's own work.
        joules: gives the energy so far of the counters that this rank reads, see `EnergyMeter`.
    """

    def __init__(self, *, hears: bool = False, joules: Callable[[], Joules] = lambda: (None, None)) -> None:
        self._hears, self._joules = hears, joules
        self._longest = {"step": 0.0, "save": 0.0, "evaluation": 0.0}  # seconds
        self._saved = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Begin a row."""
        self._since, self._loading, self._steps = time.perf_counter(), 0.0, 0
        self._messages, self._gradients = MESSAGES.seconds, MESSAGES.gradients
        self._energy = self._joules()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step, its data included."""
        with self.longest("step"):
            yield
        self._steps += 1
        self._joules()  # the counters start again after some minutes

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Time the wait for a step's data."""
        begin = time.perf_counter()
        yield
        self._loading += time.perf_counter() - begin

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave this time out: it belongs to no step."""
        begin, messages, energy = time.perf_counter(), MESSAGES.seconds, self._joules()
        yield
        self._energy = _between(_between(self._energy, energy), self._joules())
        self._since += time.perf_counter() - begin
        self._messages += MESSAGES.seconds - messages

    @contextmanager
    def longest(self, what: Literal["step", "save", "evaluation"]) -> Iterator[None]:
        """Time the block, and remember it if it is the longest of its kind so far."""
        begin = time.perf_counter()
        yield
        self._longest[what] = max(self._longest[what], time.perf_counter() - begin)
        if what == "save":
            self._saved = time.perf_counter()

    def unsaved_for(self, minutes: float | None) -> bool:
        """Whether the last save, or the start, is this long ago by this rank's clock; never for None."""
        return minutes is not None and time.perf_counter() - self._saved >= 60 * minutes

    def until_after_next(self, evaluations: int) -> float:
        """Longest time of this step and the next one, with this number of evaluations and one save [seconds]."""
        return 2 * self._longest["step"] + evaluations * self._longest["evaluation"] + self._longest["save"]

    def speeds(self, world: Communicator, global_batch: float) -> dict[str, float]:
        """Times of the steps since the last row: mean and maximum over ranks, since the slowest rank sets the pace.

        energy_cpu_j and energy_gpu_j are of the steps since the last row, by all counters that a rank could read.
        save_max_s is the longest save of this start, once there was one. The ranks wait for it.

        All ranks end a step together, since they wait for the slowest. That is the one with the most work of its own,
        the time outside messages. Collective of the world; blocks; name times.

        Args:
            world: all ranks.
            global_batch: images of a step, on average since the last row.
        """
        whole, steps = time.perf_counter() - self._since, self._steps
        read = _between(self._energy, self._joules())
        own, gradients = whole - (MESSAGES.seconds - self._messages), MESSAGES.gradients - self._gradients
        times = world.allgather_object((whole, self._loading, own, gradients, read), name="times")
        slowest = max(total for total, *_ in times)
        speeds = {
            "images_per_s": global_batch * steps / slowest,
            "step_mean_s": sum(total for total, *_ in times) / len(times) / steps,
            "step_max_s": slowest / steps,
            "data_mean_s": sum(data for _, data, *_ in times) / len(times) / steps,
            "data_max_s": max(data for _, data, *_ in times) / steps,
        }
        speeds |= energy_row([read for *_, read in times], global_batch * steps)
        if self._longest["save"]:
            speeds["save_max_s"] = self._longest["save"]
        if self._hears and world.size > 1:
            works = [work / steps for _, _, work, *_ in times]
            most = max(works)
            speeds |= {"own_mean_s": sum(works) / len(works), "own_max_s": most, "slowest_rank": works.index(most)}
            # a part of the messages, waiting for slower ranks included
            speeds["gradients_mean_s"] = sum(waited for *_, waited, _ in times) / len(times) / steps
        return speeds
