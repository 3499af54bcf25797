"""Weights that torchvision publishes."""

from __future__ import annotations

import argparse
import pickle
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from megdet_hpc.files import atomic_write


def fetch(name: str, output: Path, use: str = "") -> None:
    """Download torchvision's default weights of a model and write their state dict to a file.

    Args:
        name: name of the model.
        output: file to write.
        use: options of a run that begins with them; by default those of a backbone.

    Raises:
        OSError: there is no connection, or the file cannot be written.
        RuntimeError, HTTPException, UnpicklingError: what came is not the published file.
    """
    import torch
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    state = weights.get_state_dict(progress=True, check_hash=True)
    with atomic_write(output) as file:
        torch.save(state, file)
    print(f"{weights} is in {output}; train with {use or f'--model.backbone {name} --model.backbone_weights {output}'}")


def fetch_for_user(parser: argparse.ArgumentParser, name: str, output: Path, use: str = "") -> None:
    """Fetch weights for a program whose command line was read; the arguments are those of `fetch`.

    Args:
        parser: parser of the program, which names it in errors.
        name, output, use: see `fetch`.

    Raises:
        SystemExit: status 2 if the file is there already, 1 if it cannot be fetched or written.
    """
    if output.exists():
        parser.error(f"--output {output} exists already; name another file or delete it")
    try:
        fetch(name, output, use)
    except OSError as error:
        # an HTTPError has an address for its filename
        if error.filename is not None and not isinstance(error, URLError):
            sys.exit(f"{parser.prog}: error: {error.filename}: cannot be written ({error.strerror})")
        why = f"{error}; run this on a machine with internet access (login node)"
        sys.exit(f"{parser.prog}: error: {why}")
    except (RuntimeError, HTTPException, pickle.UnpicklingError) as error:
        # torch's own errors: other bytes than the published ones, of a proxy, a cut connection or a damaged cache
        import torch

        why = f"its file is not the published one ({' '.join(str(error).split())[:200]})"
        sys.exit(f"{parser.prog}: error: {name}: {why}; delete it in {torch.hub.get_dir()}/checkpoints and try again")
