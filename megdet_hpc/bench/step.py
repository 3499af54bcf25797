"""`bench step`: a whole training step beside that of torchvision's own Faster R-CNN of the same layers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from megdet_hpc.bench.report import heading
from megdet_hpc.bench.timing import Meter, Times, interleaved
from megdet_hpc.config import Config, DataConfig, FasterRcnnConfig, NormConfig, SolverConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.sample import Target
from megdet_hpc.devices import is_gpu, wait_for
from megdet_hpc.engine.passes import RankPasses
from megdet_hpc.engine.step import train_step
from megdet_hpc.errors import UserError
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import Runtime, SynchronizedOptimizer
from megdet_hpc.plan.model_size import measure_model
from megdet_hpc.solver.optimizer import build_optimizer
from megdet_hpc.solver.precision import Precision, ready_for_half_precision

REFERENCE = "torchvision"
OURS = "megdet_hpc"
CATEGORIES = 80
"""Categories of the detectors that are measured, background not counted."""
_RATE = 1e-4  # so small that the losses of both stay finite over all passes
_GIB = 2**30
# Calls of CUDA's runtime in which the host waits for the device.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_SHOWN_OPERATORS = 15


def backbone_option(parser: argparse.ArgumentParser) -> None:
    """The option of a Faster R-CNN's backbone."""
    parser.add_argument("--backbone", default="resnet50", help="ResNet of torchvision under the FPN")


def picture_options(parser: argparse.ArgumentParser, side: int = 320) -> None:
    """The options of generated images, whose side is one number unless it is given [pixels]."""
    parser.add_argument("--images", type=int, default=2, help="images per rank")
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[side], metavar="PIXELS", help="side, or height and width"
    )
    parser.add_argument("--boxes", type=int, default=7, help="objects in an image")


def picture_size(arguments: argparse.Namespace) -> tuple[int, int]:
    """(height, width) of the images [pixels].

    Raises:
        UserError: one of `picture_options`, or the number of steps, is out of its range.
    """
    numbers = [*arguments.image_size, arguments.images, arguments.repeats, arguments.boxes]
    if len(arguments.image_size) > 2 or min(numbers) < 1 or arguments.warmup < 0:
        raise UserError("--image-size takes one or two numbers; it, --images, --boxes and --repeats must be 1 or more")
    return arguments.image_size[0], arguments.image_size[-1]


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of this benchmark."""
    backbone_option(parser)
    picture_options(parser)
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16"), default="float32", help="solver.precision of ours"
    )
    parser.add_argument(
        "--reference-precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of torchvision's, which has no loss scale",
    )
    parser.add_argument(
        "--memory-format", choices=("contiguous", "channels_last"), default="contiguous", help="layout of ours"
    )
    parser.add_argument("--norm", choices=("cgbn", "bn"), default="cgbn", help="norm.kind of ours")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or xpu")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measured ones")
    parser.add_argument("--profile", action="store_true", help="add the operators of one step of ours by their time")


@dataclass(frozen=True)
class StepPictures:
    """The generated images and boxes that both take.

    Attributes:
        images: (N, 3, H, W) uint8.
        targets: boxes of each.
    """

    images: Tensor
    targets: list[Target]

    @classmethod
    def draw(cls, number: int, boxes: int, height: int, width: int, seed: int) -> StepPictures:
        """Noise with boxes of a sixteenth to a half of each side."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (number, 3, height, width), dtype=torch.uint8, generator=generator)
        sides = torch.tensor([width, height], dtype=torch.float32)
        targets = []
        for _ in range(number):
            size = (torch.rand(boxes, 2, generator=generator) * 7 / 16 + 1 / 16) * sides
            corner = torch.rand(boxes, 2, generator=generator) * (sides - size)
            labels = torch.randint(1, CATEGORIES + 1, (boxes,), generator=generator)
            targets.append(Target.ordinary(torch.cat([corner, corner + size], 1), labels))
        return cls(images, targets)

    def batch(self, device: torch.device) -> Batch:
        """Ours, on a device."""
        number, (height, width) = len(self.images), self.images.shape[2:]
        ids = list(range(1, number + 1))
        return Batch(self.images, [(height, width)] * number, [(1.0, 1.0)] * number, ids, self.targets).to(device)

    def torchvision(self, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Images of 0 to 1 and targets, as torchvision's detectors take them."""
        images = [(image.float() / 255).to(device) for image in self.images]
        return images, [{"boxes": t.boxes.to(device), "labels": t.labels.to(device)} for t in self.targets]


def _configuration(arguments: argparse.Namespace, height: int, width: int) -> Config:
    """A training of ours with torchvision's numbers of samples and proposals, every layer trained."""
    short = min(height, width)
    return Config(
        data=DataConfig(
            images_per_rank=arguments.images, short_sides=(short,), val_short_side=short, max_side=max(height, width)
        ),
        model=FasterRcnnConfig(backbone=arguments.backbone, backbone_weights=None, frozen_stages=0),
        norm=NormConfig(kind=arguments.norm, where=("backbone",)),
        solver=SolverConfig(precision=arguments.precision),
    )


class TrainedStep:
    """A training step of ours on one batch, again and again. Making it is a collective of the world.

    Args:
        config: configuration of the run.
        batch: images and targets of this rank.
        world: all ranks.
        group: ranks that share batch statistics.
        runtime: this process in the world.
        device: device of this rank.
        overlap: whether gradients are sent during the backward pass.
        layout: memory layout of the weights, contiguous or channels_last.
    """

    def __init__(
        self,
        config: Config,
        batch: Batch,
        *,
        world: Communicator,
        group: Communicator,
        runtime: Runtime,
        device: torch.device,
        overlap: bool = True,
        layout: str = "contiguous",
    ) -> None:
        torch.manual_seed(0)
        model = build_detector(config, num_categories=CATEGORIES, group=group, pretrained=False).to(device).train()
        if layout == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        ready_for_half_precision(model)
        self.model, self._batch, self._world = model, batch, world
        inner = build_optimizer(model, config.solver, decay_norm=True, parts=model.parts())
        self.optimizer: SynchronizedOptimizer = runtime.distribute(inner, model, 1, overlap=overlap)
        self._passes = RankPasses(model, world, Precision(config.solver.precision, device))

    def tell_waits(self, note: Callable[[float, float], None]) -> None:
        """Call `note` with begin and end of each wait for the gradients after a backward pass [s of perf_counter]."""
        synchronize = self.optimizer.synchronize

        def timed() -> None:
            begin = time.perf_counter()
            synchronize()
            note(begin, time.perf_counter())

        self.optimizer.synchronize = timed  # type: ignore[method-assign]

    def __call__(self, step: int = 0) -> float:
        """Make a step. Returns the sum of its losses. Collective of the world; blocks."""
        result = train_step(
            self.model,
            self.optimizer,
            [self._batch],
            step=step,
            seed=0,
            lr=_RATE,
            clip_norm=None,
            world=self._world,
            passes=self._passes,
        )
        return sum(result.losses.values())


def torchvision_detector(backbone: str, height: int, width: int) -> FasterRCNN:
    """torchvision's Faster R-CNN of the layers of ours, every one trained, for images of one size."""
    body = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name=backbone, weights=None, trainable_layers=5, norm_layer=torch.nn.BatchNorm2d
    )
    return FasterRCNN(body, CATEGORIES + 1, min_size=min(height, width), max_size=max(height, width))


def _reference(
    arguments: argparse.Namespace, picture: StepPictures, model: FasterRCNN, device: torch.device
) -> Callable[[], float]:
    """A step of torchvision's reference training of one process, without logging."""
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE, momentum=0.9, weight_decay=1e-4)
    images, targets = picture.torchvision(device)
    half = arguments.reference_precision == "bfloat16"

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            losses = model(images, targets)
        loss = sum(losses.values())
        value = float(loss.detach())  # the reference checks that it is finite
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return value

    return step


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _rows(times: dict[str, Times], meters: dict[str, Meter], parameters: dict[str, int]) -> list[dict[str, Any]]:
    """A row for each, from (P, R, 2) seconds. Each of our steps is compared with the reference's beside it."""
    found = []
    for name, own in times.items():
        wall, processor = own[..., 0].max(0), own[..., 1].sum(0)  # (R,)
        pairs = times[REFERENCE][..., 0].max(0) / wall
        work = times[REFERENCE][..., 1].sum(0) / processor
        low, high = np.quantile(pairs, [0.25, 0.75])
        found.append(
            {
                "step": name,
                "parameters": parameters[name],
                "loss": meters[name].result,
                "seconds, median": float(np.median(wall)),
                "least": float(wall.min()),
                "most": float(wall.max()),
                "speed to torchvision": float(np.median(pairs)),
                "quartiles": f"{low:.2f} to {high:.2f}",
                "by processor time": float(np.median(work)),
                "peak GiB": meters[name].peak / _GIB if meters[name].peak else None,
            }
        )
    return found


def _profile(step: Callable[[], float], device: torch.device) -> dict[str, Any]:
    """The operators of one step, by their own time, with the number of kernels and of waits of the host."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if is_gpu(device):
        activities.append(getattr(torch.profiler.ProfilerActivity, device.type.upper()))
    with torch.profiler.profile(activities=activities) as profile:
        step()
        wait_for(device)
    averages = profile.key_averages()

    def own(event: Any) -> float:
        return float(event.self_device_time_total if is_gpu(device) else event.self_cpu_time_total)

    ordered = sorted(averages, key=own, reverse=True)[:_SHOWN_OPERATORS]
    counts: dict[str, Any] = {}
    if device.type == "cuda":
        events = profile.events() or []
        launches = sum(e.count for e in averages if "LaunchKernel" in e.key)
        waits = {name: sum(e.count for e in averages if e.key.startswith(name)) for name in _WAITS}
        counts = {"kernels launched": launches, **{name: number for name, number in waits.items() if number}}
        counts["events"] = len(events)
    return {
        "counted in one step": counts,
        "operators of one step, own milliseconds": [
            {"operator": event.key[:60], "calls": event.count, "ms": own(event) / 1e3} for event in ordered
        ],
    }


def run(arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any] | None:
    """Measure. Collective of the world; blocks.

    Returns:
        The report on rank 0, None elsewhere.

    Raises:
        UserError: an option is out of its range.
    """
    height, width = picture_size(arguments)
    device, world = runtime.device(arguments.device), runtime.world
    picture = StepPictures.draw(arguments.images, arguments.boxes, height, width, seed=world.rank)
    config = _configuration(arguments, height, width)
    group = runtime.communicator(config.norm.transport, device)
    batch, layout = picture.batch(device), arguments.memory_format
    ours = TrainedStep(config, batch, world=world, group=group, runtime=runtime, device=device, layout=layout)
    torch.manual_seed(0)
    theirs = torchvision_detector(arguments.backbone, height, width).to(device).train()
    meters = {REFERENCE: Meter(_reference(arguments, picture, theirs, device), device), OURS: Meter(ours, device)}
    times = interleaved(meters, arguments.repeats, arguments.warmup, world)
    profile = _profile(ours, device) if arguments.profile else {}
    if world.rank:
        return None
    planned = measure_model(config, CATEGORIES) if is_gpu(device) else None
    return {
        **heading(arguments, runtime, device),
        "planned": f"{(planned.state_bytes + planned.activation_bytes) / _GIB:.2f} GiB or more" if planned else "",
        "steps": _rows(times, meters, {REFERENCE: _num_parameters(theirs), OURS: _num_parameters(ours.model)}),
        **profile,
    }
