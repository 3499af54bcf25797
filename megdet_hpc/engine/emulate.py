"""K ranks in one process, one BN group after another: a 128-GPU run's arithmetic on one device.

BN groups are independent of each other, and gradients add. So the ranks of one group run at the same time, as threads
that exchange their statistics, and the groups run in turn. A virtual rank has its own images, padding, box samples and
running statistics, as a real one has. Only the weights are shared. One difference to the real run is left: the order in
which gradients are summed.

The losses are divided by counts over all ranks, which the first group cannot know yet. Where there are several groups
each step therefore begins with a forward pass of all of them without gradients, for the counts only (a third more
work).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megdet_hpc.data.batch import Batch
from megdet_hpc.engine.passes import NotFiniteError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.models.detector import Detector, Draws
from megdet_hpc.models.losses import Losses, fetch, scaled
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks
from megdet_hpc.solver.precision import Precision


def _replica(model: Detector) -> Detector:
    """A copy with the same weights in memory, gradients and running statistics of its own."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    alone = SerialCommunicator()  # the group is put in before each pass
    shared.update({id(layer.group): alone for layer in _layers(model)})
    return copy.deepcopy(model, shared)


def _layers(model: nn.Module) -> list[CrossGpuBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, CrossGpuBatchNorm2d)]


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(names)}


class VirtualPasses:
    """The forward and backward passes of K ranks. For one process.

    Args:
        model: its weights are trained; its running statistics are those of the last `average_running_statistics`.
        groups: K and which ranks share statistics; the groups of a model without cross-GPU layers have one rank.
        precision: type and loss scale of the passes.
    """

    def __init__(self, model: Detector, groups: BnGroups, precision: Precision | None = None) -> None:
        self.model, self.size, self.precision = model, groups.num_ranks, precision or Precision()
        step = groups.ranks_per_group if _layers(model) else 1
        self.groups = [list(range(first, first + step)) for first in range(0, self.size, step)]
        self.replicas = [_replica(model) for _ in range(self.size)]
        self.ranks: Sequence[int] = range(self.size)

    def forward_backward(
        self, batches: list[Batch], *, step: int, seed: int, flags: Sequence[float] = ()
    ) -> tuple[dict[str, float], tuple[float, ...]]:
        """Leave the mean gradient of all ranks, times the loss scale, in the model's parameters.

        Args:
            batches: pass by pass and in a pass rank by rank; accumulate x ranks of them.
            step, seed: what the box sampling depends on.
            flags: flags of this process, returned as they are.

        Returns:
            Losses averaged over ranks and passes, and the flags.

        Raises:
            NotFiniteError: a loss is not finite; names the ranks, their images and losses.
        """
        passes = [batches[first : first + self.size] for first in range(0, len(batches), self.size)]
        totals: dict[str, float] = {}
        for batch in passes:
            for key, value in self._one_pass(batch, step, seed, len(passes)).items():
                totals[key] = totals.get(key, 0.0) + value / len(passes)
        return totals, tuple(flags)

    def _one_pass(self, batches: list[Batch], step: int, seed: int, num_passes: int) -> dict[str, float]:
        draws = Draws(seed, step)
        counts = self._counts(batches, draws) if len(self.groups) > 1 else None
        values: list[dict[str, float]] = []
        for group in self.groups:
            values += self._run(group, batches, draws, counts, 1 / (self.size * num_passes))
            for rank in group:
                self._collect_gradients(self.replicas[rank])
        if not all(math.isfinite(value) for own in values for value in own.values()):
            lines = [
                f"  virtual rank {rank}: images {batch.image_ids}, losses {own}"
                for rank, (batch, own) in enumerate(zip(batches, values, strict=True))
                if not all(map(math.isfinite, own.values()))
            ]
            raise NotFiniteError(f"step {step}: a loss is not finite\n" + "\n".join(lines))
        return {key: sum(own[key] for own in values) / self.size for key in values[0]}

    def _run(
        self, group: list[int], batches: list[Batch], draws: Draws, counts: list[float] | None, share: float
    ) -> list[dict[str, float]]:
        """One group's passes with gradients; each rank's shares of the losses.

        Args:
            counts: samples of all ranks, per loss; None where the group is all ranks, which then add them up.
        """

        def body(comm: Communicator) -> dict[str, float]:
            rank = group[comm.rank]
            losses = self._losses(self.replicas[rank], comm, batches[rank], draws)
            _, own, divided = fetch(losses)
            if counts is None:
                comm.allreduce_sum_(own, name="losses")
            parts = scaled(losses, divided.tolist(), own.tolist() if counts is None else counts, self.size)
            # with several threads autograd's own threads, one a device, would run one rank's backward after another's,
            # and each waits for the other's message
            with torch.autograd.set_multithreading_enabled(False):
                self.precision.scaler.scale(torch.stack(list(parts.values())).sum() * share).backward()
            return {key: float(part.detach()) for key, part in parts.items()}

        return run_ranks(len(group), body)

    @torch.no_grad()
    def _counts(self, batches: list[Batch], draws: Draws) -> list[float]:
        """Samples of all ranks, per loss; the running statistics stay as they are."""

        def body(comm: Communicator, group: list[int]) -> Tensor:
            model = self.replicas[group[comm.rank]]
            before = {name: buffer.clone() for name, buffer in _statistics(model).items()}
            with torch.no_grad():  # of this thread
                _, own, _ = fetch(self._losses(model, comm, batches[group[comm.rank]], draws))
            for name, buffer in _statistics(model).items():
                buffer.copy_(before[name])
            return own

        own = [row for group in self.groups for row in run_ranks(len(group), partial(body, group=group))]
        return torch.stack(own).sum(0).tolist()

    def _losses(self, model: Detector, group: Communicator, batch: Batch, draws: Draws) -> Losses:
        model.train(self.model.training)
        for layer in _layers(model):
            layer.group = group
        with self.precision.autocast():
            return model.losses(batch, draws)

    def _collect_gradients(self, replica: Detector) -> None:
        for ours, theirs in zip(self.model.parameters(), replica.parameters(), strict=True):
            if theirs.grad is None:
                continue
            if ours.grad is None:
                ours.grad = theirs.grad
            else:
                ours.grad += theirs.grad
            theirs.grad = None

    @torch.no_grad()
    def average_running_statistics(self) -> None:
        """Give every virtual rank, and the model, the mean of the running statistics, as real ranks do."""
        everyone = [_statistics(replica) for replica in self.replicas]
        for name, buffer in _statistics(self.model).items():
            if name.endswith("num_batches_tracked"):
                buffer.copy_(everyone[0][name])
                continue
            mean = torch.stack([own[name].double() for own in everyone]).mean(0)
            for copy_ in (buffer, *(own[name] for own in everyone)):
                copy_.copy_(mean)
