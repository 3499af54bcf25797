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
    """A folder that this run holds, for any of its ranks."""

    path: Path
    claim: str

    def check(self) -> None:
        """Check that this run still holds the folder. Called before each write to it. Not a collective.

        Raises:
            DisplacedError: another start has taken the folder. It ends the whole job with a special status.
        """
        owner.check_claim(self.path, self.claim)


@contextmanager
def owned(path: Path, world: Communicator) -> Iterator[RunFolder]:
    """Hold the run's folder until the block ends. Collective of the world (`owner`); blocks.

    Only rank 0 reads the folder. A refusal is raised there, and ends the job as any failure of a rank does.

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
