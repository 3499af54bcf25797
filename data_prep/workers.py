"""Runs shard tasks in worker processes or MPI ranks, and ends the processes with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from itertools import islice
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from data_prep.shard_writer import ShardTask, pack_shard
from megdet_hpc.interrupts import children_deaf


class _Worker(SpawnProcess):
    def start(self) -> None:
        with children_deaf():
            super().start()


class WorkerContext(SpawnContext):
    """Starts worker processes, which leave Ctrl-C to their parent.

    By spawn, since a forked child keeps its siblings' pipes open and would outlive a killed parent.
    """

    Process = _Worker


def prepare_worker() -> None:
    """Prepare a worker process: it ends when the parent ends or is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def terminate_workers(kind: type[BaseException] | None, *_: object) -> None:
    """Stop the workers at once, in the middle of their shards, if the block ends with an error."""
    if kind is not None:
        for process in multiprocessing.active_children():
            process.terminate()


def _take_back(pending: dict[Future[dict[str, Any]], ShardTask]) -> ShardTask | None:
    """A task that was given to a worker and has not begun, or None."""
    for future, task in reversed(pending.items()):
        if future.cancel():
            del pending[future]
            return task
    return None


def run_tasks(
    tasks: Iterator[ShardTask], executor: Executor | None, workers: int, join: bool = False
) -> Iterator[tuple[ShardTask, dict[str, Any]]]:
    """Run the tasks, a limited number at a time, and yield each with its report when it is finished.

    Args:
        tasks: the tasks in the order in which they are handed out, each to the next free worker.
        executor: pool that runs `pack_shard`; None: run it in this process.
        workers: number of tasks that `executor` runs at a time.
        join: whether this process packs too. It does so in a thread, and so still gives tasks to the workers and
            notices a failure at once.
    """
    if executor is None:
        yield from ((task, pack_shard(task)) for task in tasks)
        return
    pending: dict[Future[dict[str, Any]], ShardTask] = {}
    own: Future[dict[str, Any]] | None = None
    own_task: ShardTask | None = None
    thread = ThreadPoolExecutor(1)
    try:
        while True:
            # each worker runs one task and has one waiting; more would hold more annotations in memory
            for task in islice(tasks, 2 * workers - len(pending)):
                pending[executor.submit(pack_shard, task)] = task
            if join and own is None:
                own_task = next(tasks, None) or _take_back(pending)
                own = thread.submit(pack_shard, own_task) if own_task else None
            running = [*pending, own] if own else [*pending]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                if future is own and own_task is not None:
                    yield own_task, future.result()
                    own = None
                else:
                    yield pending[future], future.result()
                    del pending[future]
    finally:
        thread.shutdown(wait=False, cancel_futures=True)  # after another failure nobody waits for the thread
