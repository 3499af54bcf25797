"""The runtime of a process: the world of ranks, its device, the averaging of gradients. Here for a single process."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch
from torch import nn

from megdet_hpc.devices import found_type, kind_of
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.transports import CARRIERS, Overlap, hides_gradients, resolve_transport

# The gradients' carrier as text, where it is Horovod.
HOROVOD = "Horovod"

SHARED = "cuda_shared"
"""Device of ranks that share the first GPU of their host. It shows on one GPU that several ranks work, and is slow."""


class SynchronizedOptimizer:
    """An optimizer and the averaging of its gradients over the ranks. This class is for a single process.

    An update is zero_grad, `accumulate` backward passes, synchronize, (clip), step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def synchronize(self) -> None:
        """Average the gradients over all ranks in place. Collective of the world; blocks; at size 1 nothing happens."""

    def step(self) -> None:
        """Update the weights from gradients that synchronize() has averaged."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad()

    def set_passes(self, number: int) -> None:
        """Expect this number of backward passes in an update, from the one that zero_grad() has begun on."""

    def set_lr(self, rate: float) -> None:
        """Use this learning rate from the next step on."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate


@dataclass
class Runtime:
    """The world of ranks, and the place of this process on its host. This class is a single process without Horovod."""

    world: Communicator
    local_rank: int = 0
    local_size: int = 1
    description: str = "1 process, without Horovod"
    num_hosts: int = 1
    carrier: str = "none"
    """What carries the gradients, as text."""
    shares_gpu: bool = False
    """Whether the ranks of a host share its first GPU, which NCCL refuses. Their messages pass through the host."""

    def device(self, choice: str) -> torch.device:
        """The device of this rank: its own GPU, by local rank, or the CPU.

        Args:
            choice: auto, cpu, cuda or xpu; cuda_shared is the first GPU of the host for all of its ranks.

        Raises:
            UserError: a kind of GPU was asked for of which this host has fewer than ranks; or none for cuda_shared.
        """
        kind = kind_of(device_type(choice))
        if kind.type == "cpu":
            return torch.device("cpu")
        available = kind.count()
        if choice == SHARED and available:
            self.shares_gpu = self.world.size > 1
            kind.module.set_device(0)
            return torch.device(kind.type, 0)
        # a launcher may have shown each rank one GPU already
        index = self.local_rank if available > 1 else 0
        if index >= available or (available == 1 and self.local_size > 1 and not _one_gpu_per_rank(kind.shown_by)):
            raise UserError(
                f"device {choice}: {socket.gethostname()} runs {self.local_size} ranks and shows {available} GPU(s); "
                "start one rank per GPU, or pass --device cpu"
            )
        kind.module.set_device(index)
        return torch.device(kind.type, index)

    def communicator(self, transport: str, device: torch.device) -> Communicator:
        """The world with one transport for tensors. Objects, barriers and splits always go over MPI.

        Collective of the world; blocks. The same transport again gives the same communicator. On one rank every
        transport gives the world as it is. mpi.py, horovod.py and torch_distributed.py describe the transports.

        Args:
            transport: auto, mpi, horovod or torch; auto is mpi on CPUs and torch (NCCL) on GPUs.
            device: device of the tensors that this rank will send.

        Raises:
            UserError: the name is unknown, or this job lacks the transport; raised on every rank.
        """
        resolve_transport(transport, device.type)
        return self.world

    def _through_host(self, transport: str) -> Communicator:
        """The world, whose messages pass through host memory, for ranks that share a GPU."""
        if transport not in ("auto", self.world.transport):
            raise UserError(
                f"norm.transport is {transport!r}, which ranks that share a GPU cannot use; accepted here: auto, "
                f"{self.world.transport}"
            )
        return self.world

    @property
    def transports(self) -> tuple[str, ...]:
        """The transports that this job can start. On one rank all are the same."""
        return CARRIERS

    def resolve(self, transport: str, device_type: str) -> str:
        """The name of a transport; auto becomes the one that suits the type of device, in this job.

        Raises:
            UserError: the name is unknown, or the job has no such transport.
        """
        return resolve_transport(transport, device_type)

    @property
    def may_overlap(self) -> bool:
        """Whether gradients can travel during the backward pass."""
        return True

    def overlaps(self, choice: Overlap, *, device: torch.device, transport: str, layers_send: bool) -> bool:
        """Whether gradients travel during this job's backward pass; the arguments are those of `hides_gradients`."""
        return self.may_overlap and hides_gradients(
            choice,
            device_type=device.type,
            transport=transport,
            layers_send=layers_send,
            gradients_over_nccl=self.gradients_over_nccl,
        )

    @property
    def gradients_over_nccl(self) -> bool:
        """Whether gradients on GPUs would travel over NCCL. One process sends none."""
        return False

    @property
    def holds_interpreter(self) -> bool:
        """Whether a rank may hold Python's interpreter while it waits for the others, so that no watchdog runs."""
        return False

    def distribute(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        accumulate: int,
        *,
        compression: str = "none",
        overlap: bool = True,
    ) -> SynchronizedOptimizer:
        """Connect an optimizer's gradients with those of the other ranks. A collective of the world; it may block.

        Args:
            optimizer: optimizer of the model's parameters.
            model: model whose parameter names become the messages' names.
            accumulate: number of backward passes in an update.
            compression: type in which gradients travel, none or fp16. One process sends none.
            overlap: send each gradient during the backward pass. Otherwise all are sent after it.

        Raises:
            UserError: this Horovod cannot move the model's tensors.
        """
        return SynchronizedOptimizer(optimizer)

    def broadcast_model(self, model: nn.Module) -> None:
        """Give the parameters and buffers of rank 0 to every rank. Collective of the world; blocks.

        Raises:
            UserError: this Horovod cannot move the model's tensors.
        """

    def abort(self, status: int = 1) -> None:
        """End every process of the job with this status. Not a collective. Under MPI it does not return."""

    def finish(self) -> None:
        """Leave the world in order. Collective of the world; blocks."""


def _one_gpu_per_rank(variable: str) -> bool:
    return "," not in os.environ.get(variable, ",")


def device_type(choice: str) -> str:
    """The type of a device: cpu, cuda or xpu. auto is that of the GPUs which this host shows; they are not touched."""
    if choice == "auto":
        return found_type()
    return "cuda" if choice == SHARED else choice
