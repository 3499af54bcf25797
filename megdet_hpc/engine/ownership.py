"""The run's folder held by rank 0 for all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megdet_hpc import owner
from megdet_hpc.parallel.communicator import Communicator


@dataclass(frozen=True)
class RunFolder:
    """A folder that this run holds, as any of its ranks sees it."""

    path: Path
    claim: str

    def check(self) -> None:
        """Make sure that the folder is still this run's. Before each write to it; not a collective.

        Raises:
            DisplacedError: another start has taken it over; ends the whole job, with a status of its own.
        """
        owner.check_claim(self.path, self.claim)


@contextmanager
def owned(path: Path, world: Communicator) -> Iterator[RunFolder]:
    """Hold the run's folder from here to the end. Collective of the world (`owner`); blocks.

    Only rank 0 looks at the folder. A refusal raises there and ends the job, as any failure of a rank.

    Raises:
        UserError: the folder cannot be made, or another process or job holds it; on rank 0.
    """
    claim = None
    try:
        claim = owner.take(path) if world.rank == 0 else None
        name: str = world.broadcast_object(claim.mark.claim if claim else None, name="owner")
        yield RunFolder(path, name)
    finally:
        if claim:
            claim.release()
