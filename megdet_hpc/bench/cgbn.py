"""`bench cgbn`: time that cross-GPU batch norm takes in the normalization layers of a real backbone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from megdet_hpc.bench.accuracy import accuracy_rows
from megdet_hpc.bench.counting import CountingCommunicator
from megdet_hpc.bench.latency import latency_rows
from megdet_hpc.bench.norm_shapes import NormInput, norm_inputs
from megdet_hpc.bench.peers import AloneSyncBatchNorm, OnePassBatchNorm2d
from megdet_hpc.bench.report import heading
from megdet_hpc.bench.timing import Clock, Times, interleaved, layer_times
from megdet_hpc.devices import is_gpu
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.layers.cgbn_function import Exchange
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.transports import CARRIERS

LOCAL = "local nn.BatchNorm2d"
STEP = "backbone step"
ONE_PASS = "one pass, gloo"
EXCHANGES: tuple[Exchange, ...] = ("two_stage", "packed")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of this benchmark."""
    parser.add_argument("--backbone", default="resnet50", help="torchvision classifier whose layers are measured")
    parser.add_argument("--images", type=int, default=2, help="images per rank")
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[320], metavar="PIXELS", help="side, or height and width"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="type of the activations")
    parser.add_argument(
        "--memory-format", choices=_FORMATS, default="contiguous", help="memory layout of the activations"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or xpu")
    parser.add_argument(
        "--transports",
        nargs="*",
        choices=CARRIERS,
        default=["mpi", "torch"],
        help="transports to measure; with horovod Horovod's cycle is short, as in training, which slows mpi down",
    )
    parser.add_argument("--repeats", type=int, default=20, help="measured passes of each variant")
    parser.add_argument("--warmup", type=int, default=3, help="passes before the measured ones")
    parser.add_argument("--per-layer", action="store_true", help="add a table of every layer")
    parser.add_argument(
        "--step", action="store_true", help="also measure the whole backbone, to show the layers' share"
    )


@dataclass
class Variant:
    """One way to normalize, as a stack of layers.

    Attributes:
        make: constructor of a layer, which takes its number of channels.
        counter: counter of the messages; None where messages do not pass through our interface.
        waits: time that this rank's host spent in messages, for each pass, those of the warm-up among them
            [milliseconds].
    """

    name: str
    make: Callable[[int], nn.Module]
    counter: CountingCommunicator | None = None
    waits: list[float] = field(default_factory=list)


def measured_waits(variants: list[Variant], warmup: int) -> dict[str, list[float]]:
    """The time in messages of each measured pass, by variant [milliseconds].

    Args:
        variants: variants after their passes.
        warmup: passes before the measured ones.
    """
    return {variant.name: variant.waits[warmup:] for variant in variants}


def _cgbn(group: Communicator, exchange: Exchange) -> Variant:
    counter = CountingCommunicator(group)

    def make(channels: int) -> nn.Module:
        return CrossGpuBatchNorm2d(channels, group=counter, exchange=exchange)

    return Variant(f"CGBN {group.transport} {exchange}", make, counter)


def transports(wanted: list[str], runtime: Runtime, device: torch.device) -> tuple[list[Communicator], list[str]]:
    """The world on each transport of this job, and the reasons why others are missing. Collective of the world."""
    if runtime.world.size == 1:
        return [runtime.world], []
    usable, missing = [], []
    for name in wanted:
        try:
            usable.append(runtime.communicator(name, device))
        except UserError as error:
            missing.append(str(error))
    return usable, missing


def variants(groups: list[Communicator], world: Communicator, device: torch.device) -> list[Variant]:
    """All variants that are compared. Collective of the world."""
    found = [Variant(LOCAL, nn.BatchNorm2d)]
    found += [_cgbn(group, exchange) for group in groups for exchange in EXCHANGES]
    if is_gpu(device):
        if world.size == 1:
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        if dist.is_initialized():
            found.append(Variant("nn.SyncBatchNorm", AloneSyncBatchNorm if world.size == 1 else nn.SyncBatchNorm))
    elif any(group.transport == "torch" for group in groups):
        process_group = dist.new_group(backend="gloo")
        found.append(Variant(ONE_PASS, lambda channels: OnePassBatchNorm2d(channels, process_group=process_group)))
    return found


def _step_body(backbone: str, image: Tensor, like: Tensor) -> Callable[[], Times]:
    """Time of forward and backward pass of the whole backbone with nn.BatchNorm2d, (1,) milliseconds."""
    model = torchvision.models.get_model(backbone, weights=None).to(like.device)
    if like.is_contiguous(memory_format=torch.channels_last):
        model = model.to(memory_format=torch.channels_last)
    half = like.dtype != torch.float32

    def body() -> Times:
        model.zero_grad()
        clock = Clock(like.device)
        clock.mark()
        with torch.autocast(like.device.type, like.dtype if half else torch.bfloat16, enabled=half):
            loss = model(image).float().square().mean()
        loss.backward()
        clock.mark()
        return np.array(clock.milliseconds())

    return body


def _row(variant: Variant, times: Times, local: Times, waits: Times, step: float | None) -> dict[str, Any]:
    """One line of the report from (P, R, 2, L) milliseconds and (P, R) of waits. A repeat's time is its slowest rank's.

    to_local compares medians. min_to_local compares the fastest repeats, which other load disturbs least.
    """
    passes = times.sum((2, 3)).max(0)  # (R,)
    median, base = float(np.median(passes)), float(np.median(local.sum((2, 3)).max(0)))
    # messages of layers without our communicator are not counted; a group of one sends nothing
    counter, none_sent = variant.counter, 0 if variant.counter or variant.name == LOCAL else None
    sends = counter is not None and counter.size > 1
    return {
        "variant": variant.name,
        "ms_median": median,
        "ms_min": float(passes.min()),
        "ms_max": float(passes.max()),
        "forward_ms": float(np.median(times[:, :, 0].sum(-1).max(0))),
        "backward_ms": float(np.median(times[:, :, 1].sum(-1).max(0))),
        "to_local": median / base,
        "min_to_local": float(passes.min() / local.sum((2, 3)).max(0).min()),
        "in_messages_ms": float(np.median(waits.max(0))) if sends else None,
        "messages": len(counter.names) if counter and sends else none_sent,
        "bytes": counter.num_bytes if counter and sends else none_sent,
        "share_of_step": median / (step - base + median) if step else None,
    }


def _per_layer(shapes: list[NormInput], times: dict[str, Times]) -> list[dict[str, Any]]:
    """Median of the slowest rank's time, forward and backward together, in a row for each layer [milliseconds]."""
    medians = {name: np.median(value.sum(2).max(0), axis=0) for name, value in times.items()}  # (L,) each
    return [
        {"layer": shape.path, "shape": "x".join(map(str, shape.shape))}
        | {name: round(float(value[index]), 3) for name, value in medians.items()}
        for index, shape in enumerate(shapes)
    ]


def run(arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any] | None:
    """Measure. Collective of the world; blocks.

    Returns:
        The report on rank 0, None elsewhere.

    Raises:
        UserError: no layer or device fits an option.
    """
    if len(arguments.image_size) > 2 or min([*arguments.image_size, arguments.images, arguments.repeats]) < 1:
        raise UserError("--image-size takes one or two numbers; it, --images and --repeats must be 1 or more")
    if arguments.warmup < 0:
        raise UserError(f"--warmup {arguments.warmup}; accepted: 0 or more")
    height, width = arguments.image_size[0], arguments.image_size[-1]
    device, world = runtime.device(arguments.device), runtime.world
    shapes = norm_inputs(arguments.backbone, arguments.images, height, width)
    groups, missing = transports(arguments.transports, runtime, device)
    compared = variants(groups, world, device)
    generator = torch.Generator(device).manual_seed(world.rank)

    def activations() -> list[Tensor]:
        dtype, layout = _DTYPES[arguments.dtype], _FORMATS[arguments.memory_format]
        drawn = (torch.randn(s.shape, generator=generator, device=device) for s in shapes)
        return [x.to(dtype=dtype, memory_format=layout) for x in drawn]

    inputs, slopes = [x.requires_grad_() for x in activations()], activations()
    bodies: dict[str, Callable[[], Times]] = {}
    for variant in compared:
        bodies[variant.name] = _layers_body(variant, shapes, inputs, slopes)
    if arguments.step:
        image = torch.randn(arguments.images, 3, height, width, generator=generator, device=device)
        bodies[STEP] = _step_body(arguments.backbone, image, inputs[0])
    times = interleaved(bodies, arguments.repeats, arguments.warmup, world)
    of_ranks = world.allgather_object(measured_waits(compared, arguments.warmup), name="bench.waits")
    latency = latency_rows(groups, sorted({s.shape[1] for s in shapes}), device, world)
    if world.size == 1 and dist.is_initialized():
        dist.destroy_process_group()
    if world.rank:
        return None
    step = float(np.median(times.pop(STEP).max(0))) if arguments.step else None
    return {
        **heading(arguments, runtime, device),
        "layers": f"{len(shapes)} of {arguments.backbone}, {sum(x.numel() for x in inputs):,} values per rank",
        "not measured": "; ".join(missing),
        "step_ms": step,
        "variants": [
            _row(v, times[v.name], times[LOCAL], np.array([waits[v.name] for waits in of_ranks]), step)
            for v in compared
        ],
        "per layer, ms": _per_layer(shapes, times) if arguments.per_layer else None,
        "one message, microseconds": latency,
        "float32 values of mean 1e4, standard deviation 1": accuracy_rows(),
    }


def _layers_body(
    variant: Variant, shapes: list[NormInput], inputs: list[Tensor], slopes: list[Tensor]
) -> Callable[[], Times]:
    layers = [variant.make(shape.shape[1]).to(inputs[0].device) for shape in shapes]
    for layer, shape in zip(layers, shapes, strict=True):
        if isinstance(layer, CrossGpuBatchNorm2d):
            layer.name = f"cgbn.{shape.path}"

    def body() -> Times:
        if variant.counter is None:
            return layer_times(layers, inputs, slopes)
        variant.counter.reset()
        times = layer_times(layers, inputs, slopes)
        variant.waits.append(variant.counter.seconds * 1e3)
        return times

    return body
