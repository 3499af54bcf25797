"""Bodies of distributed tests: each takes a communicator and asserts on every rank.

The same bodies run on the serial communicator, on virtual ranks in threads, on the MPI world and on split
groups of it, so that no transport has tests of its own.
"""

from __future__ import annotations

import torch

from megdet_hpc import bn_check
from megdet_hpc.layers.cgbn_function import Exchange
from megdet_hpc.parallel.communicator import Communicator

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


def check_cgbn(
    comm: Communicator, dtype: torch.dtype, tolerance: float, offset: float = 0.0, exchange: Exchange = "two_stage"
) -> None:
    """CGBN over uneven and empty batches against nn.BatchNorm2d on the concatenated batch."""
    case = bn_check.Case("uneven and empty", SHARES, (5, 8, 3), dtype, tolerance, offset)
    errors = bn_check.layer_errors(comm, case, exchange, torch.device("cpu"))
    assert len(errors) == 7
    assert max(errors.values()) <= tolerance, (comm.size, comm.rank, errors)


def check_all(comm: Communicator) -> None:
    """Everything above, in the same order on every rank."""
    check_collectives(comm)
    check_split(comm)
    check_cgbn(comm, torch.float32, 1e-5)
    check_cgbn(comm, torch.float32, 1e-5, exchange="packed")
    # 1e-12: float64's 1.1e-16 times the 1e3 additions of a channel, with room for another order of summation
    check_cgbn(comm, torch.float64, 1e-12)
