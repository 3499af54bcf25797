"""Feature maps of a trained detector over a set, which the ranks share out."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import nn

from megdet_hpc.config import Config
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.loader import make_loader
from megdet_hpc.devices import is_gpu
from megdet_hpc.eigenspectrum.moments import ChannelSums, add_ranks
from megdet_hpc.errors import UserError
from megdet_hpc.log import progress_bar
from megdet_hpc.models.detector import Detector
from megdet_hpc.parallel.communicator import Communicator


def convolutions(model: nn.Module, pattern: str) -> dict[str, nn.Conv2d]:
    """The convolutions whose paths fit a pattern, in the order of the model.

    Raises:
        UserError: none fits.
    """
    found = {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv2d)}
    fitting = {name: part for name, part in found.items() if fnmatch.fnmatchcase(name, pattern)}
    if not fitting:
        raise UserError(f"--layers {pattern}: fits none of {len(found)} convolutions, {', '.join(list(found)[:4])} ...")
    return fitting


@torch.no_grad()
def measure_features(
    model: Detector,
    config: Config,
    dataset: DetectionDataset,
    world: Communicator,
    device: torch.device,
    *,
    pattern: str,
    side: str,
    limit: int | None,
) -> dict[str, ChannelSums]:
    """The sums of each convolution's feature maps over the set, on every rank. Collective of the world; blocks.

    Images are seen one at a time, padded as in evaluation. Positions of the padding are counted too.

    Args:
        model: detector on the device.
        config: configuration of its training, for the loader.
        dataset: set opened with training=False.
        world: all ranks.
        device: device of the model.
        pattern: which convolutions, by path.
        side: input or output: what a convolution takes, or what it gives.
        limit: only the first so many images; None: all.
    """
    sums: dict[str, ChannelSums] = {}
    hooks = []
    for name, layer in convolutions(model, pattern).items():
        own = sums[name] = ChannelSums(layer.in_channels if side == "input" else layer.out_channels, device)

        def add(_module: Any, inputs: Any, output: Any, own: ChannelSums = own) -> None:
            own.add(inputs[0] if side == "input" else output)

        hooks.append(layer.register_forward_hook(add))
    count = min(len(dataset), limit or len(dataset))
    indices = [[(0, index)] for index in range(world.rank, count, world.size)]
    loader = make_loader(dataset, indices, num_workers=config.data.num_workers, pin_memory=is_gpu(device))
    model.eval()
    try:
        for batch in progress_bar(loader, desc="features", unit="image", disable=world.rank != 0, leave=False):
            model.detect(batch.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    add_ranks(sums, world)
    return sums
