"""Bodies of distributed tests: each takes a communicator and asserts on every rank.

The same bodies run on the serial communicator, on virtual ranks in threads, on the MPI world and on split
groups of it, so that no transport has tests of its own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d, convert_batchnorm
from megdet_hpc.layers.cgbn_function import Exchange
from megdet_hpc.parallel.communicator import Communicator

CHANNELS = 6
# Uneven shares of a batch: images of rank r are SHARES[r % 4]; rank 1's is empty wherever there are two ranks.
SHARES = (3, 0, 1, 4)


def check_collectives(comm: Communicator) -> None:
    """Every method of the interface against what the ranks put in."""
    ranks = list(range(comm.size))
    for dtype in (torch.float32, torch.float64, torch.int64):
        tensor = torch.full((5,), comm.rank + 1, dtype=dtype)
        comm.allreduce_sum_(tensor, name="test.sum")
        assert tensor.tolist() == [sum(r + 1 for r in ranks)] * 5
        gathered = comm.allgather_tensor(torch.full((2,), comm.rank, dtype=dtype), name="test.stack")
        assert gathered.tolist() == [[r, r] for r in ranks]
    assert comm.allgather_object({"rank": comm.rank}, name="test.all") == [{"rank": r} for r in ranks]
    on_root = comm.gather_object(comm.rank, name="test.gather")
    assert on_root == (ranks if comm.rank == 0 else None)
    assert comm.broadcast_object(f"from {comm.rank}", name="test.broadcast") == "from 0"
    comm.barrier(name="test.barrier")


def check_split(comm: Communicator) -> None:
    """Two interleaved groups, each a communicator in its own right."""
    group = comm.split(comm.rank % 2, name="test.split")
    members = [r for r in range(comm.size) if r % 2 == comm.rank % 2]
    assert (group.rank, group.size) == (members.index(comm.rank), len(members))
    tensor = torch.tensor([float(comm.rank)])
    group.allreduce_sum_(tensor, name="test.group")
    assert tensor.item() == sum(members)
    check_collectives(group)


def _relative(value: Tensor, reference: Tensor) -> float:
    scale = float(reference.detach().abs().max()) if reference.numel() else 1.0
    return float((value - reference).detach().abs().max()) / max(scale, 1e-30) if value.numel() else 0.0


def check_cgbn(
    comm: Communicator, dtype: torch.dtype, tolerance: float, offset: float = 0.0, exchange: Exchange = "two_stage"
) -> None:
    """CGBN over uneven and empty batches against nn.BatchNorm2d on the concatenated batch."""
    generator = torch.Generator().manual_seed(5)
    shares = [SHARES[r % 4] for r in range(comm.size)]
    whole = torch.randn(sum(shares), CHANNELS, 5, 7, generator=generator, dtype=dtype) * 2 + offset
    slope = torch.randn(whole.shape, generator=generator, dtype=dtype)
    reference = nn.BatchNorm2d(CHANNELS).to(dtype)
    with torch.no_grad():
        reference.weight.copy_(torch.rand(CHANNELS, generator=generator))
        reference.bias.copy_(torch.rand(CHANNELS, generator=generator))
    layer = convert_batchnorm(copy.deepcopy(reference), group=comm, exchange=exchange)
    assert isinstance(layer, CrossGpuBatchNorm2d)

    x = whole.clone().requires_grad_()
    expected = reference(x)
    expected.backward(slope)
    begin = sum(shares[: comm.rank])
    mine = slice(begin, begin + shares[comm.rank])
    own = whole[mine].clone().requires_grad_()
    output = layer(own)
    output.backward(slope[mine])

    assert layer.weight.grad is not None and layer.bias.grad is not None
    assert x.grad is not None and own.grad is not None
    assert reference.weight.grad is not None and reference.bias.grad is not None
    gradients = torch.cat([layer.weight.grad, layer.bias.grad])
    comm.allreduce_sum_(gradients, name="test.gradients")
    errors = {
        "output": _relative(output, expected[mine]),
        "dx": _relative(own.grad, x.grad[mine]),
        "dweight": _relative(gradients[:CHANNELS], reference.weight.grad),
        "dbias": _relative(gradients[CHANNELS:], reference.bias.grad),
        "running_mean": _relative(layer.running_mean, reference.running_mean),
        "running_var": _relative(layer.running_var, reference.running_var),
    }
    assert max(errors.values()) <= tolerance, (comm.size, comm.rank, errors)
    layer.eval(), reference.eval()
    assert _relative(layer(own.detach()), reference(whole[mine])) <= tolerance


def check_all(comm: Communicator) -> None:
    """Everything above, in the same order on every rank."""
    check_collectives(comm)
    check_split(comm)
    check_cgbn(comm, torch.float32, 1e-5)
    check_cgbn(comm, torch.float32, 1e-5, exchange="packed")
    # 1e-12: float64's 1.1e-16 times the 1e3 additions of a channel, with room for another order of summation
    check_cgbn(comm, torch.float64, 1e-12)
