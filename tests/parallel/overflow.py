"""Run under mpirun: a float16 gradient of one rank that is not finite skips the update of all ranks.

`overflow.py LIBRARY PACK` trains the toy detector for three updates over a library of solver.gradients. In the second
one the last rank alone gets a gradient that is not finite.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.data.batch import collate
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.engine.passes import RankPasses
from megdet_hpc.engine.state import check_same_state
from megdet_hpc.engine.step import train_step
from megdet_hpc.layers.norm import norm_layer
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.start import started
from megdet_hpc.solver.optimizer import build_optimizer
from megdet_hpc.solver.precision import Precision
from tests.parallel.equivalence import SMALL
from tests.toy import Toy

OVERFLOWS = 1
# below the usual 65,536, at which a message in float16 overflows too
SCALE = 2.0**10


def numbers(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of weights and momenta, without the running statistics, which a forward pass changes."""
    momenta = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
    return [value.detach().clone() for value in (*model.parameters(), *momenta)]


def check(runtime: Runtime, dataset: DetectionDataset, words: list[str]) -> None:
    """Three updates; the second is skipped on every rank and leaves its bits, and the scale is halved everywhere."""
    config, _ = parse_config(config_parser("tests", ""), ["--config", "tiny", *SMALL, *words])
    world = runtime.world
    torch.manual_seed(0)
    norm = norm_layer(config.norm, "backbone", world)
    assert norm is not None
    model = Toy(6, len(dataset.categories) + 1, norm(6))
    sgd = build_optimizer(model, config.solver, decay_norm=True)
    optimizer = runtime.distribute(
        sgd, model, config.solver.accumulate, compression=config.solver.compression, overlap=runtime.may_overlap
    )
    precision = Precision("float16")
    precision.scaler.load_state_dict({**precision.scaler.state_dict(), "scale": SCALE})
    passes = RankPasses(model, world, precision)
    weight = model.head.weight
    accumulate = config.solver.accumulate
    for step in range(3):
        images = [(step * accumulate + i) * world.size + world.rank for i in range(accumulate)]
        batches = [collate([dataset[(step, image % len(dataset))]], config.data.max_side) for image in images]
        before, scale = numbers(model, optimizer.optimizer), precision.scaler.get_scale()
        wrong = step == OVERFLOWS and world.rank == world.size - 1
        hook = weight.register_hook(lambda gradient: gradient * math.inf) if wrong else None
        result = train_step(
            model, optimizer, batches, step=step, seed=0, lr=0.005, clip_norm=None, world=world, passes=passes
        )
        if hook:
            hook.remove()
        after = numbers(model, optimizer.optimizer)
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        assert same == result.skipped == (step == OVERFLOWS), (step, same, result.skipped, result.gradient_norm)
        assert math.isfinite(result.gradient_norm) == (step != OVERFLOWS)
        scales = world.allgather_object(precision.scaler.get_scale(), name="scales")
        assert scales == [scale / 2 if step == OVERFLOWS else scale] * world.size, scales
        check_same_state(model, optimizer.optimizer, world)


if __name__ == "__main__":
    library, pack = sys.argv[1:]
    with started(gradients=library) as runtime:
        assert (library == "horovod") == ("horovod" in sys.modules)
        config, _ = parse_config(config_parser("tests", ""), ["--config", "tiny", *SMALL])
        data = DetectionDataset(PackedCoco(pack), config.data, training=True, seed=0)
        check(runtime, data, [])
        # a sum that overflows in float16 on the way counts alike
        check(runtime, data, ["--solver.compression", "fp16"])
        check(runtime, data, ["--solver.accumulate", "2"])
        print(f"rank {runtime.world.rank} of {runtime.world.size} passed\n", end="", flush=True)
