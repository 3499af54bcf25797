"""Run under mpirun on 2 ranks: AGVM with every registered family, and squeeze and excitation against one process.

Rank 0 has objects, rank 1 has none, so that the gradients of the two halves point apart (see families.py). Four ranks
that one process emulates have the same images in their halves, and so the same factors.
"""

from __future__ import annotations

import torch

from megdet_hpc.config import SolverConfig
from megdet_hpc.config.models import DETECTORS
from megdet_hpc.engine.emulate import VirtualPasses
from megdet_hpc.engine.passes import RankPasses
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.start import started
from megdet_hpc.solver.agvm import EmulatedHalves, ModulatedOptimizer, RankHalves
from megdet_hpc.solver.optimizer import build_optimizer
from tests.families import batch, build
from tests.parallel.equivalence import LOSS_TOLERANCE, WEIGHT_TOLERANCE
from tests.parallel.families import differences, local, one_update

# of a factor, into which the root of a quotient of two variances enters with 0.03; sums have other orders
FACTOR_TOLERANCE = 1e-4


def emulated_factors(family: str) -> dict[str, float]:
    """The factors of 4 emulated ranks that share their statistics, after one update."""
    model = build(family)
    sgd = build_optimizer(model, SolverConfig(agvm=True), decay_norm=True, parts=model.parts())
    halves = EmulatedHalves(4, model.parameters())
    optimizer = ModulatedOptimizer(SynchronizedOptimizer(sgd), halves, first_step=0)
    passes = VirtualPasses(model, BnGroups(4, 1, 0), halves=halves)
    optimizer.set_lr(1e-3)
    one_update(model, optimizer, passes, [batch(rank, rank + 1) for rank in range(4)])
    optimizer.step()
    return optimizer.factors()


if __name__ == "__main__":
    with started() as runtime:
        world, alone = runtime.world, SerialCommunicator()
        assert world.size == 2
        mine = batch(2 * world.rank, 2 * world.rank + 2)
        for family in DETECTORS:
            model = build(family, world)
            sgd = build_optimizer(model, SolverConfig(agvm=True), decay_norm=True, parts=model.parts())
            inner, halves = runtime.distribute(sgd, model, 1), RankHalves(world, model.parameters())
            optimizer = ModulatedOptimizer(inner, halves, first_step=0)
            passes = RankPasses(model, world)
            optimizer.set_lr(1e-3)
            losses, gradient, _ = one_update(model, optimizer, passes, [mine])
            optimizer.step()
            factors = optimizer.factors()
            assert factors.keys() == model.parts().keys() and factors.pop("backbone") == 1
            assert all(0.97 < factor < 1.1 for factor in factors.values()) and set(factors.values()) != {1.0}
            assert bool(gradient.isfinite().all()) and all(bool(p.isfinite().all()) for p in model.parameters())
            everywhere = world.broadcast_object((factors, losses), name="factors")
            assert everywhere == (factors, losses), (everywhere, factors, losses)
            if world.rank == 0:
                emulated = emulated_factors(family)
                apart = max(abs(factor - emulated[part]) for part, factor in factors.items())
                assert emulated["backbone"] == 1 and apart < FACTOR_TOLERANCE, (family, factors, emulated)
                text = ", ".join(f"{part} {factor:.3f}" for part, factor in factors.items())
                print(f"{family}: AGVM's factors {text}", flush=True)

        squeezed = build("faster_rcnn", world, squeeze_excitation=True)
        sgd = torch.optim.SGD(squeezed.parameters(), lr=0.0)
        real = one_update(squeezed, runtime.distribute(sgd, squeezed, 1), RankPasses(squeezed, world), [mine])
        if world.rank == 0:
            expected = local("faster_rcnn", lambda model: RankPasses(model, alone), [batch()], squeeze_excitation=True)
            apart = differences(real, expected)
            print(
                "squeeze and excitation: losses, gradient, statistics differ by {:.1e}, {:.1e}, {:.1e}".format(*apart)
            )
            assert apart[0] < LOSS_TOLERANCE and max(apart[1:]) < WEIGHT_TOLERANCE
        world.barrier(name="end")
