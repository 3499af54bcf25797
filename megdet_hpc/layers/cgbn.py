"""Cross-GPU batch normalization as a module, which can take the place of nn.BatchNorm2d; its state dict is the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megdet_hpc.layers.cgbn_function import CrossGpuBatchNormFunction, Exchange, group_statistics, local_batch
from megdet_hpc.layers.fused import FusedBatchNormFunction, has_kernels, merged, own_row
from megdet_hpc.layers.kernels import dense, values_per_channel
from megdet_hpc.layers.recompute import is_second_run, messages
from megdet_hpc.layers.replace import replace_norms
from megdet_hpc.parallel.communicator import Communicator


def _widened(x: Tensor) -> Tensor:
    """A tensor in float32 if it is half precision, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _beside(x: Tensor, parts: int) -> Tensor:
    """The groups of a batch as channels beside each other: (parts * n, C, H, W) -> (n, parts * C, H, W)."""
    _, channels, height, width = x.shape
    grouped = x.reshape(parts, -1, channels, height, width).transpose(0, 1)
    return grouped.reshape(-1, parts * channels, height, width)


def _behind(y: Tensor, parts: int, like: Tensor) -> Tensor:
    """The reverse of `_beside`, with the memory format of the batch that it came from."""
    grouped = y.view(len(y), parts, -1, *y.shape[2:]).transpose(0, 1)
    is_last = like.is_contiguous(memory_format=torch.channels_last)
    return grouped.reshape(like.shape).contiguous(
        memory_format=torch.channels_last if is_last else torch.contiguous_format
    )


class CrossGpuBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization whose statistics span a group of ranks (paper, section 3.3).

    In training mode each forward sends two messages (one if packed) and each backward one. Every rank of the group must
    take part, with an empty batch if it has no data. In evaluation mode nothing is sent. Half-precision input is
    normalized in float32 and returned in its own type.

    Args:
        num_features: C of the (N, C, H, W) input.
        eps, momentum, affine, track_running_stats, device, dtype, bias: the same as in nn.BatchNorm2d. A torch too old
            to know bias takes it here too.
        group: ranks that share statistics.
        exchange: two_stage or packed (see `group_statistics`).
        name: start of the messages' names, unique among the model's layers (see `name_layers`).

    Attributes:
        images: images of this rank that share statistics, where they are shared out (see `share_out`); 0: all of them.
    """

    images = 0

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Communicator,
        bias: bool = True,
        exchange: Exchange = "two_stage",
        name: str = "cgbn",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.group = group
        self.exchange = exchange
        self.name = name

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W).

        Raises:
            ValueError: the whole group has one value per channel, whose variance is undefined.
        """
        self._check_input_dim(input)
        if not self.training and self.track_running_stats:
            return super().forward(input)
        parts = self._parts(input)
        # kernels read half precision and compute in float32, but for float16 on CPUs
        x = dense(_widened(input) if input.dtype == torch.float16 and not input.is_cuda else input)
        weight, bias = (None if p is None else _widened(p) for p in (self.weight, self.bias))
        if parts > 1:
            x = _beside(x, parts)
            weight, bias = (None if p is None else p.repeat(parts) for p in (weight, bias))
        elif self.exchange == "packed" and has_kernels(x):
            return self._fused(x, weight, bias).to(input.dtype)
        with torch.no_grad():
            batch = local_batch(x.detach())
            stats = group_statistics(batch, messages(self.group), self.name, self.exchange)
            n = self._number(batch.num_values, stats.n)
            if self._counts_batch() and n:
                mean, var = stats.mean, stats.var
                if parts > 1:
                    mean, var = mean.view(parts, -1).mean(0), var.view(parts, -1).mean(0)
                self._update_running_stats(mean, var * (stats.n / (stats.n - 1)))
        y: Tensor = CrossGpuBatchNormFunction.apply(x, weight, bias, batch, stats, self.eps, self.group, self.name)
        return (_behind(y, parts, input) if parts > 1 else y).to(input.dtype)

    def _parts(self, x: Tensor) -> int:
        """The number of groups into which the images of a batch are shared out.

        Raises:
            ValueError: they are not whole, or other ranks share the statistics too.
        """
        if not self.images or len(x) <= self.images:
            return 1
        if self.group.size > 1:
            raise ValueError(f"layer {self.name}: groups of {self.images} images cannot span {self.group.size} ranks")
        if len(x) % self.images:
            raise ValueError(f"layer {self.name}: {len(x)} images cannot be shared out into groups of {self.images}")
        return len(x) // self.images

    def _number(self, own: int, n: Tensor) -> int:
        """The values per channel over the group; 2 where this rank alone has 2 or more, which need not wait for a GPU.

        Args:
            own: values per channel on this rank.
            n: values per channel over the group, or of each rank.

        Raises:
            ValueError: there is one value.
        """
        number = 2 if own > 1 else int(n.sum())
        if number == 1:
            raise ValueError(f"layer {self.name}: expected more than 1 value per channel over the group, got 1")
        return number

    def _fused(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The output by the kernels of `fused`, and the running statistics moved by them."""
        with torch.no_grad():
            row = own_row(x.detach(), self.eps)
            rows = messages(self.group).allgather_tensor(row, name=f"{self.name}.packed")
            n = self._number(values_per_channel(x), rows[:, -1])
            running, momentum = None, 0.0
            if self._counts_batch() and n and self.running_mean is not None and self.running_var is not None:
                running, momentum = (self.running_mean, self.running_var), self._factor()
            # the kernel wants them in its own type
            moved = None if running is None else (running[0].to(row.dtype), running[1].to(row.dtype))
            stats = merged(rows, self.eps, moved, momentum)
            for own, new in zip(running or (), moved or (), strict=True):
                if own is not new:
                    own.copy_(new)
        y: Tensor = FusedBatchNormFunction.apply(x, weight, bias, stats, self.eps, self.group, self.name)
        return y

    def _counts_batch(self) -> bool:
        """Count a batch, one without a value too as torch does; False where running statistics stay as they are."""
        if not self.training or self.num_batches_tracked is None or is_second_run():
            return False
        self.num_batches_tracked.add_(1)
        return True

    def _factor(self) -> float:
        """The weight of the newest batch in the running statistics; momentum None is torch's cumulative average."""
        if self.momentum is not None:
            return self.momentum
        assert self.num_batches_tracked is not None
        return 1.0 / float(self.num_batches_tracked)

    def _update_running_stats(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """Move the running statistics as nn.BatchNorm2d does; the variance is unbiased over the group's values."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        factor = self._factor()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), factor)

    def extra_repr(self) -> str:
        shared = f", images={self.images}" if self.images else ""
        ranks = f"ranks={self.group.size}, transport={self.group.transport}, {self.exchange}"
        return f"{super().extra_repr()}, {ranks}{shared}"


def name_layers(model: nn.Module) -> None:
    """Name each cross-GPU layer by its path in the model. Every message then has a name of its own."""
    for path, module in model.named_modules():
        if isinstance(module, CrossGpuBatchNorm2d):
            module.name = f"cgbn.{path}" if path else "cgbn"


def share_out(model: nn.Module, images: int, images_per_rank: int) -> None:
    """Let the cross-GPU layers of a model share out a rank's images, where fewer of them share statistics.

    Hoffer et al., Train longer, generalize better (NeurIPS 2017), algorithm 1, call it ghost batch normalization. Here
    the running statistics move by the mean of the groups' statistics, as those of ranks do that are averaged later.

    Args:
        model: model whose layers are changed.
        images: images that share statistics; 0: those of all ranks.
        images_per_rank: images of a rank in a pass.
    """
    for module in model.modules():
        if isinstance(module, CrossGpuBatchNorm2d):
            module.images = images if images < images_per_rank else 0


def convert_batchnorm(model: nn.Module, *, group: Communicator, exchange: Exchange = "two_stage") -> nn.Module:
    """Replace every nn.BatchNorm2d of a model by the cross-GPU layer, weights and statistics kept.

    Returns:
        The model, changed in place; a new layer where the model itself is a batch norm.
    """
    converted = replace_norms(model, lambda channels: CrossGpuBatchNorm2d(channels, group=group, exchange=exchange))
    name_layers(converted)
    return converted
