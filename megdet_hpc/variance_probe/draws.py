"""Gradients of many mini-batches at fixed weights, for the variance probe.

A mini-batch is formed as in training: ranks of data.images_per_rank images each, their augmentation, box sampling and
BN groups, all in one process (engine/emulate.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megdet_hpc.config import Config
from megdet_hpc.data.batch import Batch, fixed_side
from megdet_hpc.data.categories import Categories
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.loader import make_loader
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.sampler import EpochPlan, aspect_groups
from megdet_hpc.devices import is_gpu
from megdet_hpc.engine.checkpoint import load_checkpoint
from megdet_hpc.engine.emulate import VirtualPasses
from megdet_hpc.engine.passes import NotFiniteError
from megdet_hpc.engine.resume import first_weights
from megdet_hpc.errors import UserError
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.factory import build_detector, first_detector
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.seeds import derived_seed
from megdet_hpc.solver.precision import Precision, ready_for_half_precision
from megdet_hpc.variance_probe.estimator import Moments, flat_gradients

NORMS = ("cgbn", "bn", "frozen", "gn")


@dataclass(frozen=True)
class MeasuredNorm:
    """A normalization to measure: norm.kind, and for cgbn the images that share statistics (0: the mini-batch)."""

    kind: str
    size: int = 0

    def label(self, images_per_rank: int) -> str:
        """Name in tables and in the picture."""
        if self.kind == "cgbn":
            return f"cgbn {self.size}" if self.size else "cgbn all"
        return f"bn {images_per_rank}" if self.kind == "bn" else self.kind


@dataclass(frozen=True)
class Setting:
    """One point to measure: weights, normalization, images."""

    state: str
    norm: MeasuredNorm
    batch: int


@contextmanager
def buffers_restored(models: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the models' running statistics at the end, so that draws do not change them."""
    buffers = [buffer for model in models for buffer in model.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    yield
    for buffer, before in zip(buffers, kept, strict=True):
        buffer.copy_(before)


class GradientDraws:
    """Model, data and states of a measurement.

    Args:
        config: configuration. Each setting replaces its norm and emulate.
        checkpoint: file whose weights are a second state, or the only one without `start`.
        start: whether to measure at the weights with which a run begins.
        device: device of the model.

    Raises:
        UserError: data, checkpoint and configuration do not fit.
    """

    def __init__(self, config: Config, checkpoint: Path | None, *, start: bool, device: torch.device) -> None:
        if start:
            config = replace(config, model=first_weights(config.model))
        self.config, self.device = config, device
        self.pack = PackedCoco(config.data.train, memory_map=config.data.memory_map)
        self._dataset(0).check_targets("data.train")
        self.portrait = aspect_groups(self.pack, config.data)
        self.states: dict[str, Any] = {"start": None} if start else {}
        if checkpoint:
            state = load_checkpoint(checkpoint)
            ours = self._dataset(0).categories
            Categories.of_checkpoint(state, ours).check_same(ours, f"checkpoint {checkpoint}", "data.train")
            self.states[f"step {state['step']}"] = (checkpoint, state["model"])

    def _dataset(self, seed: int) -> DetectionDataset:
        return DetectionDataset(
            self.pack,
            self.config.data,
            training=True,
            seed=seed,
            masks=self.config.model.needs_masks,
            geometry=self.config.model.geometry,
        )

    def _seed(self, purpose: str, batch: int) -> int:
        return derived_seed("variance_probe", purpose, self.config.seed, batch)

    def mini_batches(self, batch: int) -> int:
        """Number of disjoint mini-batches of this size in one epoch; raises UserError if there is none."""
        count = self._epochs(batch).steps_per_epoch * self.config.data.images_per_rank // batch
        if count == 0:
            raise UserError(f"--batches: {batch} images, of {len(self.pack)} in {self.config.data.train}")
        return count

    def _epochs(self, batch: int) -> EpochPlan:
        """The micro-batches of each epoch. Each size has another order, so that their errors are independent."""
        return EpochPlan(self.portrait, self.config.data.images_per_rank, 1, 1, self._seed("order", batch))

    def _draws(self, batch: int, draws: int) -> Iterator[list[Batch]]:
        """The micro-batches of each mini-batch in turn. They are the same for all states and normalizations."""
        plan, ranks = self._epochs(batch), batch // self.config.data.images_per_rank
        in_epoch = self.mini_batches(batch)
        keys = []
        for epoch in range(-(-draws // in_epoch)):
            left = min(draws - epoch * in_epoch, in_epoch)
            images = plan.epoch(epoch)[: left * ranks, 0, 0]
            keys += [[(epoch, int(index)) for index in micro_batch] for micro_batch in images]
        data = self.config.data
        loader = make_loader(
            self._dataset(self._seed("augment", batch)),
            keys,
            num_workers=data.num_workers,
            pin_memory=is_gpu(self.device),
            side=fixed_side(data, self.config.model.geometry),
        )
        batches = iter(loader)
        for _ in range(draws):
            yield [next(batches).to(self.device) for _ in range(ranks)]

    def reuse_bias(self, batch: int, draws: int) -> float:
        """The share of the variance that these draws may miss, because epochs repeat images [0 to 1].

        Draws of one epoch share no image. Draws of two epochs share some by chance, which makes them similar.
        """
        in_epoch = self.mini_batches(batch)
        whole, rest = divmod(draws, in_epoch)
        together = whole * in_epoch * (in_epoch - 1) + rest * (rest - 1)
        return (1 - together / (draws * (draws - 1))) / in_epoch

    def model(self, setting: Setting) -> Detector:
        """The detector of a setting in training mode; raises UserError if the checkpoint does not fit it."""
        own = setting.norm
        norm: Any = replace(self.config.norm, kind=own.kind, size=own.size, unit="images")  # type: ignore[arg-type]
        config, alone = replace(self.config, norm=norm), SerialCommunicator()
        found = self.states[setting.state]
        if found is None:
            model, _ = first_detector(config, self._dataset(0).categories, alone)
        else:
            model = build_detector(config, num_categories=len(self.pack.categories), group=alone, pretrained=False)
            try:
                model.load_state_dict(found[1])
            except RuntimeError as error:
                raise UserError(
                    f"checkpoint {found[0]} does not fit the configured model with norm.kind {setting.norm.kind}: "
                    f"{str(error)[:300]}"
                ) from error
        ready_for_half_precision(model)
        return model.to(self.device)

    def measure(self, setting: Setting, draws: int, deadline: float | None) -> dict[str, Moments]:
        """The moments of each part's gradient. The deadline may leave fewer draws, or none.

        Args:
            setting: what to measure.
            draws: largest number of mini-batches.
            deadline: time.monotonic() after which no draw begins [seconds]; None: no limit.

        Raises:
            NotFiniteError: a loss or gradient is not finite.
        """
        images_per_rank = self.config.data.images_per_rank
        model = self.model(setting)
        groups = BnGroups(setting.batch // images_per_rank, images_per_rank, setting.norm.size)
        passes = VirtualPasses(model, groups, Precision(self.config.solver.precision, self.device))
        trained = {part: [p for p in found if p.requires_grad] for part, found in model.parts().items()}
        parts = {part: found for part, found in trained.items() if found}
        moments = {part: Moments() for part in parts}
        for draw, batches in enumerate(self._draws(setting.batch, draws)):
            if deadline is not None and time.monotonic() > deadline:
                break
            model.zero_grad(set_to_none=True)
            with buffers_restored(passes.replicas):
                passes.forward_backward(batches, step=draw, seed=self._seed("boxes", setting.batch))
            gradients = flat_gradients(parts)
            if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
                raise NotFiniteError(f"draw {draw}: a gradient is not finite")
            for part, gradient in gradients.items():
                moments[part].add(gradient)
        return moments
