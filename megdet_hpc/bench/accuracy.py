"""Accuracy of several ways to compute a variance, on values far from zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megdet_hpc.bench.peers import OnePassBatchNorm2d
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.layers.cgbn_function import Exchange
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.threads import run_ranks

_MEAN = 1e4
_VIRTUAL_RANKS = 4


def _errors(layer: nn.BatchNorm2d, y: Tensor, x: Tensor) -> tuple[float, float]:
    """Largest absolute errors of variance and output. The reference is float64 on the same float32 values."""
    n = x.numel() // x.shape[1]
    exact = x.double()
    mean, var = exact.mean((0, 2, 3), keepdim=True), exact.var((0, 2, 3), unbiased=False)
    expected = (exact - mean) / (var.view(1, -1, 1, 1) + layer.eps).sqrt()
    assert layer.running_var is not None
    # with momentum 1 the running variance is that of the batch; only the one-pass layer keeps it biased
    unbiased = 1.0 if isinstance(layer, OnePassBatchNorm2d) else (n - 1) / n
    own_var = layer.running_var.double() * unbiased
    return float((own_var - var).abs().max()), float((y.detach().double() - expected).abs().max())


def accuracy_rows() -> list[dict[str, Any]]:
    """Errors on float32 values of mean 1e4 and standard deviation 1, on the CPU. Not a collective."""
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) + _MEAN
    rows: list[dict[str, Any]] = []

    def add(name: str, errors: tuple[float, float]) -> None:
        rows.append({"layer": name, "variance_error": errors[0], "output_error": errors[1]})

    local = nn.BatchNorm2d(3, momentum=1.0)
    add("nn.BatchNorm2d", _errors(local, local(x), x))
    exchanges: tuple[Exchange, ...] = ("two_stage", "packed")
    for exchange in exchanges:

        def body(comm: Communicator, exchange: Exchange = exchange) -> tuple[nn.BatchNorm2d, Tensor]:
            layer = CrossGpuBatchNorm2d(3, group=comm, momentum=1.0, exchange=exchange)
            return layer, layer(x.chunk(comm.size)[comm.rank])

        ranks = run_ranks(_VIRTUAL_RANKS, body)
        add(f"CGBN {exchange}, {_VIRTUAL_RANKS} ranks", _errors(ranks[0][0], torch.cat([y for _, y in ranks]), x))
    one_pass = OnePassBatchNorm2d(3, process_group=None)
    one_pass.momentum = 1.0
    add("one pass, E[x^2] - E[x]^2", _errors(one_pass, one_pass(x), x))
    return rows
