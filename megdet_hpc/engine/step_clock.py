"""How long a run's steps take: for the log, and for the question whether another step fits into the run's time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from megdet_hpc.parallel.communicator import Communicator


class StepClock:
    """Times the steps since the last row of the log, and keeps the longest step, save and evaluation so far.

    Pauses are left out of the steps' time.
    """

    def __init__(self) -> None:
        self._longest = {"step": 0.0, "save": 0.0, "evaluation": 0.0}  # seconds
        self.restart()

    def restart(self) -> None:
        """Begin a row."""
        self._since, self._loading, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step, its data included."""
        with self.longest("step"):
            yield
        self._steps += 1

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Time the wait for a step's data."""
        begin = time.perf_counter()
        yield
        self._loading += time.perf_counter() - begin

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out what is no step."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    @contextmanager
    def longest(self, what: Literal["step", "save", "evaluation"]) -> Iterator[None]:
        """Remember how long this took if it is the longest of its kind so far."""
        begin = time.perf_counter()
        yield
        self._longest[what] = max(self._longest[what], time.perf_counter() - begin)

    def until_after_next(self, evaluations: int) -> float:
        """What this step and the next one take at most, with so many evaluations and one save [seconds]."""
        return 2 * self._longest["step"] + evaluations * self._longest["evaluation"] + self._longest["save"]

    def speeds(self, world: Communicator, global_batch: int) -> dict[str, float]:
        """Times of the steps since the last row, whose end this is: the mean over ranks, and the maximum.

        The slowest rank sets the pace. Collective of the world; blocks; name times.

        Args:
            world: all ranks.
            global_batch: images of a step.
        """
        own, steps = (time.perf_counter() - self._since, self._loading), self._steps
        times = world.allgather_object(own, name="times")
        slowest = max(total for total, _ in times)
        return {
            "images_per_s": global_batch * steps / slowest,
            "step_mean_s": sum(total for total, _ in times) / len(times) / steps,
            "step_max_s": slowest / steps,
            "data_mean_s": sum(data for _, data in times) / len(times) / steps,
            "data_max_s": max(data for _, data in times) / steps,
        }
