"""The data of a study: generated once and packed, or packs that the user names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megdet_hpc.data.shard_format import MANIFEST_NAME
from megdet_hpc.errors import UserError
from megdet_hpc.files import file_sha256, publish_file, temporary_for
from megdet_hpc.programs import as_called_here
from megdet_hpc.study.scales import Scale, Shapes

_ROOT = Path(__file__).resolve().parents[2]


def named_packs(scale: Scale, data: Path) -> None:
    """Check that the packs of a scale without generated data are there.

    Raises:
        UserError: names what is missing and how to make it.
    """
    for split in ("train", "val"):
        pack = data / split
        if not (pack / MANIFEST_NAME).is_file():
            what = f"is no pack: it has no {MANIFEST_NAME}" if pack.is_dir() else "does not exist"
            raise UserError(
                f"--scale {scale.name}: {pack} {what}; name a folder with the packs train and val "
                f"by --data DIR ({as_called_here('python data_prep/pack_coco.py')} writes packs)"
            )


def fingerprint(files: list[Path]) -> str:
    """The SHA-256 of some files, as text; "" for no files.

    A pack's manifest stands for the pack, since it holds the SHA-256 of each shard.
    """
    return " ".join(map(file_sha256, files))


def generated_packs(shapes: Shapes, folder: Path) -> None:
    """Draw a generated set and pack it into `folder` (packs train and val), unless they are there.

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


def export_backbone(run: Path, file: Path, *, whole_names: bool = False) -> None:
    """Write the backbone of a run's newest checkpoint in the format that model.backbone_weights takes.

    Args:
        run: folder of the run.
        file: file to write.
        whole_names: keep the names that the detector has, as model.weights takes them.

    Raises:
        UserError: the run has no checkpoint.
    """
    import torch

    from megdet_hpc.engine.checkpoint import load_newest

    found = load_newest(run / "checkpoints")
    if found is None:
        raise UserError(f"{run}: has no checkpoint from which to take the backbone")
    prefix = "backbone.body."
    model: dict[str, Any] = found[1]["model"]
    temporary = temporary_for(file)
    cut = "" if whole_names else prefix
    torch.save({key.removeprefix(cut): value for key, value in model.items() if key.startswith(prefix)}, temporary)
    publish_file(temporary, file)
