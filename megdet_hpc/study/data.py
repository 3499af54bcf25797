"""The data of a study: generated once and packed, or packs that the user names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megdet_hpc.errors import UserError
from megdet_hpc.files import file_sha256, publish_file
from megdet_hpc.programs import as_called_here
from megdet_hpc.study.scales import Scale, Shapes

_ROOT = Path(__file__).resolve().parents[2]


def named_packs(scale: Scale, data: Path) -> None:
    """Check that the packs of a scale without generated data are there.

    Raises:
        UserError: names what is missing and how to make it.
    """
    for split in ("train", "val"):
        if not (data / split).is_dir():
            raise UserError(
                f"--scale {scale.name}: {data / split} does not exist; --data DIR names a folder with the packs train "
                f"and val, which {as_called_here('python data_prep/pack_coco.py')} writes"
            )


def fingerprint(files: list[Path]) -> str:
    """The SHA-256 of some files, as text; a pack's manifest holds those of its shards. "" of no files."""
    return " ".join(map(file_sha256, files))


def generated_packs(shapes: Shapes, folder: Path) -> None:
    """Draw and pack a generated set into `folder`, unless it is there: packs train and val.

    Raises:
        UserError: a program of data_prep failed.
    """
    if folder.is_dir():
        return
    print(f"drawing {shapes.num_train} + {shapes.num_val} images into {folder}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        packs, coco = Path(temporary) / "packs", Path(temporary) / "coco"
        numbers = ["--train", str(shapes.num_train), "--val", str(shapes.num_val)]
        _prepare("make_shapes", "--output", coco, *numbers, "--size", shapes.size, "--seed", shapes.seed)
        for split in ("train", "val"):
            annotations = coco / "annotations" / f"instances_{split}.json"
            _prepare("pack_coco", "--annotations", annotations, "--images", coco / split, "--output", packs / split)
        shutil.move(packs, folder)


def _prepare(program: str, *arguments: object) -> None:
    command = [sys.executable, str(_ROOT / "data_prep" / f"{program}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"data_prep/{program}.py failed: {(done.stderr or done.stdout).strip()[-500:]}")


def export_backbone(run: Path, file: Path) -> None:
    """Write the backbone of a run's newest checkpoint in the format that model.backbone_weights takes.

    Raises:
        UserError: the run has no checkpoint.
    """
    import torch

    from megdet_hpc.engine.checkpoint import load_newest

    found = load_newest(run / "checkpoints")
    if found is None:
        raise UserError(f"{run}: no checkpoint to take the backbone from")
    prefix = "backbone.body."
    model: dict[str, Any] = found[1]["model"]
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    torch.save({key.removeprefix(prefix): value for key, value in model.items() if key.startswith(prefix)}, temporary)
    publish_file(temporary, file)
