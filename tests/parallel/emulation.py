"""Run under mpirun: steps of the tiny detector on all ranks against their emulation in rank 0's process alone.

Float64, so that what remains is the order of summation (see equivalence.py, also for the losses' tolerance). Batches
are padded to their own largest image, BN groups are as norm.size says, a step has two passes.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
from torch import Tensor

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config
from megdet_hpc.data.batch import Batch, collate
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.engine.emulate import VirtualPasses
from megdet_hpc.engine.passes import Passes, RankPasses
from megdet_hpc.engine.step import train_step
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.start import started
from megdet_hpc.solver.optimizer import build_optimizer
from tests.parallel.equivalence import LOSS_TOLERANCE, SMALL, WEIGHT_TOLERANCE

STEPS = 3
PASSES = 2
Seen = tuple[list[float], list[Tensor], dict[str, Tensor]]


def batch_of(dataset: DetectionDataset, step: int, part: int, rank: int, size: int) -> Batch:
    """Two images; their sizes differ over ranks, so the padding does."""
    first = ((step * PASSES + part) * size + rank) * 2
    batch = collate([dataset[(step, i % len(dataset))] for i in (first, first + 1)])
    targets = [dataclasses.replace(target, boxes=target.boxes.double()) for target in batch.targets]
    return dataclasses.replace(batch, targets=targets)


def train(
    model: Detector, optimizer: SynchronizedOptimizer, passes: Passes, batches: list[list[Batch]], world: Communicator
) -> Seen:
    """Losses of each step, gradients of each step, state at the end."""
    losses, gradients = [], []
    for step, batch in enumerate(batches):
        result = train_step(
            model, optimizer, batch, step=step, seed=0, lr=0.005, clip_norm=None, world=world, passes=passes
        )
        losses.append(sum(result.losses.values()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    passes.average_running_statistics()
    return losses, gradients, model.state_dict()


def build(config: Config, dataset: DetectionDataset, group: Communicator, world: Communicator) -> Detector:
    torch.manual_seed(0)
    return build_detector(config, num_categories=len(dataset.categories), group=group).double()


if __name__ == "__main__":
    config, _ = parse_config(config_parser("tests", ""), ["--config", "tiny", *SMALL[:6], *SMALL[8:], *sys.argv[2:]])
    data = DetectionDataset(PackedCoco(sys.argv[1]), config.data, training=True, seed=0)
    with started() as runtime:
        world = runtime.world
        groups = BnGroups(world.size, 2, config.norm.size)
        model = build(config, data, world.split(groups.group_of(world.rank), name="groups"), world)
        optimizer = runtime.distribute(build_optimizer(model, config.solver, decay_norm=True), model, PASSES)
        mine = [[batch_of(data, s, part, world.rank, world.size) for part in range(PASSES)] for s in range(STEPS)]
        real = train(model, optimizer, RankPasses(model, world), mine, world)
        if world.rank == 0:
            alone = SerialCommunicator()
            model = build(config, data, alone, alone)
            everyone = [
                [batch_of(data, s, part, rank, world.size) for part in range(PASSES) for rank in range(world.size)]
                for s in range(STEPS)
            ]
            assert len({tuple(batch.images.shape) for batch in everyone[0]}) > 1
            sgd = SynchronizedOptimizer(build_optimizer(model, config.solver, decay_norm=True))
            virtual = train(model, sgd, VirtualPasses(model, groups), everyone, alone)
            loss = max(abs(a - b) / abs(b) for a, b in zip(real[0], virtual[0], strict=True))
            gradient = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(real[1], virtual[1], strict=True))
            state = max(float((v - virtual[2][k]).abs().max()) for k, v in real[2].items())
            print(f"{groups}: losses differ by {loss:.1e}, gradients by {gradient:.1e}, state by {state:.1e}")
            assert loss < LOSS_TOLERANCE and gradient < WEIGHT_TOLERANCE and state < WEIGHT_TOLERANCE
        world.barrier(name="end")
