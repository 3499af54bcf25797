"""Weights that torchvision publishes."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision

from megdet_hpc.files import atomic_write


def fetch(name: str, output: Path, use: str = "") -> None:
    """Download torchvision's default weights of a model and write their state dict to a file.

    Args:
        name: name of the model.
        output: file to write.
        use: options of a run that begins with them; by default those of a backbone.

    Raises:
        OSError: there is no connection, or the file cannot be written.
    """
    weights = torchvision.models.get_model_weights(name).DEFAULT
    state = weights.get_state_dict(progress=True, check_hash=True)
    with atomic_write(output) as file:
        torch.save(state, file)
    print(f"{weights} is in {output}; train with {use or f'--model.backbone {name} --model.backbone_weights {output}'}")
