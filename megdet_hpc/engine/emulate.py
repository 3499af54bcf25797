"""K ranks in one process, one BN group after another: a 128-GPU run's arithmetic on one device.

BN groups are independent of each other, and gradients add. So the ranks of one group run at the same time, as threads
that exchange their statistics, and the groups run in turn. A virtual rank has its own images, padding, box samples and
running statistics, as a real one has. Only the weights are shared. One difference to the real run is left: the order in
which gradients are summed.

The losses are divided by counts over all ranks, which are not known when the first group runs. With several groups each
step therefore begins with a forward pass of all groups without gradients, for the counts only (a third more work). With
emulate.keep_graphs the backward passes wait instead, until the forward passes of all groups have given their counts.
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
from megdet_hpc.engine.state import running_statistics
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.models.detector import Detector, Draws
from megdet_hpc.models.losses import Losses, fetch, scaled
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks
from megdet_hpc.solver.agvm import EmulatedHalves
from megdet_hpc.solver.gradient_noise import GradientNoise
from megdet_hpc.solver.precision import Precision


def _replica(model: Detector) -> Detector:
    """A copy that shares the weights and has its own gradients and running statistics."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    alone = SerialCommunicator()  # each pass sets the group first
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
        model: detector whose weights are trained. Its running statistics are those of the last
            `average_running_statistics`.
        groups: K, and the ranks that share statistics. Without cross-GPU layers each group has one rank.
        precision: type and loss scale of the passes.
        keep_graphs: hold the graphs of all groups in place of a forward pass for the counts.
        noise: gets the gradient of each pass.
        halves: gets it too.

    Raises:
        UserError: keep_graphs with groups of several ranks.
    """

    def __init__(
        self,
        model: Detector,
        groups: BnGroups,
        precision: Precision | None = None,
        *,
        keep_graphs: bool = False,
        noise: GradientNoise | None = None,
        halves: EmulatedHalves | None = None,
    ) -> None:
        self.model, self.size, self.precision = model, groups.num_ranks, precision or Precision()
        step = groups.ranks_per_group if _layers(model) else 1
        self.groups = [list(range(first, first + step)) for first in range(0, self.size, step)]
        if keep_graphs and step > 1 and len(self.groups) > 1:
            images = groups.images_per_rank
            raise UserError(
                f"emulate.keep_graphs true: {step} ranks share statistics; accepted with one rank in each BN group, "
                f"such as data.images_per_rank {step * images}"
            )
        self.keep_graphs = keep_graphs and len(self.groups) > 1
        self.replicas = [_replica(model) for _ in range(self.size)]
        self.ranks: Sequence[int] = range(self.size)
        self.noise, self.halves = noise, halves

    def forward_backward(
        self, batches: list[Batch], *, step: int, seed: int, flags: Sequence[float] = ()
    ) -> tuple[dict[str, float], tuple[float, ...]]:
        """Leave the mean gradient of all ranks, times the loss scale, in the model's parameters.

        Args:
            batches: accumulate x ranks batches, ordered by pass and in each pass by rank.
            step, seed: numbers on which the box sampling depends.
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
        draws, share = Draws(seed, step), 1 / (self.size * num_passes)
        values: list[dict[str, float]] = []
        if self.keep_graphs:
            values = self._run_held(batches, draws, share)
        else:
            counts = self._counts(batches, draws) if len(self.groups) > 1 else None
            for group in self.groups:
                values += self._run(group, batches, draws, counts, share)
                for rank in group:
                    self._collect_gradients(rank)
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
        """Run one group's passes with gradients. Returns each rank's shares of the losses.

        Args:
            counts: number of samples of all ranks for each loss; None if the group has all ranks, which then sum them.
        """

        def body(comm: Communicator) -> dict[str, float]:
            rank = group[comm.rank]
            losses = self._losses(self.replicas[rank], comm, batches[rank], draws)
            _, own, divided = fetch(losses)
            if counts is None:
                comm.allreduce_sum_(own, name="losses")
            parts = scaled(losses, divided.tolist(), own.tolist() if counts is None else counts, self.size)
            # autograd has one thread per device, which would run the ranks' backward passes one after another, though
            # each waits for the others' messages; without it each rank's own thread runs its backward pass
            with torch.autograd.set_multithreading_enabled(False):
                self.precision.scaler.scale(torch.stack(list(parts.values())).sum() * share).backward()
            return {key: float(part.detach()) for key, part in parts.items()}

        return run_ranks(len(group), body)

    def _run_held(self, batches: list[Batch], draws: Draws, share: float) -> list[dict[str, float]]:
        """Run all groups' passes, each of one rank, the backward passes last. Returns each rank's shares of the losses.

        Args:
            batches: a micro-batch of each rank.
            draws: draws of this step.
            share: factor of each rank's loss in the mean gradient.
        """
        alone = SerialCommunicator()
        losses = [self._losses(*each, draws) for each in zip(self.replicas, [alone] * self.size, batches, strict=True)]
        found = [fetch(own) for own in losses]
        counts = torch.stack([own for _, own, _ in found]).sum(0).tolist()
        values: list[dict[str, float]] = []
        for rank in range(self.size):
            parts = scaled(losses[rank], found[rank][2].tolist(), counts, self.size)
            losses[rank] = {}  # so that the backward pass frees the graph
            self.precision.scaler.scale(torch.stack(list(parts.values())).sum() * share).backward()
            self._collect_gradients(rank)
            values.append({key: float(part.detach()) for key, part in parts.items()})
        return values

    @torch.no_grad()
    def _counts(self, batches: list[Batch], draws: Draws) -> list[float]:
        """Number of samples of all ranks for each loss. The running statistics do not change."""

        def body(comm: Communicator, group: list[int]) -> Tensor:
            model = self.replicas[group[comm.rank]]
            before = {name: buffer.clone() for name, buffer in _statistics(model).items()}
            with torch.no_grad():  # it holds for this thread only
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

    def _collect_gradients(self, rank: int) -> None:
        replica = self.replicas[rank]
        if self.noise:
            self.noise.add(parameter.grad for parameter in replica.parameters())
        if self.halves:
            self.halves.add(rank, [parameter.grad for parameter in replica.parameters()])
        sums, further = [], []
        for ours, theirs in zip(self.model.parameters(), replica.parameters(), strict=True):
            if theirs.grad is None:
                continue
            if ours.grad is None:
                ours.grad = theirs.grad
            else:
                sums.append(ours.grad)
                further.append(theirs.grad)
            theirs.grad = None
        if sums:
            torch._foreach_add_(sums, further)

    @torch.no_grad()
    def running_statistics(self) -> dict[str, Tensor]:
        """The means of the virtual ranks' running statistics, by name; as one tensor each."""
        everyone = [running_statistics(replica) for replica in self.replicas]
        return {
            name: torch.stack([own[name].double() for own in everyone]).mean(0).to(buffer.dtype)
            for name, buffer in everyone[0].items()
        }

    @torch.no_grad()
    def average_running_statistics(self, further: Sequence[Tensor] = ()) -> None:
        """Give every virtual rank, and the model, the mean of the running statistics, as real ranks do.

        Further tensors are those of one process, and stay.
        """
        everyone = [_statistics(replica) for replica in self.replicas]
        for name, buffer in _statistics(self.model).items():
            if name.endswith("num_batches_tracked"):
                buffer.copy_(everyone[0][name])
                continue
            mean = torch.stack([own[name].double() for own in everyone]).mean(0)
            for copy_ in (buffer, *(own[name] for own in everyone)):
                copy_.copy_(mean)
