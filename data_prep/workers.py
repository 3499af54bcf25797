"""Runs shard tasks in worker processes or MPI ranks, and ends the processes with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, as_completed, wait
from multiprocessing import connection
from typing import Any

from data_prep.shard_writer import ShardTask, pack_shard


def prepare_worker() -> None:
    """In a worker process: leave Ctrl-C to the parent, and end when the parent does, even when killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def terminate_workers(kind: type[BaseException] | None, *_: object) -> None:
    """On leaving with an error, stop the workers in the middle of their shards."""
    if kind is not None:
        for process in multiprocessing.active_children():
            process.terminate()


def run_tasks(tasks: Iterator[ShardTask], executor: Executor | None, workers: int) -> Iterator[dict[str, Any]]:
    """Run the tasks, a bounded number at a time, and yield their reports as they come."""
    if executor is None:
        yield from map(pack_shard, tasks)
        return
    pending: set[Future[dict[str, Any]]] = set()
    for task in tasks:
        if len(pending) == 2 * workers:  # one running and one waiting each; a task holds its annotations
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
        pending.add(executor.submit(pack_shard, task))
    yield from (future.result() for future in as_completed(pending))
