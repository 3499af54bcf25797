"""Keys of the optimizer and of its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megdet_hpc.config.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, FRACTION, ranged, require

# He, Girshick, Dollar, Rethinking ImageNet Pre-training (ICCV 2019), section 3: n x 90,000 iterations of 16 images; the
# rate is divided by 10 for the last 60,000 and again for the last 20,000.
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
    """Exponent e in rate = base_lr * (global batch / reference_batch) ** e. 1: linear scaling rule; 0.5: root rule."""
    optimizer: Literal["sgd", "lars", "lamb"] = "sgd"
    """Optimizer. sgd: gradient descent with momentum; lars, lamb: the step of each tensor follows the norm of its
    weights, except for biases and normalization layers."""
    momentum: float = ranged(0.9, BELOW_1)
    """Momentum of sgd and lars, beta1 of lamb [0 to 1, less than 1]."""
    beta2: float = ranged(0.999, BELOW_1)
    """Weight of the past in the mean squared gradient; lamb only [0 to 1, less than 1]."""
    trust_coefficient: float = ranged(0.001, ABOVE_0)
    """Step of a weight tensor relative to its norm, at rate 1; lars only."""
    momentum_correction: bool = False
    """Let a change of the rate act on the momentum at once; lars only. With sgd it always does, as in torch."""
    weight_decay: float = ranged(1e-4, AT_LEAST_0)
    """L2 decay of the weights. For biases see decay_biases, for normalization layers norm.parameters [per update]."""
    decay_biases: bool = True
    """Apply the decay to biases too; norm.parameters decides for the offsets of normalization layers."""
    agvm: bool = False
    """Scale the rates of fpn, rpn and heads so that their gradients vary like the backbone's. Needs sgd and an even
    number of ranks."""
    adascale: bool = False
    """Let the variance of the gradient set the rate and the length of the run: the schedule is that of reference_batch,
    and an update counts for as many of its steps as it is worth (AdaScale). Needs sgd and two ranks or more."""
    policy: Literal["steps", "normal", "long", "nx", "cosine", "regime"] = "steps"
    """Schedule of the rate. steps: epochs and drop_* as given; normal, long: presets of 11 and 18 epochs with drops of
    their own; nx: policy_n times 90,000 iterations of 16 images; cosine: half a cosine from the end of the warmup to 0;
    regime: as steps, but an epoch stands for the updates that reference_batch images make of it (regime adaptation;
    needs scaling_exponent 0.5)."""
    policy_n: float = ranged(1.0, ABOVE_0)
    """Number n of policy nx. Whatever n is, the rate drops 60,000 and 20,000 iterations of 16 images before the end."""
    epochs: float = ranged(11.0, ABOVE_0)
    """Length of policies steps and cosine; the others have their own [epochs]."""
    iterations: float | None = ranged(None, ABOVE_0.or_null())
    """Length of policies steps and cosine in place of epochs [iterations of reference_batch images]."""
    least_iterations: float | None = ranged(None, ABOVE_0.or_null())
    """Least length of policy cosine. A set of few images is gone through more often than `epochs` say, until it has
    this length [iterations of reference_batch images]."""
    drop_epochs: tuple[float, ...] = (8.0, 10.0)
    """Times at which the rate is multiplied by drop_factors, one factor each; policy steps only [epochs]."""
    drop_iterations: tuple[float, ...] | None = None
    """Times of the drops in place of drop_epochs; policy steps only [iterations of reference_batch images]."""
    drop_factors: tuple[float, ...] = (0.1, 0.1)
    """Factors of the drops, each relative to the rate before it; policy steps only."""
    warmup_form: Literal["linear", "doubling", "constant", "exp"] = "linear"
    """Form of the warmup. linear: the rate grows every step, as in the paper; doubling: it doubles in stages of equal
    length; constant: it stays at warmup_start_factor, then jumps to 1; exp: it grows by the same factor every step."""
    warmup_epochs: float = ranged(1.0, AT_LEAST_0)
    """Length of the warmup, in all forms and policies. 0: no warmup [epochs]."""
    warmup_iterations: float | None = ranged(None, AT_LEAST_0.or_null())
    """Length of the warmup in place of warmup_epochs [iterations of reference_batch images]."""
    warmup_start_factor: float = ranged(0.1, FRACTION)
    """Rate of the first warmup step relative to the scaled rate [0 to 1]."""
    accumulate: int = ranged(1, AT_LEAST_1)
    """Forward and backward passes in each update [passes]."""
    grow_to: int = ranged(0, AT_LEAST_0)
    """Largest number of passes to which accumulate grows where the rate would drop, by 1 / factor at the same rate; a
    drop beyond that lowers the rate. 0: every drop lowers the rate. Needs drops at whole epochs [passes]."""
    clip_norm: float | None = ranged(None, ABOVE_0.or_null())
    """Upper bound of the gradient's global norm, after the allreduce. null: no clipping."""
    clip_norm_steps: tuple[int, int] | None = None
    """First update with this bound, and the first one after it without, such as [1752, 1952] around the end of a
    warmup. They are updates of the run, also where it goes on with other ranks. null: all updates [updates]."""
    noise_every: int = ranged(0, AT_LEAST_0)
    """Updates between two measurements of the gradient noise scale, from the ranks' own gradients (docs/recipe.md). 0:
    none [updates]."""
    ema_decay: float = ranged(0.0, BELOW_1)
    """Weight of the past in the moving average of the weights, at ema_reference_batch. At k times that batch it is
    ema_decay ** k. 0: no average [per update, 0 to 1, less than 1]."""
    ema_reference_batch: int = ranged(16, AT_LEAST_1)
    """Global batch for which ema_decay holds [images]."""
    ema_ramp: bool = True
    """Bound the decay of iteration n, of ema_reference_batch images, by (1 + n) / (10 + n). The random first weights
    are then soon forgotten."""
    compression: Literal["none", "fp16"] = "none"
    """Form in which gradients travel. none: as they are; fp16: half precision, which halves the bytes."""
    gradients: Literal["auto", "horovod", "torch", "mpi"] = "auto"
    """Library that averages the gradients. torch: torch.distributed (gloo on CPUs, NCCL on GPUs); mpi: mpi4py, in one
    message after the backward pass; auto: horovod where it is installed, else torch; torch under torchrun."""
    overlap: bool | Literal["auto"] = "auto"
    """Send gradients during the backward pass. false: after it; auto: true, except on GPUs where gradients and the
    messages of cgbn layers would use two NCCL communicators at once, which can hang (docs/design.md)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the forward pass in training (autocast). Weights, gradients, boxes and losses stay float32. float16
    scales the loss."""
    tf32: Literal["none", "convolutions", "all"] = "convolutions"
    """Operators that may multiply float32 numbers in TF32, with 10 bits in place of 23, on GPUs that have it.
    convolutions: those alone, as torch does by itself; all: matrix products too; none: no operator."""

    def check(self) -> None:
        """Check that the keys fit each other. Raises UserError."""
        require(not self.agvm or self.optimizer == "sgd", "solver.agvm", self.agvm, "true with solver.optimizer sgd")
        require(
            self.gradients != "mpi" or self.overlap is not True,
            "solver.overlap",
            self.overlap,
            "auto or false with solver.gradients mpi, whose one message leaves after the backward pass",
        )
        plain = not self.adascale or (self.optimizer == "sgd" and not self.agvm)
        require(plain, "solver.adascale", self.adascale, "true with solver.optimizer sgd, without solver.agvm")
        self._check_schedule()
        self._check_growth()

    def _check_growth(self) -> None:
        """Check that the drops can be growth of the mini-batch."""
        growing = bool(self.grow_to)
        least = f"0, or solver.accumulate ({self.accumulate}) or more"
        require(not growing or self.grow_to >= self.accumulate, "solver.grow_to", self.grow_to, least)
        in_epochs = self.policy in ("normal", "long") or (
            self.policy == "steps" and self.drop_iterations is None and self.iterations is None
        )
        fits = not growing or (in_epochs and not self.adascale)
        accepted = "0, except with drops and length in epochs of solver.policy steps, normal or long, without adascale"
        require(fits, "solver.grow_to", self.grow_to, accepted)
        if not growing or self.policy != "steps":
            return
        whole = all(epoch == round(epoch) for epoch in self.drop_epochs)
        require(whole, "solver.drop_epochs", self.drop_epochs, "whole epochs with solver.grow_to")
        # a tenth in binary is not quite a tenth
        parts = all(f <= 1 and abs(1 / f - round(1 / f)) < 1e-6 / f for f in self.drop_factors)
        require(parts, "solver.drop_factors", self.drop_factors, "1 / a whole number each with solver.grow_to")

    def _check_schedule(self) -> None:
        """Check the lengths and factors of the schedule."""
        clipped = self.clip_norm_steps
        bounded = "null without solver.clip_norm, which is the bound"
        require(clipped is None or self.clip_norm is not None, "solver.clip_norm_steps", clipped, bounded)
        rising = clipped is None or 0 <= clipped[0] < clipped[1]
        require(rising, "solver.clip_norm_steps", clipped, "two updates, 0 or more, in rising order")
        # Hoffer et al., Train longer, generalize better (NeurIPS 2017): the rate grows by the root of the batch
        require(
            self.policy != "regime" or self.scaling_exponent == 0.5,
            "solver.scaling_exponent",
            self.scaling_exponent,
            "0.5 with solver.policy regime",
        )
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
            self.warmup_form not in ("doubling", "exp") or self.warmup_start_factor > 0,
            "solver.warmup_start_factor",
            self.warmup_start_factor,
            f"more than 0 with solver.warmup_form {self.warmup_form}",
        )
        require(
            self.least_iterations is None or self.policy == "cosine",
            "solver.least_iterations",
            self.least_iterations,
            "null, except with solver.policy cosine: the drops of other policies would not move with the end",
        )
        # 60,000 iterations lie between nx's first drop and its end
        require(
            self.policy != "nx" or self.policy_n * NX_ITERATIONS >= NX_DROPS_BEFORE_END[0],
            "solver.policy_n",
            self.policy_n,
            f"{NX_DROPS_BEFORE_END[0] / NX_ITERATIONS:.3g} or more",
        )
