"""Parameters in lists, for torch's operators that take many tensors at once (torch._foreach_*)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from megdet_hpc.devices import is_gpu


def in_lists(parameters: Iterable[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The parameters that have a gradient, and their gradients, in lists that are updated together.

    On a GPU they are one list, so that an operator is a few kernels whatever the number of parameters; but for factors
    that differ by parameter (LARS, LAMB), which are a kernel each. On a CPU each is a list of its own, whose operators
    find its values in the cache. The results are the same bits there.

    Args:
        parameters: parameters on one device.
    """
    found = [(p, p.grad) for p in parameters if p.grad is not None]
    if found and is_gpu(found[0][0].device):
        yield [p for p, _ in found], [gradient for _, gradient in found]
        return
    for parameter, gradient in found:
        yield [parameter], [gradient]
