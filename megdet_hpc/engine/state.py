"""Equality of the model on all ranks: weights are compared by hash, running statistics are averaged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.solver.ema import STATISTICS


def state_hash(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A digest of the bytes of all parameters, buffers and optimizer state."""
    momenta = {
        f"optimizer.{index}.{key}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.state_dict().items(), *momenta.items()]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_same_state(model: nn.Module, optimizer: torch.optim.Optimizer, world: Communicator) -> str:
    """Compare the ranks' parameters, buffers and optimizer state. Collective of the world; blocks.

    Returns:
        The common digest.

    Raises:
        RuntimeError: some ranks differ from rank 0. Every rank raises it, with their numbers.
    """
    digests = world.allgather_object(state_hash(model, optimizer), name="state_hash")
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise RuntimeError(
            f"ranks {different} hold other weights, buffers or momenta than rank 0 (of {world.size} ranks)"
        )
    return digests[0]


@torch.no_grad()
def average_running_statistics(model: nn.Module, world: Communicator, further: Sequence[torch.Tensor] = ()) -> None:
    """Give every rank the world's mean of the running statistics. Collective of the world; blocks; one message.

    BN groups see different images, so their running means and variances differ; evaluation and checkpoints
    need one set. Training does not read them.

    Args:
        model: detector whose statistics are changed in place.
        world: all ranks.
        further: tensors that become their means too, such as moving averages of the statistics.
    """
    buffers = [*running_statistics(model).values(), *further]
    if not buffers or world.size == 1:
        return
    message = torch.cat([buffer.double().flatten() for buffer in buffers])
    world.allreduce_sum_(message, name="running_statistics")
    message /= world.size
    for buffer, part in zip(buffers, message.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """The running means and variances of a model by name."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(STATISTICS)}
