"""`deterministic: true`: operators whose result does not depend on the order in which a GPU's threads finish.

No GPU has run it yet, so it is not shown that a run on GPUs gives the same bits again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megdet_hpc.errors import UserError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# The workspaces with which cuBLAS promises equal results on several streams: 8 buffers of 4096 KiB, or of 16 KiB.
_ACCEPTED = (":4096:8", ":16:8")


def make_deterministic() -> None:
    """Ask torch, cuDNN and cuBLAS for deterministic operators. Called before this process first uses its GPU.

    Raises:
        UserError: the environment gives cuBLAS another workspace.
    """
    workspace = os.environ.setdefault(_WORKSPACE, _ACCEPTED[0])
    if workspace not in _ACCEPTED:
        raise UserError(f"deterministic is true, and {_WORKSPACE} is {workspace!r}; accepted: {', '.join(_ACCEPTED)}")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


@contextmanager
def naming_operators(deterministic: bool) -> Iterator[None]:
    """Turn torch's error about an operator without a deterministic form into one line.

    Raises:
        UserError: names the operator and the key.
    """
    try:
        yield
    except RuntimeError as error:
        operator, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not (deterministic and found):
            raise
        raise UserError(
            f"deterministic is true, but torch {torch.__version__} has no deterministic form of {operator.split()[-1]} "
            "on this device; train with --deterministic false, or another torch or torchvision"
        ) from error
