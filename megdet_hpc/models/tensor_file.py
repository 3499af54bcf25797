"""Files of tensors that users name."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megdet_hpc.errors import UserError

torch.serialization.add_safe_globals([argparse.Namespace])  # torchvision's training stores its options in one


def _is_script(file: Path) -> bool:
    """Whether a file is a TorchScript archive, which has code beside its tensors."""
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())
    return False


def read_tensors(file: Path, key: str, advice: str = "") -> Any:
    """The content of a file that torch saved, on the CPU. No code from the file is run.

    Args:
        file: file of tensors.
        key: key of the configuration that names the file, for messages.
        advice: text that a message about a missing file ends with.

    Raises:
        UserError: there is no such file, or it holds something other than tensors and plain values.
    """
    if not file.is_file():
        raise UserError(f"{key} {file}: no such file{advice}")
    if _is_script(file):
        raise UserError(f"{key} {file}: a TorchScript export; name the checkpoint that it was made of")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text advises to run what is in the file
        raise UserError(f"{key} {file}: not a file of tensors saved by torch") from error
    except Exception as error:
        raise UserError(f"{key} {file}: not a file of tensors saved by torch ({error})") from error
