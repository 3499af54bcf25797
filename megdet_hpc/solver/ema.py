"""The moving average of a run's weights, and its rule for large batches.

At each update the average theta_ema becomes rho theta_ema + (1 - rho) theta. A mini-batch that is k times larger makes
k times fewer updates. So that the average reaches back over the same images, its decay is rho^k (Busbridge et al., How
to Scale Your EMA, NeurIPS 2023). rho is given for a reference batch, as the learning rate is.

The first weights are random, and a fixed rho would keep them for 1 / (1 - rho) iterations. With the ramp the decay of
iteration n is at most (1 + n) / (10 + n). The average then reaches back over about a ninth of the run so far, however
short the run is. An iteration stands for the images of a reference batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from megdet_hpc.config import SolverConfig
from megdet_hpc.errors import UserError

_RAMP = 10  # TensorFlow's ExponentialMovingAverage has this number in its ramp
STATISTICS = ("running_mean", "running_var")


def decay_at(config: SolverConfig, iterations: float, batches: float) -> float:
    """The decay of one update.

    Args:
        config: decay at the reference batch, and whether it ramps up.
        iterations: reference batches from the beginning of the average to the end of this update.
        batches: reference batches of one update, k in rho^k.
    """
    decay = config.ema_decay
    if config.ema_ramp:
        decay = min(decay, (1 + iterations) / (_RAMP + iterations))
    return float(decay**batches)


class WeightAverage:
    """The moving average of trained weights and running statistics. It begins with those of the model.

    No method is a collective. The weights are equal on all ranks, so the average is. Statistics differ between BN
    groups, and so do their averages, until `statistics` are averaged over the world as those of the model are.

    Args:
        model: detector that is trained.
        config: keys of the average.

    Attributes:
        iterations: reference batches since the average began.
    """

    def __init__(self, model: nn.Module, config: SolverConfig) -> None:
        self._model, self._config = model, config
        self.iterations = 0.0
        self._own: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._own |= {n: b for n, b in model.named_buffers() if n.endswith(STATISTICS)}
        self._averages = {name: tensor.detach().clone() for name, tensor in self._own.items()}

    @property
    def statistics(self) -> list[Tensor]:
        """Averages of the running statistics, to be changed in place."""
        return [average for name, average in self._averages.items() if name.endswith(STATISTICS)]

    def update(self, global_batch: int, statistics: Mapping[str, Tensor]) -> None:
        """Take in the weights after an update that was made.

        Args:
            global_batch: images of the update.
            statistics: running statistics by name; means over the ranks of this process.
        """
        batches = global_batch / self._config.ema_reference_batch
        self.iterations += batches
        newest = [statistics.get(name, tensor).detach() for name, tensor in self._own.items()]
        decay = decay_at(self._config, self.iterations, batches)
        get_ema_multi_avg_fn(decay)(list(self._averages.values()), newest, 0)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """The averages in the model in place of its own values, as long as the context lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, own in self._own.items():
            own.data, self._averages[name] = self._averages[name], own.data

    def state(self) -> dict[str, Any]:
        """The checkpoint's part: a whole state dict, which the model could load, and where the average is."""
        return {"model": {**self._model.state_dict(), **self._averages}, "iterations": self.iterations}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            UserError: it is another model's.
        """
        stored = state["model"]
        for name, average in self._averages.items():
            if name not in stored or stored[name].shape != average.shape:
                raise UserError(f"the checkpoint's averaged weights have no {name} of shape {tuple(average.shape)}")
            average.copy_(stored[name])
        self.iterations = float(state["iterations"])
