"""Run under mpirun: gradients through Horovod, mpi4py or torch against one process on the concatenated batch."""

from __future__ import annotations

import sys

import torch
from torch import nn

from megdet_hpc.engine.state import check_same_state
from megdet_hpc.parallel.start import started


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


if __name__ == "__main__":
    with started(gradients=sys.argv[1]) as runtime:
        assert (sys.argv[1] == "horovod") == ("horovod" in sys.modules)
        world = runtime.world
        batches = torch.randn(4, 2, world.size, 3, 6, generator=torch.Generator().manual_seed(1)).double()
        alone, mine = network(), network()
        with torch.no_grad():
            mine[0].weight.add_(world.rank)
        runtime.broadcast_model(mine)
        sgd = torch.optim.SGD(mine.parameters(), lr=0.0, momentum=0.9)
        check_same_state(mine, sgd, world)
        reference = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
        # passes of each update: as many as were said, fewer, more (solver.grow_to)
        batches = [batches[0], batches[1][:1], torch.cat([batches[1][1:], batches[2]]), batches[3]]
        optimizer = runtime.distribute(sgd, mine, 2, overlap=sys.argv[2:] != ["after"])
        optimizer.set_lr(0.1)
        for step in batches:  # (passes, ranks, samples, features)
            reference.zero_grad()
            alone(step).square().mean().backward()
            reference.step()
            optimizer.zero_grad()
            optimizer.set_passes(len(step))
            for one_pass in step:
                (mine(one_pass[world.rank]).square().mean() / len(step)).backward()
            optimizer.synchronize()
            optimizer.step()
        for ours, theirs in zip(mine.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        check_same_state(mine, optimizer.optimizer, world)
        print(f"rank {world.rank} of {world.size} passed\n", end="", flush=True)
