"""The processes of a run: who they are, how gradients meet, and how a failing rank ends the job.

`started()` is entered once by each entry point. It is the only place that decides between one process and
many, so nothing else asks which launcher there was.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from megdet_hpc.errors import UserError
from megdet_hpc.interrupts import EXIT_INTERRUPTED, say_interrupted
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.launch import (
    FILL_NODES,
    find_launch,
    idle_nodes,
    is_first_process,
    known_launch,
    note_launched,
    note_status,
)
from megdet_hpc.parallel.mpi import abort_mpi
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.transports import horovod_cycle_ms, resolve_transport
from megdet_hpc.programs import as_called_here

# Long enough for rank 0 to print a failure that all ranks share and to end the job before they repeat it: 0.3 s by
# MPI's abort, 1 to 2 s where MPI never started and the launcher waits for Python's exit.
_OTHERS_WAIT_SECONDS = 3.0


class SynchronizedOptimizer:
    """An optimizer and the averaging of its gradients over the ranks. This one is for a single process.

    One update is: zero_grad, `accumulate` backward passes, synchronize, (clip), step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def synchronize(self) -> None:
        """Average the gradients over all ranks in place. Collective of the world; blocks; size 1: nothing."""

    def step(self) -> None:
        """Update the weights from gradients that synchronize() has averaged."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad()

    def set_lr(self, rate: float) -> None:
        """Use this learning rate from the next step on."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate


@dataclass
class Runtime:
    """The world of ranks and this process's place on its host. This class is one process without Horovod."""

    world: Communicator
    local_rank: int = 0
    local_size: int = 1
    description: str = "1 process, without Horovod"
    num_hosts: int = 1

    def device(self, choice: str) -> torch.device:
        """The device of this rank: its own GPU (by local rank) or the CPU.

        Raises:
            UserError: cuda was asked for and this host has fewer GPUs than ranks.
        """
        if device_type(choice) == "cpu":
            return torch.device("cpu")
        available = torch.cuda.device_count()
        # a launcher may have narrowed CUDA_VISIBLE_DEVICES to one GPU per rank already
        index = self.local_rank if available > 1 else 0
        if index >= available or (available == 1 and self.local_size > 1 and not _one_gpu_per_rank()):
            raise UserError(
                f"device {choice}: {socket.gethostname()} runs {self.local_size} ranks and shows {available} GPU(s); "
                "start one rank per GPU, or pass --device cpu"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def communicator(self, transport: str, device: torch.device) -> Communicator:
        """The world with its tensors on one transport; objects, barriers and splits are MPI's on each.

        Collective of the world; blocks. The same transport again gives the same communicator; on one rank all give
        the world as it is. How each transport sends is told in mpi.py, horovod.py and torch_distributed.py.

        Args:
            transport: auto, mpi, horovod or torch; auto is mpi on CPUs and torch (NCCL) on GPUs.
            device: of the tensors that this rank will send.

        Raises:
            UserError: another name, or a transport that this job lacks; on every rank.
        """
        resolve_transport(transport, device.type)
        return self.world

    @property
    def gradients_over_nccl(self) -> bool:
        """Whether gradients on GPUs would travel over NCCL; one process sends none."""
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
        """Tie an optimizer's gradients to the ranks'. Not a collective.

        Args:
            optimizer: over parameters of the model.
            model: names the gradients' messages.
            accumulate: backward passes per update.
            compression: none or fp16, the type in which gradients travel; one process sends none.
            overlap: whether each gradient leaves during the backward pass, or all of them after it.

        Raises:
            UserError: this Horovod cannot move the model's tensors.
        """
        return SynchronizedOptimizer(optimizer)

    def broadcast_model(self, model: nn.Module) -> None:
        """Give every rank rank 0's parameters and buffers. Collective of the world; blocks.

        Raises:
            UserError: this Horovod cannot move the model's tensors.
        """

    def abort(self, status: int = 1) -> None:
        """End every process of the job with this status. Not a collective; does not return under MPI."""

    def finish(self) -> None:
        """Leave the world in order. Collective of the world; blocks."""


def _one_gpu_per_rank() -> bool:
    return "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")


def device_type(choice: str) -> str:
    """cpu or cuda: auto is cuda where this host shows a GPU, which is not touched yet."""
    return ("cuda" if torch.cuda.device_count() else "cpu") if choice == "auto" else choice


def _start(transport: str, device: str, deterministic: bool) -> Runtime:
    try:
        launch = known_launch()
    except UserError as error:
        if is_first_process():
            raise
        raise SystemExit(error.status) from None  # the first says it for all, who are no world of ours
    if launch is None:
        return Runtime(SerialCommunicator())
    from megdet_hpc.parallel.horovod import start_horovod

    return start_horovod(launch, horovod_cycle_ms(transport, device_type(device)), fuse=not deterministic)


def _report(error: BaseException, runtime: Runtime | None) -> None:
    """Print why this rank fails: one line where the user can mend it, else the traceback."""
    world = runtime.world if runtime else None
    if not (world.rank == 0 if world else is_first_process()):
        time.sleep(_OTHERS_WAIT_SECONDS)
    launch = find_launch()
    rank, size = (world.rank, world.size) if world else (launch.rank, launch.size) if launch else (0, 1)
    where = f"rank {rank} of {size} on {socket.gethostname()}: " if size > 1 else ""
    sys.stdout.flush()
    if isinstance(error, UserError):
        sys.stderr.write(f"megdet_hpc: {where}error: {as_called_here(str(error))}\n")
    else:
        heading = f"megdet_hpc: {where}failed\n" if where else ""
        sys.stderr.write(heading + "".join(traceback.format_exception(error)))
    sys.stderr.flush()


@contextmanager
def started(transport: str = "auto", device: str = "auto", *, deterministic: bool = False) -> Iterator[Runtime]:
    """Join the launcher's world, or be the only process; leave it in order, or end the whole job.

    A rank that raises prints its traceback and aborts the MPI job, since its peers would otherwise wait for it
    in their next collective for ever.

    Args:
        transport: of the normalization layers' messages, if it is known already; Horovod's cycle suits it.
        device: auto, cpu or cuda, likewise.
        deterministic: gradients travel one by one, since which ones Horovod joins into a message depends on time.

    Raises:
        SystemExit: after an error has been printed, with the status of a UserError, which is 2 where the user can mend
            it, else 1.
    """
    runtime: Runtime | None = None
    try:
        runtime = _start(transport, device, deterministic)
        note_launched()
        if runtime.world.rank == 0 and (idle := idle_nodes(runtime.num_hosts)):
            sys.stderr.write(f"megdet_hpc: warning: {idle}; {FILL_NODES}\n")
        yield runtime
    except SystemExit as exit_:
        if exit_.code not in (None, 0) and runtime:
            runtime.abort(exit_.code if isinstance(exit_.code, int) else 1)
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            say_interrupted()
            status = EXIT_INTERRUPTED
        else:
            _report(error, runtime)
            status = error.status if isinstance(error, UserError) else 1
        note_status(status)
        if runtime:
            runtime.abort(status)
        else:
            # MPI may run already, and its orderly end would wait for ranks that did start
            abort_mpi(status)
        raise SystemExit(status) from None
    else:
        runtime.finish()
