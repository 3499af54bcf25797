"""The batches of a run on its device. On a GPU those of an update arrive while the update before is computed.

The copies, and with data.decode_on_gpu the decoding, are queued on a stream of their own, so the stream of the model
neither makes them nor waits for them. Batches and their order are those of the loader, and so is what a resumed run
sees: it begins with the loader that it makes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megdet_hpc.data.batch import Batch
from megdet_hpc.devices import is_gpu, kind_of

Update = list[Batch]
"""The micro-batches of an update."""


def on_device(updates: Iterator[Update], device: torch.device) -> Iterator[Update]:
    """The batches of each update in turn, on a device; on a CPU as they are.

    Args:
        updates: batches of each update, as the loader gives them, in pinned memory for a GPU.
        device: device of the model.
    """
    if is_gpu(device):
        return ahead_on(updates, device)
    return ([batch.to(device) for batch in update] for update in updates)


def ahead_on(updates: Iterator[Update], device: torch.device) -> Iterator[Update]:
    """The batches of each update in turn, on a GPU, those of the next update on their way.

    An error about the data, such as a damaged picture, is raised where its update is asked for, not one before.

    Args:
        updates: see `on_device`.
        device: the GPU.

    Raises:
        UserError: what reading raises.
    """
    gpu = kind_of(device.type).module
    side = gpu.Stream(device)

    def begin() -> Update | Exception | None:
        with gpu.stream(side):
            try:
                update = next(updates, None)
                return None if update is None else [batch.to(device) for batch in update]
            except Exception as error:  # it belongs to this update, and the one before is not done yet
                return error

    coming = begin()
    while coming is not None:
        if isinstance(coming, Exception):
            raise coming
        arrived, own = coming, gpu.current_stream(device)
        own.wait_stream(side)  # the stream waits, the host does not
        for batch in arrived:
            batch.record_stream(own)
        coming = begin()
        yield arrived
