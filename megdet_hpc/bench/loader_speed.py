"""Speed of a DataLoader of one source: images per second, time to the first batch, memory of its workers."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from megdet_hpc.bench.loader_sources import MEMORY, Sources, drop_from_cache
from megdet_hpc.data.batch import collate
from megdet_hpc.data.loader import prepare_worker, start_server

WARM, COLD = "warm", "cold"
IMAGES_PER_BATCH = 2


@dataclass(frozen=True)
class LoaderPass:
    """One pass over a loader.

    Attributes:
        images_per_s: images per second between the first batch and the last.
        cpu_ms: processor time of this process per image in that span. Without workers it is the whole cost of an image,
            and other work on the machine does not lengthen it much [milliseconds].
        first_batch_s: time from the call for an iterator to the first batch; it includes the start of workers
            [seconds].
        worker_mib: mean proportional set size of a worker; None without workers or outside Linux [MiB].
    """

    images_per_s: float
    cpu_ms: float
    first_batch_s: float
    worker_mib: float | None


def proportional_mib(pid: int) -> float | None:
    """Proportional set size of a process: a shared page counts in part [MiB]. None outside Linux."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def run_once(dataset: Any, num_images: int, images: int, workers: int) -> LoaderPass:
    """Load `images` images in batches of IMAGES_PER_BATCH. The data set of num_images is repeated if necessary."""
    keys = [(0, index % num_images) for index in range(images)]
    context = start_server("megdet_hpc.bench.loader") if workers else None
    shared: dict[str, Any] = {
        "num_workers": workers,
        "collate_fn": collate,
        "worker_init_fn": prepare_worker,
        "multiprocessing_context": context,
    }
    if isinstance(dataset, IterableDataset):
        loader = DataLoader(dataset, batch_size=IMAGES_PER_BATCH, **shared)
    else:
        batches = [keys[start : start + IMAGES_PER_BATCH] for start in range(0, images, IMAGES_PER_BATCH)]
        loader = DataLoader(dataset, batch_sampler=batches, **shared)
    before = {child.pid for child in multiprocessing.active_children()}
    begin = time.perf_counter()
    iterator = iter(loader)
    next(iterator)
    first, first_cpu = time.perf_counter(), time.process_time()
    count = sum(len(batch.image_ids) for batch in islice(iterator, images // IMAGES_PER_BATCH - 1))
    end, end_cpu = time.perf_counter(), time.process_time()
    pids = [child.pid for child in multiprocessing.active_children() if child.pid not in before]
    sizes = [size for pid in pids if pid is not None and (size := proportional_mib(pid)) is not None]
    del iterator
    return LoaderPass(
        count / (end - first),
        (end_cpu - first_cpu) / count * 1e3,
        first - begin,
        statistics.mean(sizes) if sizes else None,
    )


def loader_rows(
    sources: Sources, num_images: int, images: int, workers: list[int], caches: list[str], repeats: int
) -> list[dict[str, Any]]:
    """Measure every source with every number of workers and state of the cache, in turns.

    Returns:
        A row for each combination. to_limit is the ratio to MEMORY in the same turn, the median over the repeats.
    """
    torch.set_num_threads(1)
    runs: dict[tuple[int, str, str], list[LoaderPass]] = defaultdict(list)
    for _ in range(repeats):
        for count in workers:
            for cache in caches:
                for name, dataset in sources.datasets.items():
                    paths = sources.paths.get(name)
                    if paths is None and cache == COLD and WARM in caches:
                        continue  # it has no files
                    if cache == COLD and paths:
                        drop_from_cache(paths)
                    runs[count, cache, name].append(run_once(dataset, num_images, images, count))
    return [_row(key, found, runs) for key, found in runs.items()]


def _row(
    key: tuple[int, str, str], found: list[LoaderPass], runs: dict[tuple[int, str, str], list[LoaderPass]]
) -> dict[str, Any]:
    count, cache, name = key
    limits = runs.get((count, WARM, MEMORY)) or runs[count, cache, MEMORY]
    speeds = [run.images_per_s for run in found]
    ratios = [run.images_per_s / limit.images_per_s for run, limit in zip(found, limits, strict=True)]
    sizes = [run.worker_mib for run in found if run.worker_mib is not None]
    return {
        "source": name,
        "workers": count,
        "cache": cache if name != MEMORY else "-",
        "images_per_s": statistics.median(speeds),
        "least": min(speeds),
        "most": max(speeds),
        "to_limit": statistics.median(ratios),
        "cpu_ms": None if count else statistics.median(run.cpu_ms for run in found),
        "first_batch_s": statistics.median(run.first_batch_s for run in found),
        "worker_mib": statistics.median(sizes) if sizes else None,
    }
