"""The choice of a transport for each kind of message, from plain values. No library is loaded, and no GPU is touched.

The gradients go over `solver.gradients`. The messages of normalization layers go over `norm.transport`.
"""

from __future__ import annotations

from typing import Literal

from megdet_hpc.devices import is_gpu
from megdet_hpc.errors import UserError

CARRIERS = ("mpi", "horovod", "torch")
# What averages gradients (solver.gradients).
GRADIENT_CARRIERS = ("horovod", "torch", "mpi")
TRANSPORTS = ("auto", *CARRIERS)
Overlap = bool | Literal["auto"]
# Size of torch's message of gradients where it overlaps the backward pass, that of DistributedDataParallel [bytes].
BUCKET_BYTES = 25 * 2**20

# Horovod's thread waits for the other ranks' threads in every cycle, and polls MPI while it waits. At its default of 1
# ms that takes the core and MPI's lock from the rank's own messages. With 2 ranks on 2 cores and 1 ms of work between
# messages, a 1 KB allreduce of mpi4py took 16 ms on average at a cycle of 1 ms, 0.17 ms at 5, 0.05 ms at 10. Gradients
# wait at most one cycle longer [ms].
_QUIET_CYCLE_MS, _CYCLE_MS = 10, 1


def resolve_transport(transport: str, device_type: str) -> str:
    """The name of a transport. auto becomes the one that suits the device (`cpu`, `cuda` or `xpu`).

    Raises:
        UserError: the name is unknown.
    """
    if transport not in TRANSPORTS:
        raise UserError(f"norm.transport is {transport!r}; accepted: {', '.join(TRANSPORTS)}")
    if transport != "auto":
        return transport
    return "torch" if is_gpu(device_type) else "mpi"


def horovod_cycle_ms(transport: str, device_type: str) -> int:
    """The time between two meetings of Horovod's threads [ms].

    It is long where MPI carries the many messages of a step, and on CPUs, where Horovod's thread needs the core of the
    rank. It is short where the messages of layers go over NCCL or through Horovod: there gradients should not wait.
    """
    resolved = resolve_transport(transport, device_type)
    if resolved == "horovod":
        return _CYCLE_MS
    return _QUIET_CYCLE_MS if resolved == "mpi" or device_type == "cpu" else _CYCLE_MS


def hides_gradients(
    choice: Overlap, *, device_type: str, transport: str, layers_send: bool, gradients_over_nccl: bool
) -> bool:
    """Whether gradients travel while the backward pass runs (solver.overlap).

    NCCL's maintainers call it unsafe to use two communicators at once if their order may differ between GPUs. Horovod
    starts gradients from its own thread; normalization layers start their messages from autograd's. So `auto` keeps
    them apart where both would use NCCL, and overlaps them everywhere else.

    Args:
        choice: value of solver.overlap.
        device_type: cpu, cuda or xpu.
        transport: transport of the normalization layers' messages, or auto.
        layers_send: whether such messages are sent in the backward pass.
        gradients_over_nccl: whether Horovod was built with NCCL.
    """
    if choice != "auto":
        return choice
    over_nccl = resolve_transport(transport, device_type) == "torch" and is_gpu(device_type)
    return not (over_nccl and layers_send and gradients_over_nccl)


def gpu_build_fault(device_type: str, built: tuple[str, ...]) -> str | None:
    """The reason why a Horovod cannot move tensors of a device; None where it can.

    A Horovod without CUDA accepts GPU tensors too, but its own thread dies at the first one.

    Args:
        device_type: type of the tensors' device: cpu, cuda or xpu.
        built: parts that Horovod was built with, as `libraries.horovod_built` names them.
    """
    if not is_gpu(device_type) or (device_type == "cuda" and {"cuda", "rocm"} & set(built)):
        return None
    if device_type != "cuda":
        return f"Horovod has no part for this rank's device ({device_type}), where --solver.gradients torch is accepted"
    return (
        f"this Horovod was built without CUDA (it has {', '.join(built) or 'nothing'}), and this rank's tensors are "
        "on a GPU"
    )


GPU_BUILD_REMEDY = "build it again with HOROVOD_BUILD=nccl tools/setup_env.sh, or train with --device cpu"
