"""K ranks in one process, one BN group after another: a 128-GPU run's arithmetic on one device.

BN groups are independent of each other and gradients add, so the ranks of one group run at the same time, as threads
that exchange their statistics, and the groups run in turn. A virtual rank has its own images, padding, box samples and
running statistics, as a real one has; only the weights are one memory. What is left of a difference to the real run is
the order in which gradients are summed.

The losses are normalized by counts over all ranks, which the first group cannot know yet. Where there are several
groups each step therefore begins with a forward pass of all of them without gradients that only collects the counts
(a third more work); the forward passes with gradients then get the sums at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megdet_hpc.data.batch import Batch
from megdet_hpc.data.sampler import EpochPlan, RankSampler
from megdet_hpc.engine.step import Losses, NotFiniteError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.models.detector import FasterRcnn
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks
from megdet_hpc.solver.precision import Precision


class CountedWorld(SerialCommunicator):
    """A virtual rank's place among all, of which only a group runs: sums are first collected, then told.

    Attributes:
        own: what this rank sent in the collecting pass, in order.
        totals: the sums over all ranks to be told from now on; None while collecting.
    """

    transport = "emulated"

    def __init__(self, size: int) -> None:
        self.size = size
        self.own: list[Tensor] = []
        self.totals: Iterator[Tensor] | None = None

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        if self.totals is None:
            self.own.append(tensor.detach().clone())
        else:
            tensor.copy_(next(self.totals))


def _replica(model: FasterRcnn) -> FasterRcnn:
    """A copy with the same weights in memory, gradients and running statistics of its own."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    # communicators are put in before each pass
    alone = SerialCommunicator()
    shared[id(model.world)] = alone
    shared.update({id(layer.group): alone for layer in _layers(model)})
    return copy.deepcopy(model, shared)


def _layers(model: nn.Module) -> list[CrossGpuBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, CrossGpuBatchNorm2d)]


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(names)}


class VirtualRanks:
    """The forward and backward passes of K ranks. For one process.

    Args:
        model: its weights are trained; its running statistics are those of the last `average_running_statistics`.
        groups: K and which ranks share statistics; the groups of a model without cross-GPU layers have one rank.
        precision: of the passes.
    """

    def __init__(self, model: FasterRcnn, groups: BnGroups, precision: Precision | None = None) -> None:
        self.model, self.size, self.precision = model, groups.num_ranks, precision or Precision()
        step = groups.ranks_per_group if _layers(model) else 1
        self.groups = [list(range(first, first + step)) for first in range(0, self.size, step)]
        self.ranks = [_replica(model) for _ in range(self.size)]

    def sampler(self, plan: EpochPlan, first_step: int, last_step: int) -> list[list[tuple[int, int]]]:
        """The keys of every micro-batch, pass by pass and in a pass rank by rank."""
        ranks = [RankSampler(plan, rank, first_step, last_step) for rank in range(self.size)]
        return [keys for together in zip(*ranks, strict=True) for keys in together]

    def batches_per_step(self, accumulate: int) -> int:
        """Micro-batches that `forward_backward` takes."""
        return accumulate * self.size

    def forward_backward(self, batches: list[Batch], *, step: int, seed: int) -> dict[str, float]:
        """Leave the mean gradient of all ranks, times the loss scale, in the model's parameters.

        Args:
            batches: in the order of `sampler`; (accumulate x ranks).
            step, seed: of the box sampling.

        Returns:
            Losses averaged over ranks and passes.

        Raises:
            NotFiniteError: a loss is not finite; names the ranks, their images and losses.
        """
        passes = [batches[first : first + self.size] for first in range(0, len(batches), self.size)]
        totals: dict[str, float] = {}
        for batch in passes:
            for key, value in self._one_pass(batch, step, seed, len(passes)).items():
                totals[key] = totals.get(key, 0.0) + value / len(passes)
        return totals

    def _one_pass(self, batches: list[Batch], step: int, seed: int, num_passes: int) -> dict[str, float]:
        counts = self._counts(batches, step, seed) if len(self.groups) > 1 else None
        losses: list[dict[str, float]] = []
        for group in self.groups:
            losses += self._run(group, batches, step, seed, counts, 1 / (self.size * num_passes))
            for rank in group:
                self._collect_gradients(self.ranks[rank])
        if not all(math.isfinite(value) for own in losses for value in own.values()):
            lines = [
                f"  virtual rank {rank}: images {batch.image_ids}, losses {own}"
                for rank, (batch, own) in enumerate(zip(batches, losses, strict=True))
                if not all(map(math.isfinite, own.values()))
            ]
            raise NotFiniteError(f"step {step}: a loss is not finite\n" + "\n".join(lines))
        return {key: sum(own[key] for own in losses) / self.size for key in losses[0]}

    def _run(
        self, group: list[int], batches: list[Batch], step: int, seed: int, counts: list[Tensor] | None, share: float
    ) -> list[dict[str, float]]:
        """One group's passes with gradients; each rank's losses."""

        def body(comm: Communicator) -> dict[str, float]:
            rank = group[comm.rank]
            model = self.ranks[rank]
            world: Communicator = comm
            if counts is not None:
                world = CountedWorld(self.size)
                world.totals = iter(counts)
            losses = self._forward(model, comm, world, batches[rank], step, seed)
            # with several threads autograd's own threads, one a device, would run one rank's backward after another's,
            # and each waits for the other's message
            with torch.autograd.set_multithreading_enabled(False):
                self.precision.scaler.scale(torch.stack(list(losses.values())).sum() * share).backward()
            return {key: float(losses[key].detach()) for key in sorted(losses)}

        return run_ranks(len(group), body)

    @torch.no_grad()
    def _counts(self, batches: list[Batch], step: int, seed: int) -> list[Tensor]:
        """The sums over all ranks of what a forward pass sends to the world, in order."""
        worlds = [CountedWorld(self.size) for _ in range(self.size)]
        for group in self.groups:

            def body(comm: Communicator, group: list[int] = group) -> None:
                rank = group[comm.rank]
                before = {name: buffer.clone() for name, buffer in _statistics(self.ranks[rank]).items()}
                with torch.no_grad():  # of this thread
                    self._forward(self.ranks[rank], comm, worlds[rank], batches[rank], step, seed)
                for name, buffer in _statistics(self.ranks[rank]).items():
                    buffer.copy_(before[name])

            run_ranks(len(group), body)
        return [torch.stack(values).sum(0) for values in zip(*(world.own for world in worlds), strict=True)]

    def _forward(
        self, model: FasterRcnn, group: Communicator, world: Communicator, batch: Batch, step: int, seed: int
    ) -> Losses:
        model.train(self.model.training)
        model.world = world
        for layer in _layers(model):
            layer.group = group
        model.prepare_sampling(seed, step, batch.image_ids)
        with self.precision.autocast():
            losses: Losses = model(batch.images, batch.sizes, batch.targets)
        return losses

    def _collect_gradients(self, replica: FasterRcnn) -> None:
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
        everyone = [_statistics(rank) for rank in self.ranks]
        for name, buffer in _statistics(self.model).items():
            if name.endswith("num_batches_tracked"):
                buffer.copy_(everyone[0][name])
                continue
            mean = torch.stack([own[name].double() for own in everyone]).mean(0)
            for copy_ in (buffer, *(own[name] for own in everyone)):
                copy_.copy_(mean)
