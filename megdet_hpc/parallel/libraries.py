"""Versions and build flags of Horovod, mpi4py and the MPI below them, with and without a launcher."""

from __future__ import annotations

from dataclasses import dataclass

_THREAD_LEVELS = ("MPI_THREAD_SINGLE", "MPI_THREAD_FUNNELED", "MPI_THREAD_SERIALIZED", "MPI_THREAD_MULTIPLE")


@dataclass(frozen=True)
class ParallelLibraries:
    """What this process loads; equal on every rank of a sound job."""

    mpi4py: str
    mpi: str
    """The MPI library's own version line."""
    thread_level: str | None
    """As MPI granted it; None while MPI is not started."""
    multiple: bool
    """Whether that is MPI_THREAD_MULTIPLE, which mpi4py beside Horovod needs."""
    reads_gpu_memory: bool
    horovod: str
    horovod_built: tuple[str, ...]
    """Of mpi, gloo, nccl, cuda, rocm, ccl, ddl: what Horovod was built with."""
    mpi_enabled: bool | None
    """Horovod runs over MPI; None while Horovod is not started."""
    threads_supported: bool | None
    """As Horovod sees MPI's threads; None likewise."""


def horovod_built() -> tuple[str, ...]:
    """What the loaded Horovod was built with, of mpi, gloo, nccl, cuda, rocm, ccl, ddl. Not a collective."""
    import horovod.torch as hvd

    return tuple(
        name for name in ("mpi", "gloo", "nccl", "cuda", "rocm", "ccl", "ddl") if getattr(hvd, f"{name}_built")()
    )


def parallel_libraries() -> ParallelLibraries:
    """Ask the libraries. Not a collective; MPI and Horovod are left unstarted where they are.

    Raises:
        ImportError: mpi4py or Horovod is missing or broken.
    """
    import mpi4py

    # without a launcher MPI would start helpers of its own, or end a process on a login node
    mpi4py.rc.initialize = False
    from mpi4py import MPI  # isort: skip
    import horovod
    import horovod.torch as hvd

    from megdet_hpc.parallel.mpi import mpi_reads_gpu_memory

    started = hvd.is_initialized()
    levels = (MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE)
    level = MPI.Query_thread() if MPI.Is_initialized() else None
    return ParallelLibraries(
        mpi4py=mpi4py.__version__,
        mpi=MPI.Get_library_version().split(",")[0].strip("\0\n "),
        thread_level=None if level is None else _THREAD_LEVELS[levels.index(level)],
        multiple=level == MPI.THREAD_MULTIPLE,
        reads_gpu_memory=mpi_reads_gpu_memory(),
        horovod=horovod.__version__,
        horovod_built=horovod_built(),
        mpi_enabled=bool(hvd.mpi_enabled()) if started else None,
        threads_supported=bool(hvd.mpi_threads_supported()) if started else None,
    )
