"""DataLoaders: batches of training, single images of evaluation."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from functools import partial

import torch
from torch.utils.data import DataLoader

from megdet_hpc.data.batch import Sample, collate
from megdet_hpc.data.dataset import DetectionDataset


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def make_loader(
    dataset: DetectionDataset,
    batches: Iterable[list[tuple[int, int]]],
    *,
    num_workers: int,
    pin_memory: bool,
    side: int | None = None,
) -> DataLoader[Sample]:
    """A loader over lists of (epoch, index) keys, in their order; iterating gives `Batch`.

    Every batch is padded to a square of `side` pixels, or to its largest image where that is None.
    Workers start by forkserver, never by fork: a process in which MPI runs must not be forked.
    """
    if num_workers:
        # the server imports torch once and every worker is a fork of it: 16 MB of private memory instead of 370
        multiprocessing.set_forkserver_preload(["megdet_hpc.data.loader", "megdet_hpc.command_line"])
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=partial(collate, side=side),
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
        multiprocessing_context="forkserver" if num_workers else None,
    )
