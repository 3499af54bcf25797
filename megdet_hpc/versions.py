"""The code that a process runs: this package's source, and the libraries that decide numbers or messages."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

import megdet_hpc

_HASH_DIGITS = 12
_LIBRARIES = ("torch", "torchvision", "h5py", "numpy", "pycocotools", "horovod", "mpi4py")


def source_hash() -> str:
    """SHA-256 of the package's Python and YAML files with their paths, shortened. It needs no git."""
    root = Path(megdet_hpc.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".yaml")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:_HASH_DIGITS]


def installed_versions() -> dict[str, str]:
    """Installed versions of this package, of Python and of the libraries; `missing` for one that is not there."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "missing"

    own = {"megdet_hpc": f"{megdet_hpc.__version__}, source {source_hash()}", "Python": platform.python_version()}
    return own | {name: version(name) for name in _LIBRARIES}
