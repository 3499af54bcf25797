"""Run under mpirun: optimizers, clipping, compression and AGVM over each library against one process with all data."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

from megdet_hpc.config import SolverConfig
from megdet_hpc.engine.state import check_same_state
from megdet_hpc.models.detector import parts_by_name
from megdet_hpc.models.two_stage import part_of
from megdet_hpc.parallel.runtime import Runtime, SynchronizedOptimizer
from megdet_hpc.parallel.start import started
from megdet_hpc.solver import agvm
from megdet_hpc.solver.agvm import ModulatedOptimizer, RankHalves
from megdet_hpc.solver.optimizer import build_optimizer

STEPS = 12


class Network(nn.Module):
    """A module with a detector's parts, one linear layer each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.rpn, self.roi_heads = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        self.double()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return parts_by_name(self, part_of)

    def forward(self, x: Tensor) -> Tensor:
        return self.roi_heads(self.rpn(self.backbone(x).tanh()).tanh()).square().mean()


def batches(size: int) -> Tensor:
    """(steps, ranks, samples, features), other scales on other ranks so that local norms differ."""
    scales = torch.arange(1, size + 1).view(1, size, 1, 1)
    return torch.randn(STEPS, size, 3, 6, generator=torch.Generator().manual_seed(1)).double() * scales


def reference(config: SolverConfig, data: Tensor, clip: float | None, factors: list[dict[str, float]]) -> Network:
    """One process: the mean of the ranks' losses, clipped once; rates per part multiplied by given factors."""
    model = Network()
    optimizer = build_optimizer(model, config, decay_norm=True, parts=model.parts())
    for number, step in enumerate(data):
        optimizer.zero_grad()
        torch.stack([model(share) for share in step]).mean().backward()
        if clip:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert norm > clip, "clipping at this bound would test nothing"
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * factors[number].get(group["part"], 1.0)
        optimizer.step()
    return model


def distributed(
    runtime: Runtime, config: SolverConfig, data: Tensor, clip: float | None, transport: str
) -> tuple[Network, list[dict[str, float]]]:
    """The same on real ranks; the factors that each step used."""
    world, model = runtime.world, Network()
    optimizer: SynchronizedOptimizer = runtime.distribute(
        build_optimizer(model, config, decay_norm=True, parts=model.parts()), model, 1, compression=config.compression
    )
    if config.agvm:
        carrier = runtime.communicator(transport, torch.device("cpu"))
        optimizer = ModulatedOptimizer(optimizer, RankHalves(carrier, model.parameters()), first_step=0)
    factors = []
    for step in data:
        optimizer.set_lr(0.1)
        optimizer.zero_grad()
        model(step[world.rank]).backward()
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        optimizer.step()
        factors.append(optimizer.factors() if isinstance(optimizer, ModulatedOptimizer) else {})
    check_same_state(model, optimizer.optimizer, world)
    assert world.allgather_object(factors, name="factors") == [factors] * world.size
    return model, factors


def expected_factors(config: SolverConfig, data: Tensor) -> dict[str, float]:
    """The factors after the first measurement, at the initial weights: gradients of the two halves of the ranks."""
    gradients: list[dict[str, Tensor]] = []
    for half in data[0].chunk(2):
        model = Network()
        torch.stack([model(share) for share in half]).sum().backward()
        rows = {n: [p.grad.flatten() for p in m.parameters() if p.grad is not None] for n, m in model.named_children()}
        gradients.append({name: torch.cat(row) for name, row in rows.items()})
    variance = {n: float(1 - torch.cosine_similarity(g, gradients[1][n], dim=0)) for n, g in gradients[0].items()}
    names = {"backbone": "backbone", "rpn": "rpn", "roi_heads": "heads"}
    quotients = {part: (variance["backbone"] + 1e-6) / (variance[n] + 1e-6) for n, part in names.items()}
    return {part: 0.97 + 0.03 * math.sqrt(min(max(q, 0.5), 10)) for part, q in quotients.items()}


def check(
    runtime: Runtime,
    config: SolverConfig,
    *,
    clip: float | None = None,
    tolerance: float = 1e-10,
    transport: str = "mpi",
) -> None:
    data = batches(runtime.world.size)
    ours, factors = distributed(runtime, config, data, clip, transport)
    if config.agvm:
        wanted = expected_factors(config, data)
        assert all(math.isclose(factors[0][part], wanted[part], rel_tol=1e-9) for part in wanted), (factors[0], wanted)
        assert factors[0] == factors[agvm.INTERVAL - 1] != factors[agvm.INTERVAL], "measured at steps 0 and 10 only"
    theirs = reference(config, data, clip, factors)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"{name} of {config}")


def check_overflow(runtime: Runtime) -> None:
    """An update that is skipped leaves the factors, whatever overflowed, and the next one measures."""
    world, model = runtime.world, Network()
    sgd = build_optimizer(model, SolverConfig(agvm=True), decay_norm=True, parts=model.parts())
    halves = RankHalves(world, model.parameters())
    optimizer = ModulatedOptimizer(runtime.distribute(sgd, model, 1), halves, first_step=0)
    for step, share in enumerate(batches(world.size)[:3]):
        optimizer.zero_grad()
        (model(share[world.rank]) * (math.inf if step == 0 and world.rank == 1 else 1.0)).backward()
        optimizer.synchronize()
        if step == 2:  # in the second one the allreduce itself could have overflowed
            optimizer.step()
        measured = any(factor != 1.0 for factor in optimizer.factors().values())
        assert measured == (step == 2), optimizer.factors()


if __name__ == "__main__":
    with started("horovod" if sys.argv[1] == "horovod" else "auto", gradients=sys.argv[1]) as runtime:
        assert (sys.argv[1] == "horovod") == ("horovod" in sys.modules)
        check(runtime, SolverConfig(), clip=0.05)
        check(runtime, SolverConfig(optimizer="lars", trust_coefficient=0.1, decay_biases=False))
        check(runtime, SolverConfig(optimizer="lamb"))
        check(runtime, SolverConfig(agvm=True))
        check(runtime, SolverConfig(agvm=True), clip=0.05)
        # the halves of the world are process sets of Horovod there
        check(runtime, SolverConfig(agvm=True), transport="horovod" if sys.argv[1] == "horovod" else "torch")
        check_overflow(runtime)
        # fp16 has 11 bits: 5e-4 of a gradient
        check(runtime, SolverConfig(compression="fp16"), tolerance=5e-3)
        print(f"rank {runtime.world.rank} of {runtime.world.size} passed\n", end="", flush=True)
