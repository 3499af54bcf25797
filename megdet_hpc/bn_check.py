"""Check cross-GPU batch norm on this machine: `mpirun -np 4 python -m megdet_hpc.bn_check`.

Every rank normalizes its share of a generated batch. Outputs, gradients and statistics are compared with those of one
nn.BatchNorm2d on the whole batch. Without a launcher the ranks are threads of one process. A site runs this before its
first job, with the transport and the devices of that job.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from megdet_hpc.devices import DEVICES, is_gpu
from megdet_hpc.engine.agreement import require_agreement
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.layers.cgbn_function import Exchange
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SHARED, Runtime
from megdet_hpc.parallel.start import started
from megdet_hpc.parallel.threads import run_ranks
from megdet_hpc.parallel.transports import TRANSPORTS
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

CHANNELS = 6
WIDTH = 7
# Tolerances relative to the largest magnitude of the quantity. float32 keeps 1.2e-7 of a value, float64 2.2e-16. A
# channel adds about 1e3 values in an order that depends on the ranks.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# At mean 1e4 neighbouring float32 numbers differ by 1e-3, and the kernels of a GPU keep the mean in float32.
LARGE_MEAN, LARGE_MEAN_TOLERANCE = 1e4, 1e-3


@dataclass(frozen=True)
class Case:
    """A batch and the shares of the ranks.

    Attributes:
        images: number of images; rank r has images[r % len(images)].
        heights: height of the images, shared out in the same way [pixels].
        mean: mean of the values; their standard deviation is 1.
    """

    name: str
    images: Sequence[int]
    heights: Sequence[int]
    dtype: torch.dtype
    tolerance: float
    mean: float = 0.0


def cases() -> list[Case]:
    """All cases that are checked."""
    found = []
    for dtype, tolerance in TOLERANCE.items():
        found += [
            Case("even", (2,), (5,), dtype, tolerance),
            Case("uneven", (2, 1, 4), (5, 8), dtype, tolerance),
            Case("empty ranks", (3, 0, 1, 0), (5,), dtype, tolerance),
        ]
    return [*found, Case("mean 1e4", (2, 1, 4), (5, 8), torch.float32, LARGE_MEAN_TOLERANCE, LARGE_MEAN)]


def _error(value: Tensor | None, reference: Tensor | None) -> float:
    """The largest difference relative to the largest magnitude of the reference; NaN where a value is not a number."""
    assert value is not None and reference is not None
    if value.numel() == 0:
        return 0.0
    difference = (value.detach().cpu().double() - reference.detach()).abs().max()
    return float(difference / reference.detach().abs().max().clamp(min=1e-30))


def layer_errors(
    group: Communicator, case: Case, exchange: Exchange, device: torch.device, seed: int = 5
) -> dict[str, float]:
    """Errors of the cross-GPU layer on this rank. Collective of the group; blocks; names bn_check.*.

    The reference is nn.BatchNorm2d in float64 on the CPU, with the same rounded values of all ranks at once.

    Args:
        group: ranks that share the statistics.
        device: device of the layer.
        seed: seed of the values, the same on every rank of the group.

    Returns:
        Relative errors of output, dx, dweight, dbias, running_mean, running_var, and of the output in evaluation.
    """
    shapes = [
        (case.images[r % len(case.images)], CHANNELS, case.heights[r % len(case.heights)], WIDTH)
        for r in range(group.size)
    ]
    counts = [images * height * width for images, _, height, width in shapes]
    generator = torch.Generator().manual_seed(seed)
    # (1, C, values of all ranks, 1): images of several heights do not fit into one batch
    whole = (torch.randn(1, CHANNELS, sum(counts), 1, generator=generator) + case.mean).to(case.dtype)
    slope = torch.randn(whole.shape, generator=generator).to(case.dtype)

    def share(values: Tensor) -> Tensor:
        """This rank's part, (N, C, H, W)."""
        n, channels, height, width = shapes[group.rank]
        part = values.split(counts, dim=2)[group.rank]
        return part.view(channels, n, height, width).transpose(0, 1).contiguous()

    oracle = nn.BatchNorm2d(CHANNELS, momentum=None).double()
    with torch.no_grad():
        oracle.weight.copy_(torch.rand(CHANNELS, generator=generator) + 0.5)
        oracle.bias.copy_(torch.rand(CHANNELS, generator=generator))
    layer = CrossGpuBatchNorm2d(CHANNELS, group=group, momentum=None, exchange=exchange, name="bn_check")
    layer.load_state_dict(oracle.state_dict())
    layer.to(device=device, dtype=case.dtype)

    x = whole.clone().double().requires_grad_()
    expected = oracle(x)
    expected.backward(slope.double())
    own = share(whole).to(device).requires_grad_()
    output = layer(own)
    output.backward(share(slope).to(device))
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    gradients = torch.cat([layer.weight.grad, layer.bias.grad])
    group.allreduce_sum_(gradients, name="bn_check.gradients")
    layer.eval(), oracle.eval()
    with torch.no_grad():
        evaluated, expected_evaluated = layer(own), oracle(x)
    return {
        "output": _error(output, share(expected)),
        "dx": _error(own.grad, share(x.grad)),
        "dweight": _error(gradients[:CHANNELS], oracle.weight.grad),
        "dbias": _error(gradients[CHANNELS:], oracle.bias.grad),
        "running_mean": _error(layer.running_mean, oracle.running_mean),
        "running_var": _error(layer.running_var, oracle.running_var),
        "evaluation": _error(evaluated, share(expected_evaluated)),
    }


def worst_errors(
    world: Communicator, group_size: int, exchange: Exchange, device: torch.device
) -> list[dict[str, float]]:
    """The largest errors over all ranks, a dict for each case. Collective of the world; blocks; the same on every rank.

    Args:
        group_size: number of ranks that share statistics; divides world.size.
    """
    number = world.rank // group_size
    group = world if group_size == world.size else world.split(number, name="bn_check.groups")
    worst = []
    for case in cases():
        errors = layer_errors(group, case, exchange, device, seed=5 + number)
        everyone = world.allgather_object(errors, name="bn_check.errors")
        # torch's maximum keeps NaN, Python's does not
        worst.append({key: float(torch.tensor([e[key] for e in everyone]).max()) for key in errors})
    return worst


def print_table(errors: list[dict[str, float]], factor: float) -> bool:
    """Print a line for each case and the verdict.

    Args:
        errors: errors of each case, as `check` returns them.
        factor: factor of the tolerances.

    Returns:
        Whether all are within tolerance.
    """
    keys = list(errors[0])
    print(f"{'case':12s} {'type':8s}", *(f"{key:>12s}" for key in keys), f"{'tolerance':>10s}")
    failed = 0
    for case, row in zip(cases(), errors, strict=True):
        wrong = [key for key in keys if not row[key] <= case.tolerance * factor]
        failed += len(wrong)
        dtype = str(case.dtype).removeprefix("torch.")
        verdict = f"FAIL {' '.join(wrong)}" if wrong else "ok"
        numbers = (f"{row[key]:12.1e}" for key in keys)
        print(f"{case.name:12s} {dtype:8s}", *numbers, f"{case.tolerance * factor:10.0e}  {verdict}")
    total = len(errors) * len(keys)
    print(
        f"bn_check: FAILED, {failed} of {total} checks out of tolerance"
        if failed
        else f"bn_check: all {total} checks within tolerance",
        flush=True,
    )
    return not failed


def _run(options: argparse.Namespace, runtime: Runtime) -> bool:
    device = runtime.device(options.device)
    require_agreement(runtime.world, {**{f"--{key}": v for key, v in vars(options).items()}, "device": device.type})
    alone = runtime.world.size == 1
    # autograd has one thread for each GPU; in it virtual ranks would wait for each other for ever
    size = runtime.world.size if not alone else 1 if is_gpu(device) else options.virtual_ranks
    group_size = options.group_size or size
    accepted = [n for n in range(1, size + 1) if size % n == 0]
    if group_size not in accepted:
        raise UserError(
            f"--group-size {group_size}: {size} ranks do not part into groups of {group_size}; accepted: "
            f"{', '.join(map(str, accepted))}, or 0 for one group of all"
        )
    if alone:
        errors = run_ranks(size, lambda comm: worst_errors(comm, group_size, options.exchange, device))[0]
        transport = f"{size} virtual ranks in threads"
    else:
        world = runtime.communicator(options.transport, device)
        errors = worst_errors(world, group_size, options.exchange, device)
        transport = f"{size} ranks, transport {world.transport}"
    if runtime.world.rank == 0:
        print(f"{transport}; {size // group_size} group(s) of {group_size}, {options.exchange}, {device}")
    passed = [print_table(errors, options.tolerance_factor)] if runtime.world.rank == 0 else None
    result: list[bool] = runtime.world.broadcast_object(passed, name="bn_check.verdict")
    return result[0]


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: status 1 on every rank, since an error is out of tolerance.
    """
    parser = ProgramParser(
        prog=called_as("megdet_hpc.bn_check"),
        description=as_called_here(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--transport", choices=TRANSPORTS, default="auto", help="library that carries the messages")
    parser.add_argument("--device", choices=(*DEVICES, SHARED), default="auto")
    parser.add_argument("--group-size", type=int, default=0, help="ranks that share statistics; 0: all (default)")
    parser.add_argument("--exchange", choices=get_args(Exchange), default="two_stage")
    parser.add_argument(
        "--virtual-ranks", type=int, default=4, help="number of threads without a launcher (default: 4)"
    )
    parser.add_argument(
        "--tolerance-factor", type=float, default=1.0, help="factor of the tolerances; 0 shows what a failure does"
    )
    options: Any = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    with started(options.transport, options.device) as runtime:
        if not _run(options, runtime):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
