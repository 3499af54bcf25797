"""A detector that begins with the weights of another one. What fits is loaded; classes are matched by name.

Two kinds of files are read: checkpoints of this package, which name their categories, and state dicts of torchvision's
detectors. In the latter 91 classes are those of torchvision's COCO weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from megdet_hpc.errors import UserError
from megdet_hpc.layers.frozen import FrozenNorm
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.tensor_file import read_tensors

LEAST_SHARE = 0.5
"""Share of a detector's values that a file must bring. The class layers do not count."""
_SHOWN = 8  # names in one line
_COCO_91: list[str] = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
_NO_NAME = "N/A"  # name of an id that COCO left out
# names that torchvision gave layers before it put normalization beside them (its RPNHead, FPN, mask head and the heads
# of RetinaNet, _version 1)
_OLD_NAMES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)$"), r"\1.0.0.\2"),
    (re.compile(r"(mask_head)\.mask_fcn(\d)\.(weight|bias)$"), lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),
    # every second layer was a ReLU
    (re.compile(r"(head\.\w+_head\.conv)\.([0246])\.(weight|bias)$"), lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"),
)


@dataclass(frozen=True)
class Source:
    """The content of a file with which a detector may begin.

    Attributes:
        file: file that was read.
        kind: kind of the file, as text.
        state: tensors by name.
        names: names of the categories by label, from 1 on; None where neither the file nor their number tells them.
    """

    file: Path
    kind: str
    state: dict[str, Tensor]
    names: list[str] | None


@dataclass(frozen=True)
class Transfer:
    """The record of what a detector took from a file.

    Attributes:
        source: content of the file.
        class_layers: layers that have outputs for each class.
        kept: categories whose rows of the class layers were taken.
        drawn: categories whose rows are random.
        note: how the classes were matched where names could not do it; "" otherwise.
        loaded: tensors of the detector that were taken whole.
        missing: tensors of the detector that keep their random values, without the class layers.
        unused: tensors of the file that the detector does not have, or has in another shape.
    """

    source: Source
    class_layers: list[str]
    kept: list[str]
    drawn: list[str]
    note: str
    loaded: list[str]
    missing: list[str]
    unused: list[str]

    def lines(self) -> dict[str, str]:
        """Text by heading, for the first lines of a run."""
        classes = f"kept for {_few(self.kept)}" if self.kept else "nothing kept"
        classes += f", drawn anew for {_few(self.drawn)}" if self.drawn else ""
        found = {
            "begins with": f"{self.source.file} ({self.source.kind}): {len(self.loaded)} tensors as they are",
            "class layers": f"{', '.join(self.class_layers)}: {classes}{self.note}",
        }
        if self.missing:
            found["drawn anew"] = f"{len(self.missing)} tensors that the file has not: {_few(self.missing)}"
        if self.unused:
            found["left aside"] = f"{len(self.unused)} tensors of the file: {_few(self.unused)}"
        return found


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def read_source(file: Path) -> Source:
    """Read a checkpoint of this package, or a state dict, bare or under `model` as torchvision's training writes it.

    Raises:
        UserError: there is no such file, or it is neither of the two.
    """
    content = read_tensors(file, "model.weights")
    kind, names = "state dict", None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        if "category_ids" in content:
            kind = f"checkpoint of megdet_hpc, step {content['step']}"
            names = content.get("category_names")
        if isinstance(averaged := content.get("ema"), dict):
            kind += ", averaged weights"
            content = averaged
        content = content["model"]
    if not (isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise UserError(
            f"model.weights {file}: holds no state dict; accepted: a checkpoint of megdet_hpc, a state dict of a "
            "detector, or one under the key model"
        )
    prefix = "module."  # torch's DistributedDataParallel adds it
    if all(key.startswith(prefix) for key in content):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return Source(file, kind, dict(content), names)


@torch.no_grad()
def transfer(model: Detector, source: Source, names: Sequence[str]) -> Transfer:
    """Load what fits into a detector. In class layers, the rows of categories with equal names are taken.

    Case and blanks of names do not count. If a file does not name its classes but has equally many, their order counts.

    Args:
        model: detector, changed in place; it keeps what the file does not have.
        source: content of the file.
        names: names of the model's categories by label, from 1 on.

    Raises:
        UserError: less than half of the detector is in the file, or fixed statistics are not in it.
    """
    own = model.state_dict()
    given = _renamed(source.state, own)
    class_layers = {
        f"{path}.{kind}": spread
        for path, spread in model.class_layers().items()
        for kind in ("weight", "bias", "running_mean", "running_var")  # normalization may follow a class layer
    }
    class_layers = {key: spread for key, spread in class_layers.items() if key in own}
    loaded = [k for k in own if k not in class_layers and k in given and given[k].shape == own[k].shape]
    missing = [k for k in own if k not in class_layers and k not in loaded and "num_batches" not in k]
    _require_enough(source, own, class_layers, loaded, missing)
    _require_statistics(model, source, missing)
    for key in loaded:
        own[key].copy_(given[key])
    rows, note = _matched(source, _num_labels(given, class_layers), names)
    taken: list[str] = []
    for key, spread in class_layers.items():
        if rows and key in given and _copy_rows(own[key], given[key], spread, rows):
            taken.append(key)
    kept = [name for label, name in enumerate(names, start=1) if taken and label in rows]
    return Transfer(
        source,
        list(model.class_layers()),
        kept,
        [name for name in names if name not in kept],
        note,
        loaded,
        missing,
        [key for key in given if key not in loaded and key not in taken and "num_batches" not in key],
    )


def _renamed(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under the names that torchvision gives them now."""
    found = {}
    for key, value in state.items():
        new = key
        if key not in own:
            for old, text in _OLD_NAMES:
                new = old.sub(text, new)
        found[new if new in own else key] = value
    return found


def _require_enough(
    source: Source,
    own: dict[str, Tensor],
    class_layers: dict[str, tuple[int, int]],
    loaded: list[str],
    missing: list[str],
) -> None:
    """Raise UserError where the file brings less than LEAST_SHARE of the values, with the reason."""
    whole = sum(value.numel() for key, value in own.items() if key not in class_layers)
    share = sum(own[key].numel() for key in loaded) / max(whole, 1)
    if share >= LEAST_SHARE:
        return
    first = next(key for key in missing if own[key].numel() > 1)
    theirs = source.state.get(first)
    why = (
        f"{first} has the shape {tuple(theirs.shape)} there, {tuple(own[first].shape)} here"
        if theirs is not None
        else (f"it has no {first}; its first is {next(iter(source.state))}")
    )
    hint = "; it looks like a classifier's, which model.backbone_weights takes" if "fc.weight" in source.state else ""
    raise UserError(
        f"model.weights {source.file}: only {share:.0%} of the configured detector's values are in it, "
        f"{LEAST_SHARE:.0%} are needed: {why}{hint}"
    )


def _require_statistics(model: Detector, source: Source, missing: list[str]) -> None:
    """Raise UserError where layers that keep their statistics would keep those of random weights."""
    layers = dict(model.named_modules())
    fixed = [k for k in missing if "running" in k and isinstance(layers[k.rpartition(".")[0]], FrozenNorm)]
    if fixed:
        raise UserError(
            f"model.weights {source.file}: has no running statistics ({_few(fixed[:2])}, ...), which norm.kind frozen, "
            "norm.where without backbone and model.frozen_stages keep as they are; give another file or norm.kind"
        )


def _num_labels(given: dict[str, Tensor], class_layers: dict[str, tuple[int, int]]) -> int | None:
    """The number of classes in the file, the background included; None where it has no class layer."""
    for key, (before, after) in class_layers.items():
        if key in given:
            return len(given[key]) // (before * after)
    return None


def _matched(source: Source, num_labels: int | None, names: Sequence[str]) -> tuple[dict[int, int], str]:
    """The file's label for each of our labels, background included, and a note where names did not decide it."""
    if num_labels is None:
        return {}, ""
    theirs = source.names
    if theirs is None and num_labels == len(_COCO_91) + 1:
        theirs = _COCO_91
    every = {label: label for label in range(len(names) + 1)}
    if theirs is None:
        if num_labels == len(every):
            return every, "; the file names no classes and has as many, which are taken in their order"
        return {}, f"; the file names none of its {num_labels - 1} classes"
    if list(theirs) == list(names):
        return every, ""
    label_of = {_plain(name): label for label, name in enumerate(theirs, start=1) if name != _NO_NAME}
    rows = {label: label_of[_plain(name)] for label, name in enumerate(names, start=1) if _plain(name) in label_of}
    return ({0: 0, **rows} if rows else {}), ""


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()


def _copy_rows(own: Tensor, given: Tensor, spread: tuple[int, int], rows: dict[int, int]) -> bool:
    """Copy the rows of classes between two tensors of a class layer, if all other sizes are equal. Returns whether."""
    before, after = spread
    if own.shape[1:] != given.shape[1:] or len(given) % (before * after):
        return False
    here, there = (value.view(before, -1, after, *value.shape[1:]) for value in (own, given))
    here[:, list(rows)] = there[:, list(rows.values())].to(own.dtype)
    return True
