"""Keys of the optimizer and of its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megdet_hpc.config.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, FRACTION, ranged, require

# He, Girshick, Dollar, Rethinking ImageNet Pre-training (ICCV 2019), section 3: n x 90,000 iterations of 16 images, the
# rate / 10 in the last 60,000 and again in the last 20,000.
NX_BATCH = 16
NX_ITERATIONS = 90_000
NX_DROPS_BEFORE_END = (60_000, 20_000)


@dataclass(frozen=True)
class SolverConfig:
    """The optimizer, under the linear scaling rule with warmup (paper, sections 3.1 and 3.2)."""

    base_lr: float = ranged(0.02, ABOVE_0)
    """Learning rate at the reference batch [per update]."""
    reference_batch: int = ranged(16, AT_LEAST_1)
    """Global batch for which base_lr holds [images]."""
    scaling_exponent: float = 1.0
    """Rate = base_lr * (global batch / reference_batch) ** this; 1 is the linear scaling rule, 0.5 the root rule."""
    optimizer: Literal["sgd", "lars", "lamb"] = "sgd"
    """sgd with momentum; lars and lamb scale each tensor's step to its weights, biases and norm layers excepted."""
    momentum: float = ranged(0.9, BELOW_1)
    """Momentum of sgd and lars, beta1 of lamb [0 to 1, less than 1]."""
    beta2: float = ranged(0.999, BELOW_1)
    """Of lamb: weight of the past in the mean squared gradient [0 to 1, less than 1]."""
    trust_coefficient: float = ranged(0.001, ABOVE_0)
    """Of lars: a weight tensor's step relative to its norm at rate 1."""
    momentum_correction: bool = False
    """Of lars: a change of the rate acts on the momentum at once, as it always does for sgd in torch's form."""
    weight_decay: float = ranged(1e-4, AT_LEAST_0)
    """L2 decay of the weights and, by norm.parameters and decay_biases, of the rest [per update]."""
    decay_biases: bool = True
    """Whether the decay also pulls biases to 0 (norm.parameters says it for the normalization layers' own)."""
    agvm: bool = False
    """Scale the rates of fpn, rpn and heads so that their gradients vary like the backbone's; for sgd on even ranks."""
    policy: Literal["steps", "normal", "long", "nx", "cosine"] = "steps"
    """steps: epochs and drop_* as given; normal, long: this package's presets of 11 and 18 epochs with own drops; nx:
    policy_n times 90,000 iterations of 16 images; cosine: half a cosine from the warmup's end to 0 after epochs."""
    policy_n: float = ranged(1.0, ABOVE_0)
    """The n of nx; its drops by 10 come 60,000 and 20,000 iterations of 16 images before its end, whatever n is."""
    epochs: float = ranged(11.0, ABOVE_0)
    """Length of steps and cosine; the other policies have their own [epochs]."""
    iterations: float | None = ranged(None, ABOVE_0.or_null())
    """Length of steps and cosine in place of epochs [iterations of reference_batch images]."""
    drop_epochs: tuple[float, ...] = (8.0, 10.0)
    """Of steps: where the rate is multiplied by the factor of the same position in drop_factors [epochs]."""
    drop_iterations: tuple[float, ...] | None = None
    """Of steps: in place of drop_epochs [iterations of reference_batch images]."""
    drop_factors: tuple[float, ...] = (0.1, 0.1)
    """Of steps: factors of the drops, each relative to the rate before it."""
    warmup_form: Literal["linear", "doubling", "constant"] = "linear"
    """linear: grows every step (the paper's); doubling: doubles in equal stages; constant: start factor, then 1."""
    warmup_epochs: float = ranged(1.0, AT_LEAST_0)
    """Length of the warmup, in all forms and policies [epochs]; 0 turns it off."""
    warmup_iterations: float | None = ranged(None, AT_LEAST_0.or_null())
    """Length of the warmup in place of warmup_epochs [iterations of reference_batch images]."""
    warmup_start_factor: float = ranged(0.1, FRACTION)
    """Rate of the first warmup step relative to the scaled rate [0 to 1]."""
    accumulate: int = ranged(1, AT_LEAST_1)
    """Forward-backward passes per update [passes]."""
    clip_norm: float | None = ranged(None, ABOVE_0.or_null())
    """Upper bound of the gradient's global norm after the allreduce; none: no clipping."""
    compression: Literal["none", "fp16"] = "none"
    """fp16: gradients travel in half precision, which halves the allreduce's bytes."""
    overlap: bool | Literal["auto"] = "auto"
    """true: gradients travel during the backward pass; false: after it; auto: after it only on GPUs where they and
    cgbn's messages would go over two NCCL communicators at once, which can hang (docs/design.md)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the training forward (autocast); weights, gradients, boxes, losses stay float32; float16 scales the loss."""

    def check(self) -> None:
        """Check how the keys fit each other. Raises UserError."""
        require(not self.agvm or self.optimizer == "sgd", "solver.agvm", self.agvm, "true with solver.optimizer sgd")
        self._check_schedule()

    def _check_schedule(self) -> None:
        """The lengths and factors of the learning rate's schedule."""
        in_iterations = self.drop_iterations is not None
        key = "solver.drop_iterations" if in_iterations else "solver.drop_epochs"
        drops = self.drop_epochs if self.drop_iterations is None else self.drop_iterations
        require(
            len(drops) == len(self.drop_factors),
            "solver.drop_factors",
            self.drop_factors,
            f"one factor for each of {key} = {drops}",
        )
        require(list(drops) == sorted(drops), key, drops, "rising order")
        require(all(drop >= 0 for drop in drops), key, drops, "0 or more each")
        require(all(f > 0 for f in self.drop_factors), "solver.drop_factors", self.drop_factors, "more than 0 each")
        require(
            self.warmup_form != "doubling" or self.warmup_start_factor > 0,
            "solver.warmup_start_factor",
            self.warmup_start_factor,
            "more than 0 with solver.warmup_form doubling",
        )
        # 60,000 iterations lie between nx's first drop and its end
        require(
            self.policy != "nx" or self.policy_n * NX_ITERATIONS >= NX_DROPS_BEFORE_END[0],
            "solver.policy_n",
            self.policy_n,
            f"{NX_DROPS_BEFORE_END[0] / NX_ITERATIONS:.3g} or more",
        )
