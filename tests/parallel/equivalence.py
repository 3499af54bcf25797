"""Run under mpirun: 20 steps of the tiny detector on all ranks against one process on the concatenated batch.

Float64, so that what remains in the weights is the order of summation: 1e-16 relative per operation, 1e-14 measured
after 20 steps. The losses' values agree to float32 only, since torchvision's objectness labels are float32 and with
them that loss's value (its gradient is not). A wrong count, mean or sample shows at 1e-3.
"""

from __future__ import annotations

import dataclasses
import sys

from torch import nn

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config
from megdet_hpc.data.batch import Batch, collate
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.engine.step import train_step
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import Runtime, SynchronizedOptimizer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.start import started
from megdet_hpc.solver.optimizer import build_optimizer

STEPS = 20
GLOBAL_BATCH = 4
LOSS_TOLERANCE = 2e-7
WEIGHT_TOLERANCE = 1e-11
SMALL = [
    "--data.short_sides",
    "[64,80]",
    "--data.max_side",
    "96",
    "--data.val_short_side",
    "64",
    "--data.padding",
    "fixed",
]
# narrow, so that 20 steps on 4 ranks take seconds
SMALL += ["--model.neck_channels", "16", "--model.box_head_channels", "32", "--norm.where", "[backbone,fpn,heads]"]
SMALL += ["--model.box_head", "4conv1fc", "--model.roi_samples_per_image", "16", "--model.rpn_post_nms_top_n", "50"]


def share(dataset: DetectionDataset, step: int, rank: int, size: int, side: int) -> Batch:
    """This rank's images of a step; the images of all ranks are the same whatever the number of ranks."""
    images = [(step * GLOBAL_BATCH + i) % len(dataset) for i in range(GLOBAL_BATCH)]
    each = GLOBAL_BATCH // size
    batch = collate([dataset[(step, i)] for i in images[rank * each : (rank + 1) * each]], side)
    targets = [dataclasses.replace(target, boxes=target.boxes.double()) for target in batch.targets]
    return dataclasses.replace(batch, targets=targets)


def train(
    config: Config, dataset: DetectionDataset, world: Communicator, runtime: Runtime | None
) -> tuple[list[float], nn.Module]:
    """Losses of every step and the trained model; without a runtime on this process alone."""
    model = build_detector(config, num_categories=len(dataset.categories), group=world).double()
    sgd = build_optimizer(model, config.solver, decay_norm=True)
    optimizer = runtime.distribute(sgd, model, 1) if runtime else SynchronizedOptimizer(sgd)
    losses = []
    for step in range(STEPS):
        batch = share(dataset, step, world.rank, world.size, config.data.max_side)
        arguments = {"step": step, "seed": 0, "lr": 0.005, "clip_norm": None, "world": world}
        result = train_step(model, optimizer, [batch], **arguments)  # type: ignore[arg-type]
        losses.append(sum(result.losses.values()))
    return losses, model


if __name__ == "__main__":
    config, _ = parse_config(config_parser("tests", ""), ["--config", "tiny", *SMALL, *sys.argv[2:]])
    data = DetectionDataset(PackedCoco(sys.argv[1]), config.data, training=True, seed=0)
    with started(gradients=config.solver.gradients) as runtime:
        world = runtime.world
        together, model = train(config, data, world, runtime)
        if world.rank == 0:
            alone, reference = train(config, data, SerialCommunicator(), None)
            worst = max(abs(a - b) / abs(b) for a, b in zip(together, alone, strict=True))
            theirs = reference.state_dict()
            state = max(float((v - theirs[k]).abs().max()) for k, v in model.state_dict().items())
            print(f"{world.size} ranks, {STEPS} steps: losses differ by {worst:.1e} relative, weights by {state:.1e}")
            print(f"first {together[0]:.12f} {alone[0]:.12f} last {together[-1]:.12f} {alone[-1]:.12f}")
            assert len(set(together)) == STEPS
            assert worst < LOSS_TOLERANCE and state < WEIGHT_TOLERANCE
        world.barrier(name="end")
