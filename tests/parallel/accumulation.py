"""Run under mpirun: two ranks with one pass an update against one process with two passes, in float64.

Constant normalization layers, since batch statistics are each pass's own. The passes sample equally many boxes here;
where they do not, a pass's share of the loss is not its share of the boxes (docs/recipe.md).
"""

from __future__ import annotations

import sys

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.engine.step import train_step
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.start import started
from megdet_hpc.solver.optimizer import build_optimizer
from tests.parallel.equivalence import GLOBAL_BATCH, LOSS_TOLERANCE, SMALL, WEIGHT_TOLERANCE, share

STEPS, SHARES = 3, 2


def build(config: Config, dataset: DetectionDataset, world: Communicator) -> Detector:
    return build_detector(config, num_categories=len(dataset.categories), group=world).double()


def train(
    model: Detector, optimizer: SynchronizedOptimizer, dataset: DetectionDataset, side: int, world: Communicator
) -> list[float]:
    """The losses of every update of GLOBAL_BATCH images, spread over the ranks, or over passes where there is one."""
    losses: list[float] = []
    for step in range(STEPS):
        parts = [world.rank] if world.size > 1 else range(SHARES)
        batches = [share(dataset, step, part, SHARES, side) for part in parts]
        arguments = {"step": step, "seed": 0, "lr": 0.005, "clip_norm": 1.0, "world": world}
        losses.append(sum(train_step(model, optimizer, batches, **arguments).losses.values()))  # type: ignore[arg-type]
    return losses


if __name__ == "__main__":
    keys = ["--config", "tiny", *SMALL, "--norm.kind", "frozen"]
    config, _ = parse_config(config_parser("tests", ""), keys)
    data = DetectionDataset(PackedCoco(sys.argv[1]), config.data, training=True, seed=0)
    side = config.data.max_side
    with started() as runtime:
        world = runtime.world
        assert world.size == SHARES
        ours = build(config, data, world)
        optimizer = runtime.distribute(build_optimizer(ours, config.solver, decay_norm=True), ours, 1)
        together = train(ours, optimizer, data, side, world)
        if world.rank == 0:
            theirs = build(config, data, SerialCommunicator())
            start = {k: v.clone() for k, v in theirs.state_dict().items()}
            sgd = SynchronizedOptimizer(build_optimizer(theirs, config.solver, decay_norm=True))
            alone = train(theirs, sgd, data, side, SerialCommunicator())
            losses = max(abs(a - b) / abs(b) for a, b in zip(together, alone, strict=True))
            state = theirs.state_dict()
            weights = max(float((v - state[k]).abs().max()) for k, v in ours.state_dict().items())
            moved = max(float((v - state[k]).abs().max()) for k, v in start.items())
            print(f"{GLOBAL_BATCH} images: losses differ by {losses:.1e} relative, weights by {weights:.1e}")
            assert moved > 1e-3
            assert losses < LOSS_TOLERANCE and weights < WEIGHT_TOLERANCE
        world.barrier(name="end")
