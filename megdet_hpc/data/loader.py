"""DataLoaders, which give batches in training and single images in evaluation."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megdet_hpc.config import Geometry
from megdet_hpc.data.batch import Batch, collate
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.gpu_decode import DecodedBatches, EncodedImages
from megdet_hpc.data.sample import Sample
from megdet_hpc.errors import UserError
from megdet_hpc.interrupts import children_deaf


def start_server(*modules: str) -> str:
    """Start the server whose forks the loader processes are, unless it runs. Ctrl-C is left to the rank.

    Args:
        modules: what the server imports once. Every worker is a fork of it then, with 16 MB of private memory; one that
            imports torch by itself has 370.

    Returns:
        The name that multiprocessing has for processes of this kind.
    """
    multiprocessing.set_forkserver_preload(list(modules))
    with children_deaf():
        forkserver.ensure_running()
    return "forkserver"


def prepare_worker(worker: int) -> None:
    """Keep a loader worker to one core, since its rank has the others, and end it with its rank, even a killed one.

    A worker is the fork server's child, so torch's own look at the parent's id does not see the rank die.
    """
    torch.set_num_threads(1)
    rank = multiprocessing.parent_process()
    if rank is not None:
        threading.Thread(target=_end_with, args=(rank,), daemon=True).start()


def _end_with(process: Any) -> None:
    process.join()
    os._exit(1)


class _Batches(Dataset[Any]):
    """A data set whose UserError is returned in place of the batch.

    A worker's exception would reach the training process as its whole traceback in one message.
    """

    def __init__(self, dataset: DetectionDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample] | UserError:
        try:
            return [self._dataset[key] for key in keys]
        except UserError as error:
            return error


class _Collate:
    def __init__(self, side: int | None, geometry: Geometry) -> None:
        self._side, self._geometry = side, geometry

    def __call__(self, samples: list[Sample] | UserError) -> Batch | UserError:
        return samples if isinstance(samples, UserError) else collate(samples, self._side, self._geometry)


class _Loader(DataLoader[Any]):
    """A DataLoader that raises a worker's UserError as it was, one line."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def make_loader(
    dataset: DetectionDataset,
    batches: Iterable[list[tuple[int, int]]],
    *,
    num_workers: int,
    pin_memory: bool,
    side: int | None = None,
    decode_on: torch.device | None = None,
    again: bool = False,
) -> Iterable[Batch]:
    """A loader over lists of (epoch, index) keys, in their order; iterating gives `Batch`.

    Every batch is padded to a square of `side` pixels, or to its largest image where that is None.
    A UserError in a worker, such as a damaged shard's PackError, is raised here unchanged.
    With `again` the loader processes live on after an iteration, for the next one.
    With `decode_on` the loader processes only read, and this process decodes on that device (gpu_decode.py).
    Workers start by forkserver, never by fork: a process in which MPI runs must not be forked.
    """
    options: dict[str, Any] = {
        "batch_sampler": batches,
        "num_workers": num_workers,
        "worker_init_fn": prepare_worker,
        "multiprocessing_context": start_server("megdet_hpc.data.loader", "megdet_hpc.command_line")
        if num_workers
        else None,
        "persistent_workers": again and num_workers > 0,
    }
    if decode_on is not None:
        encoded: DataLoader[Any] = DataLoader(EncodedImages(dataset), collate_fn=_unchanged, **options)
        return DecodedBatches(encoded, dataset, decode_on, side)
    return _Loader(_Batches(dataset), collate_fn=_Collate(side, dataset.geometry), pin_memory=pin_memory, **options)


def _unchanged(items: Any) -> Any:
    return items
