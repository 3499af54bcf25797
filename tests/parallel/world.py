"""Run under mpirun, once for all transports: the bodies of tests/bodies.py on the world and on split groups of it.

With the arguments "fail TRANSPORT" the last rank fails instead, while the others wait in a message.
"""

from __future__ import annotations

import sys
import time

import pytest
import torch
from torch import nn

from megdet_hpc.engine.state import check_same_state
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import convert_batchnorm
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.libraries import installed
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.start import started
from tests import bodies

CPU = torch.device("cpu")
STEPS = 5
# Longer than any transport polls without blocking, and far below every time-out.
LATE_SECONDS = 0.3


def network() -> nn.Module:
    torch.manual_seed(2)
    first = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    second = [nn.Conv2d(4, 5, 3, stride=2), nn.BatchNorm2d(5), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(45, 2)).double()


def check_training(runtime: Runtime, group: Communicator) -> None:
    """Steps with Horovod's hooks on all ranks, one of them without images and late, against the concatenated batch."""
    world = runtime.world
    alone, mine = network(), convert_batchnorm(network(), group=group)
    reference = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    optimizer = runtime.distribute(torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9), mine, 1)
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        shares = [0 if (step + rank) % world.size == 0 else 2 + rank % 2 for rank in range(world.size)]
        whole = torch.randn(sum(shares), 3, 9, 9, generator=generator, dtype=torch.float64)
        reference.zero_grad()
        (alone(whole).square().sum() / len(whole)).backward()
        reference.step()
        own = whole.split(shares)[world.rank]
        if len(own) == 0 and step < 2:
            time.sleep(LATE_SECONDS)
        optimizer.zero_grad()
        # Horovod divides the gradients' sum by the number of ranks
        (mine(own).square().sum() / len(whole) * world.size).backward()
        optimizer.synchronize()
        optimizer.step()
    for (name, ours), theirs in zip(mine.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}")
    moved = (alone[0].weight - network()[0].weight).abs().max()
    assert moved > 1e-3, f"the weights moved by {moved} only, which compares nothing"
    check_same_state(mine, optimizer.optimizer, world)


def check_nested_split(comm: Communicator) -> None:
    """Halves split into pairs at the same time on all ranks, and the same groups a second time."""
    half = comm.split(int(comm.rank >= comm.size // 2), name="halves")
    pair = half.split(half.rank % 2, name="pairs")
    again = comm.split(int(comm.rank >= comm.size // 2), name="halves")
    assert pair.transport == again.transport == comm.transport
    bodies.check_collectives(pair)
    bodies.check_collectives(again)


def check_transport(runtime: Runtime, transport: str) -> None:
    """Everything that a transport must do, in the same order on every rank."""
    comm = runtime.communicator(transport, CPU)
    assert (comm.transport, comm.rank, comm.size) == (transport, runtime.world.rank, runtime.world.size)
    assert runtime.communicator(transport, CPU) is comm
    bodies.check_all(comm)
    bodies.check_cgbn(comm, torch.float64, 1e-12, exchange="packed")
    half = comm.split(int(comm.rank >= comm.size // 2), name="halves")
    bodies.check_cgbn(half, torch.float32, 1e-5)
    bodies.check_cgbn(half, torch.float64, 1e-12)
    bodies.check_cgbn(half, torch.float64, 1e-12, exchange="packed")
    check_nested_split(comm)
    check_training(runtime, comm)


def check_gpu(runtime: Runtime) -> None:
    """The collectives on GPU tensors; ranks may share a GPU over MPI, which NCCL refuses."""
    with torch.device("cuda", runtime.local_rank % torch.cuda.device_count()) as device:
        bodies.check_collectives(runtime.communicator("mpi", device))
        bodies.check_split(runtime.communicator("mpi", device))
        if torch.cuda.device_count() >= runtime.local_size:
            torch.cuda.set_device(device)
            assert runtime.communicator("auto", device).transport == "torch"
            bodies.check_collectives(runtime.communicator("auto", device))
            bodies.check_split(runtime.communicator("auto", device))


def check_all(runtime: Runtime) -> None:
    assert runtime.communicator("auto", CPU) is runtime.world
    with pytest.raises(UserError, match=r"'gloo'; accepted: auto, mpi, horovod, torch"):
        runtime.communicator("gloo", CPU)
    for transport in runtime.transports:
        begin = time.monotonic()
        check_transport(runtime, transport)
        if runtime.world.rank == 0:
            print(f"{transport}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    if torch.cuda.is_available():
        check_gpu(runtime)
    # all three together, as a run and a comparison of them in one process use them
    comms = [runtime.communicator(transport, CPU) for transport in runtime.transports]
    for step in range(50):
        for comm in comms:
            value = torch.full((16,), float(comm.rank + step), dtype=torch.float64)
            comm.allreduce_sum_(value, name="mixed")
            assert value[0] == sum(rank + step for rank in range(comm.size))


def fail(runtime: Runtime, transport: str) -> None:
    comm = runtime.communicator(transport, CPU)
    comm.allreduce_sum_(torch.zeros(1), name="complete")
    if comm.rank == comm.size - 1:
        raise RuntimeError("this rank breaks")
    comm.allreduce_sum_(torch.zeros(1), name="never complete")
    comm.allreduce_sum_(torch.zeros(1), name="never complete")


if __name__ == "__main__":
    with started("horovod" if installed("horovod") else "auto") as runtime:
        if sys.argv[1:2] == ["fail"]:
            fail(runtime, sys.argv[2])
        else:
            check_all(runtime)
        runtime.world.barrier(name="done")
        print(f"rank {runtime.world.rank} of {runtime.world.size} passed\n", end="", flush=True)
