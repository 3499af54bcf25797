"""Run under mpirun: gradients sent during the backward pass and after it leave the same bits."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from megdet_hpc.config import SolverConfig
from megdet_hpc.parallel.horovod import HorovodOptimizer
from megdet_hpc.parallel.runtime import Runtime, SynchronizedOptimizer
from megdet_hpc.parallel.start import started
from megdet_hpc.solver.agvm import ModulatedOptimizer, RankHalves
from megdet_hpc.solver.optimizer import build_optimizer
from tests.parallel.solver import STEPS, Network, batches


def sent(optimizer: SynchronizedOptimizer) -> list[bool]:
    """Of each gradient that a hook has seen, whether it has left."""
    assert isinstance(optimizer, HorovodOptimizer)
    handles = optimizer.optimizer._handles  # type: ignore[attr-defined]
    return [handle is not None for handle, _ in handles.values()]


def train(
    runtime: Runtime, config: SolverConfig, data: Tensor, accumulate: int, clip: float, overlap: bool
) -> dict[str, Tensor]:
    """Weights and momenta after STEPS updates of `accumulate` passes."""
    world, model = runtime.world, Network().float()
    inner = runtime.distribute(
        build_optimizer(model, config, decay_norm=True, parts=model.parts()),
        model,
        accumulate,
        compression=config.compression,
        overlap=overlap,
    )
    optimizer = ModulatedOptimizer(inner, RankHalves(world, model.parameters()), first_step=0) if config.agvm else inner
    for step in data:
        optimizer.set_lr(0.1)
        optimizer.zero_grad()
        for sample in range(accumulate):
            model(step[world.rank, sample : sample + 1].float()).backward()
        assert sent(inner) == [overlap] * 6
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    momenta = {
        f"{index}.{key}": torch.as_tensor(value)
        for index, state in optimizer.optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    return {**model.state_dict(), **momenta}


if __name__ == "__main__":
    with started() as runtime:
        data = batches(runtime.world.size)
        start = Network().float().state_dict()
        for agvm, compression, accumulate, clip in itertools.product(
            (False, True), ("none", "fp16"), (1, 2), (0.05, math.inf)
        ):
            config = SolverConfig(agvm=agvm, compression=compression)  # type: ignore[arg-type]
            ours, theirs = (train(runtime, config, data, accumulate, clip, overlap) for overlap in (True, False))
            assert ours.keys() == theirs.keys() and len(ours) >= 12
            for key, value in ours.items():
                assert torch.equal(value, theirs[key]), (config, accumulate, clip, key)
            assert not torch.equal(ours["backbone.weight"], start["backbone.weight"])
        print(f"rank {runtime.world.rank}: {STEPS} steps, same bits\n", end="", flush=True)
