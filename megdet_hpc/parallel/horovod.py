"""Horovod over MPI: it carries the gradients of every run, and is one transport of the normalization layers' messages.

Horovod fuses gradients and, with solver.overlap, sends them during the backward pass. A small message waits for
Horovod's cycle (HOROVOD_CYCLE_TIME, 1 ms), so `auto` prefers other transports for the layers.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megdet_hpc.devices import is_gpu, stream_of
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.communicator import MESSAGES, Communicator
from megdet_hpc.parallel.cores import named_threads
from megdet_hpc.parallel.launchers import GLOO_LAUNCHER, Launch
from megdet_hpc.parallel.libraries import LibraryError, horovod_built, import_libraries, mpi_version
from megdet_hpc.parallel.mpi import LibraryCommunicator, LibraryGroups, MpiCommunicator, abort_mpi
from megdet_hpc.parallel.mpi_runtime import contradiction
from megdet_hpc.parallel.runtime import HOROVOD, Runtime, SynchronizedOptimizer
from megdet_hpc.parallel.torch_distributed import close_torch, torch_communicator
from megdet_hpc.parallel.transports import GPU_BUILD_REMEDY, gpu_build_fault, resolve_transport

_INSTALL = "run tools/setup_env.sh in a checkout (make setup), or start one process with plain python"
# With this variable groups can be made after hvd.init(), when the configuration is known. Horovod's thread then holds a
# lock while it waits for the other ranks in each cycle. Who sends a gradient waits for that lock with the interpreter
# held, so that no Python thread of this rank runs, the watchdog's among them. Set for norm.transport horovod only.
_DYNAMIC_SETS = "HOROVOD_DYNAMIC_PROCESS_SETS"
# Horovod's limits for a late rank: a warning, and the end of the job where no watchdog ends it first [seconds].
_STALL_DEFAULTS = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "60", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "1800"}


class HorovodCommunicator(LibraryCommunicator):
    """A group whose tensors go over a Horovod process set. Every method blocks.

    Horovod matches messages by name. The number of the set, which is equal on its ranks, follows the caller's name.
    """

    transport = "horovod"

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        import horovod.torch as hvd

        if self.size > 1:
            begin = time.perf_counter()
            hvd.allreduce_(tensor.detach(), name=self._unique(name), op=hvd.Sum, process_set=self._group)
            MESSAGES.seconds += time.perf_counter() - begin

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        import horovod.torch as hvd

        own = tensor.detach().unsqueeze(0)
        if self.size == 1:
            return own.clone()
        gathered: Tensor = hvd.allgather(own, name=self._unique(name), process_set=self._group)
        return gathered

    def _unique(self, name: str) -> str:
        return f"{name}@{self._group.process_set_id}"


def horovod_communicator(world: Any, device: torch.device) -> HorovodCommunicator:
    """The world over Horovod. It sends nothing, but every rank must make its communicators in the same order.

    Args:
        world: mpi4py communicator of all ranks.
        device: device of this rank's tensors.

    Raises:
        UserError: this Horovod cannot read the device; by `split`: it cannot make groups after its start.
    """
    import horovod.torch as hvd

    def add_group(ranks: list[int]) -> Any:
        dynamic = os.environ.get(_DYNAMIC_SETS)
        if dynamic != "1":
            raise UserError(f"groups over Horovod need {_DYNAMIC_SETS}=1 or unset, the environment has {dynamic!r}")
        return hvd.add_process_set(ranks)

    _require_gpu_build(device.type)
    everyone = tuple(range(world.Get_size()))
    groups = LibraryGroups(world, add_group, {everyone: hvd.global_process_set})
    return HorovodCommunicator(world, groups, everyone)


def _require_gpu_build(device_type: str) -> None:
    """Raise a UserError if Horovod would die at the first tensor of this device, which leaves no traceback."""
    fault = gpu_build_fault(device_type, horovod_built())
    if fault:
        raise UserError(f"{fault}, where it dies without a word; {GPU_BUILD_REMEDY}")


class HorovodOptimizer(SynchronizedOptimizer):
    """An optimizer whose gradients hvd.DistributedOptimizer averages, with one named allreduce for each parameter.

    Args:
        optimizer: optimizer of the model's parameters.
        model: model on one device.
        accumulate: number of backward passes in an update.
        compression: none or fp16.
        overlap: send a gradient as soon as the last backward pass has made it. Otherwise all gradients are sent in
            `synchronize`, when nothing else runs on the device.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, accumulate: int, compression: str, overlap: bool
    ) -> None:
        import horovod.torch as hvd

        self._wait_for = None if overlap else next(model.parameters()).device
        # with one pass more than there are, no hook sends; synchronize() then sends what is unsent
        self._unseen, self._passes = 0 if overlap else 1, accumulate
        super().__init__(
            hvd.DistributedOptimizer(
                optimizer,
                named_parameters=[(name, p) for name, p in model.named_parameters() if p.requires_grad],
                compression=getattr(hvd.Compression, compression),
                backward_passes_per_step=accumulate + self._unseen,
            )
        )

    def set_passes(self, number: int) -> None:
        if number != self._passes:
            self._passes = number
            self.optimizer.set_backward_passes_per_step(number + self._unseen)  # type: ignore[attr-defined]

    def synchronize(self) -> None:
        if self._wait_for is not None and is_gpu(self._wait_for):
            stream_of(self._wait_for).synchronize()
        begin = time.perf_counter()
        self.optimizer.synchronize()  # type: ignore[attr-defined]
        MESSAGES.add_gradients(time.perf_counter() - begin)

    def step(self) -> None:
        with self.optimizer.skip_synchronize():  # type: ignore[attr-defined]
            self.optimizer.step()


@dataclass
class HorovodRuntime(Runtime):
    """A process among many, under mpirun, horovodrun or srun."""

    mpi_world: Any = None
    """mpi4py communicator of all ranks, which `world` wraps."""
    _made: dict[tuple[str, str], Communicator] = field(default_factory=dict)

    def communicator(self, transport: str, device: torch.device) -> Communicator:
        if self.shares_gpu:
            return self._through_host(transport)
        resolved = resolve_transport(transport, device.type)
        if resolved == "mpi" or self.world.size == 1:
            return self.world
        key = (resolved, device.type)
        if key not in self._made:
            make = torch_communicator if resolved == "torch" else horovod_communicator
            self._made[key] = make(self.mpi_world, device)
        return self._made[key]

    @property
    def gradients_over_nccl(self) -> bool:
        return "nccl" in horovod_built()

    @property
    def holds_interpreter(self) -> bool:
        return os.environ.get(_DYNAMIC_SETS) == "1"

    def distribute(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        accumulate: int,
        *,
        compression: str = "none",
        overlap: bool = True,
    ) -> SynchronizedOptimizer:
        if self.shares_gpu:
            raise UserError("device cuda_shared needs --solver.gradients mpi or torch: Horovod wants a GPU a rank")
        _require_gpu_build(next(model.parameters()).device.type)
        return HorovodOptimizer(optimizer, model, accumulate, compression, overlap)

    def broadcast_model(self, model: nn.Module) -> None:
        import horovod.torch as hvd

        _require_gpu_build(next(model.parameters()).device.type)
        # state_dict() also holds non-float counters, which Horovod broadcasts like any tensor
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    def abort(self, status: int = 1) -> None:
        abort_mpi(status)

    def finish(self) -> None:
        import horovod.torch as hvd

        self.world.barrier(name="finish")
        close_torch()
        hvd.shutdown()


def start_horovod(launch: Launch, cycle_ms: int, *, fuse: bool = True, groups: bool = False) -> Runtime:
    """Start MPI and Horovod and check that both see the launcher's world. Collective of the world; blocks.

    Args:
        launch: the launcher and its ranks.
        cycle_ms: time between two meetings of Horovod's threads [ms].
        fuse: join gradients into larger messages. Which gradients are joined depends on time.
        groups: let groups of ranks be made over Horovod.

    Raises:
        UserError: Horovod or mpi4py is missing or broken, was built for another MPI, or lacks PyTorch, MPI or MPI's
            threads; or the launcher is horovodrun without MPI.
    """
    started = f"{launch.launcher} started {launch.size} rank(s)"
    if launch.launcher == GLOO_LAUNCHER:
        raise UserError(
            f"{started} without MPI, which carries the objects and the small sums of a run; start them with "
            f"horovodrun --mpi -np {launch.size} or mpirun -np {launch.size} (horovodrun --check-build shows whether "
            "this Horovod has MPI)"
        )
    if groups:
        os.environ.setdefault(_DYNAMIC_SETS, "1")
    for name, value in {"HOROVOD_CYCLE_TIME": str(cycle_ms), **_STALL_DEFAULTS}.items():
        os.environ.setdefault(name, value)
    if not fuse:
        os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
    try:
        with named_threads("mpi"):
            MPI, hvd = import_libraries()
    except LibraryError as error:
        raise UserError(f"{started}, but {error}; {_INSTALL}") from error
    with named_threads("horovod"):
        hvd.init()
    world = MPI.COMM_WORLD
    problem = ""
    if fault := contradiction(launch, world):
        problem = f"{fault} ({mpi_version(MPI.Get_library_version())} is loaded)"
    elif not hvd.mpi_built():
        problem = f"{started}, but Horovod was built without MPI"
    elif hvd.size() != world.Get_size() or hvd.rank() != world.Get_rank():
        problem = f"Horovod sees rank {hvd.rank()} of {hvd.size()}, mpi4py {world.Get_rank()} of {world.Get_size()}"
    elif not hvd.mpi_threads_supported():
        problem = "this MPI does not support MPI_THREAD_MULTIPLE, which mpi4py beside Horovod needs"
    if problem:
        raise UserError(f"{problem}; {_INSTALL}")
    hosts = len(set(world.allgather(socket.gethostname())))
    return HorovodRuntime(
        MpiCommunicator(world),
        hvd.local_rank(),
        hvd.local_size(),
        f"{hvd.size()} rank(s) on {hosts} host(s), Horovod over MPI, started by {launch.launcher}; {launch.place}",
        num_hosts=hosts,
        carrier=HOROVOD,
        mpi_world=world,
    )
