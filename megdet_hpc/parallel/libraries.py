"""Horovod and mpi4py: how they are loaded, and their versions and build flags, with and without a launcher."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from megdet_hpc.errors import UserError

_THREAD_LEVELS = ("MPI_THREAD_SINGLE", "MPI_THREAD_FUNNELED", "MPI_THREAD_SERIALIZED", "MPI_THREAD_MULTIPLE")


@dataclass(frozen=True)
class ParallelLibraries:
    """The parallel libraries of this process. In a sound job they are equal on every rank."""

    mpi4py: str = ""
    """Version; empty where it is not installed."""
    mpi: str = ""
    """Name and version of the MPI library."""
    thread_level: str | None = None
    """Thread level that MPI granted; None while MPI is not started."""
    multiple: bool = False
    """Whether the level is MPI_THREAD_MULTIPLE, which mpi4py beside Horovod needs."""
    reads_gpu_memory: bool | None = None
    """Whether MPI reads GPU memory; None if MPI cannot tell before its start."""
    horovod: str = ""
    """Version; empty where it is not installed."""
    horovod_built: tuple[str, ...] = ()
    """Parts that Horovod was built with, among mpi, gloo, nccl, cuda, rocm, ccl, ddl."""
    mpi_enabled: bool | None = None
    """Whether Horovod runs over MPI; None while Horovod is not started."""
    threads_supported: bool | None = None
    """Whether Horovod found threads in MPI; None while Horovod is not started."""


class LibraryError(UserError):
    """A parallel library cannot be used here. The message names it and the reason.

    Attributes:
        missing: whether it is not installed.
    """

    def __init__(self, message: str, *, missing: bool) -> None:
        super().__init__(message)
        self.missing = missing


def installed(name: str) -> bool:
    """Whether a package can be found. It is not loaded, so it may be broken."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def import_mpi() -> ModuleType:
    """Import mpi4py.MPI, which starts MPI unless mpi4py.rc.initialize is False.

    Raises:
        LibraryError: mpi4py is missing or broken, or finds no MPI.
    """
    return _import("mpi4py.MPI")


def import_libraries() -> tuple[ModuleType, ModuleType]:
    """Import mpi4py.MPI and horovod.torch. Starts MPI as `import_mpi` does.

    Raises:
        LibraryError: one of them cannot be used, or they were built against two MPIs, which would end the process.
    """
    # mpi4py first: the library that starts MPI ends it, and Horovod would do so while slower ranks still use it
    MPI, hvd = import_mpi(), import_horovod()
    mpis = mpi_files(Path("/proc/self/maps").read_text())
    if len(mpis) > 1:
        raise LibraryError(f"mpi4py and Horovod were built against two MPIs, {' and '.join(mpis)}", missing=False)
    return MPI, hvd


def mpi_files(maps: str) -> list[str]:
    """The MPI libraries that a process has loaded. `maps` is the text of its /proc/self/maps."""
    return sorted(
        {name for name in re.findall(r"/.*$", maps, re.MULTILINE) if re.match(r"libmpi\.so", Path(name).name)}
    )


def import_horovod() -> ModuleType:
    """Import horovod.torch without starting it.

    Raises:
        LibraryError: Horovod is missing or broken, or was built without its part for PyTorch.
    """
    # if its part for PyTorch is missing, Horovod prints a line and goes on without most of its names
    with contextlib.redirect_stdout(io.StringIO()):
        hvd = _import("horovod.torch")
    if not hasattr(hvd, "init"):
        raise LibraryError(
            "Horovod was built without its part for PyTorch, as a plain pip install does (horovod/torch/mpi_lib_v2 is "
            "missing)",
            missing=False,
        )
    return hvd


def _import(name: str) -> ModuleType:
    library = name.split(".")[0]
    try:
        return importlib.import_module(name)
    # RuntimeError: mpi4py's wheels look for an MPI when they are loaded; OSError, AttributeError: Horovod's extension
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == library
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LibraryError(f"{library} is missing or broken ({reason})", missing=missing) from error


def mpi_version(text: str) -> str:
    """Name and version of an MPI. `text` is what its library says, up to a screen long."""
    return " ".join(text.strip("\0\n ").splitlines()[0].split(",")[0].split())


def horovod_built() -> tuple[str, ...]:
    """The parts that the loaded Horovod has, among mpi, gloo, nccl, cuda, rocm, ccl, ddl. Not a collective."""
    import horovod.torch as hvd

    return tuple(
        name for name in ("mpi", "gloo", "nccl", "cuda", "rocm", "ccl", "ddl") if getattr(hvd, f"{name}_built")()
    )


def parallel_libraries() -> ParallelLibraries:
    """Ask the libraries that are installed. Not a collective. MPI and Horovod are not started by it.

    Raises:
        LibraryError: mpi4py or Horovod is installed and cannot be used.
    """
    found = ParallelLibraries()
    try:
        mpi4py = _import("mpi4py")
        # without a launcher MPI would start processes of its own, or end a process on a login node
        mpi4py.rc.initialize = False
        found = _of_mpi(mpi4py.__version__, import_mpi())
    except LibraryError as error:
        if not error.missing:
            raise
    try:
        _, hvd = import_libraries() if found.mpi4py else (None, import_horovod())
    except LibraryError as error:
        if not error.missing:
            raise
        return found
    import horovod

    started = hvd.is_initialized()
    return replace(
        found,
        horovod=horovod.__version__,
        horovod_built=horovod_built(),
        mpi_enabled=bool(hvd.mpi_enabled()) if started else None,
        threads_supported=bool(hvd.mpi_threads_supported()) if started else None,
    )


def _of_mpi(version: str, MPI: ModuleType) -> ParallelLibraries:
    from megdet_hpc.parallel.mpi import mpi_reads_gpu_memory

    levels = (MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE)
    level = MPI.Query_thread() if MPI.Is_initialized() else None
    return ParallelLibraries(
        mpi4py=version,
        mpi=mpi_version(MPI.Get_library_version()),
        thread_level=None if level is None else _THREAD_LEVELS[levels.index(level)],
        multiple=level == MPI.THREAD_MULTIPLE,
        reads_gpu_memory=mpi_reads_gpu_memory(),
    )
