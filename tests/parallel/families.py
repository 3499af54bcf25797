"""Run under mpirun on 2 ranks: losses and gradients of every family against one process on the concatenated batch.

Rank 0 has one object and three, rank 1 has none. Of the four ranks that rank 0 then emulates, two have none. Float64,
so that what remains is the order of summation (see equivalence.py, also for the losses' tolerance). Batch statistics
are those of all ranks, in backbone, FPN, RPN and heads.

FAMILY+crowds has `model.crowds ignore` and crowd regions: over half of an image of each rank, and over all of an image
of rank 1, which then has nothing in the loss. FAMILY+densenet has that backbone. FAMILY+efficient has memory-efficient
dense layers, and must have the gradient of FAMILY, named before it, to the last bit on each rank.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from megdet_hpc.data.batch import Batch
from megdet_hpc.data.sample import Target
from megdet_hpc.engine.emulate import VirtualPasses
from megdet_hpc.engine.passes import Passes, RankPasses
from megdet_hpc.models.detector import Detector
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.start import started
from tests.families import SIDE, batch, build, target
from tests.parallel.equivalence import LOSS_TOLERANCE, WEIGHT_TOLERANCE

Seen = tuple[dict[str, float], Tensor, dict[str, Tensor]]
VARIANTS: dict[str, dict[str, object]] = {
    "crowds": {"crowds": "ignore"},
    "densenet": {"backbone": "densenet121"},
    "efficient": {"memory_efficient": True},
}


def with_crowds(given: Batch) -> Batch:
    """A batch whose images 11, 13 and 14 have a crowd region."""
    regions = {11: [0.0, 32.0, SIDE, SIDE], 13: [0.0, 0.0, 32.0, SIDE], 14: [0.0, 0.0, SIDE, SIDE]}
    targets = []
    for image_id, own in zip(given.image_ids, given.targets, strict=True):
        if image_id in regions:
            region = target([regions[image_id]])
            assert own.masks is not None and region.masks is not None
            own = Target(
                torch.cat([own.boxes, region.boxes]),
                torch.cat([own.labels, region.labels]),
                torch.cat([own.crowd, torch.tensor([True])]),
                torch.cat([own.difficult, region.difficult]),
                torch.cat([own.masks, region.masks]),
            )
        targets.append(own)
    return dataclasses.replace(given, targets=targets)


def one_update(model: Detector, optimizer: SynchronizedOptimizer, passes: Passes, batches: list[Batch]) -> Seen:
    """Losses, gradient and running statistics of an update whose weights do not change."""
    optimizer.zero_grad()
    losses, _ = passes.forward_backward(batches, step=3, seed=0)
    optimizer.synchronize()
    assert all(p.grad is not None for p in model.parameters())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    passes.average_running_statistics()
    return losses, gradient, {k: v for k, v in model.state_dict().items() if "running" in k}


def differences(found: Seen, expected: Seen) -> tuple[float, float, float]:
    """Of losses and gradient, relative; of the running statistics, absolute."""
    assert list(found[0]) == list(expected[0]) and all(value > 0 for value in expected[0].values())
    losses = max(abs(value - expected[0][key]) / expected[0][key] for key, value in found[0].items())
    gradient = float((found[1] - expected[1]).abs().max() / expected[1].abs().max())
    return losses, gradient, max(float((v - expected[2][k]).abs().max()) for k, v in found[2].items())


def local(family: str, kind: Callable[[Detector], Passes], batches: list[Batch], **keys: object) -> Seen:
    """An update of one process."""
    model = build(family, **keys)
    return one_update(model, SynchronizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0)), kind(model), batches)


if __name__ == "__main__":
    with started() as runtime:
        world, alone = runtime.world, SerialCommunicator()
        assert world.size == 2
        gradients: dict[str, Tensor] = {}
        for name in sys.argv[1:]:
            family, *variants = name.split("+")
            keys = {key: value for variant in variants for key, value in VARIANTS[variant].items()}
            crowds = "crowds" in variants
            prepared = with_crowds if crowds else lambda given: given
            model = build(family, world, **keys)
            sgd = torch.optim.SGD(model.parameters(), lr=0.0)
            mine = prepared(batch(2 * world.rank, 2 * world.rank + 2))
            real = one_update(model, runtime.distribute(sgd, model, 1), RankPasses(model, world), [mine])
            gradients[name] = real[1]
            if world.rank == 0:
                expected = local(family, lambda model: RankPasses(model, alone), [prepared(batch())], **keys)
                if crowds:
                    plain = local(family, lambda model: RankPasses(model, alone), [prepared(batch())])
                    assert plain[0] != expected[0], "crowds change nothing"
                each = [prepared(batch(rank, rank + 1)) for rank in range(4)]
                virtual = local(family, lambda model: VirtualPasses(model, BnGroups(4, 1, 0)), each, **keys)
                for ranks, seen in (("2 ranks", real), ("4 emulated ranks", virtual)):
                    losses, gradient, statistics = differences(seen, expected)
                    print(
                        f"{name}, {ranks}: losses differ by {losses:.1e}, the gradient by {gradient:.1e}, "
                        f"statistics by {statistics:.1e}",
                        flush=True,
                    )
                    assert losses < LOSS_TOLERANCE and gradient < WEIGHT_TOLERANCE and statistics < WEIGHT_TOLERANCE
            if "efficient" in variants:
                assert torch.equal(gradients[name.removesuffix("+efficient")], real[1])
                print(f"rank {world.rank}, {name}: recomputation changes no bit of the gradient", flush=True)
        world.barrier(name="end")
