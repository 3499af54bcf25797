"""Check that all ranks of a job have the same configuration, data, device and code.

Each rank computes its plan from these alone. If ranks differed, they would make different numbers of steps and wait for
each other for ever, or would silently train on other images.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.shard_format import manifest_hash
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.groups import rank_ranges
from megdet_hpc.versions import installed_versions

_SHOWN_HOSTS = 4
_HASH_DIGITS = 12


@dataclass(frozen=True)
class PackFacts:
    """A pack as one rank sees it. Another host may have the same content in another folder."""

    folder: str
    manifest: str
    """SHA-256 of the manifest, which holds those of the shards."""
    num_images: int


@dataclass(frozen=True)
class RankFacts:
    """Facts about the run that one rank is about to start."""

    host: str
    settings: dict[str, Any]
    """Dotted keys and their values."""
    packs: dict[str, PackFacts] = field(default_factory=dict)
    """Facts of each pack, by the key that names its folder, such as data.train."""
    versions: dict[str, str] = field(default_factory=dict)


def _places(ranks: Iterable[int], everyone: Sequence[RankFacts]) -> str:
    """Hosts and ranks as text: `node00, node01 (ranks 0-15)`."""
    numbers = sorted(ranks)
    hosts = list(dict.fromkeys(everyone[rank].host for rank in numbers))
    more = f" and {len(hosts) - _SHOWN_HOSTS} more hosts" if len(hosts) > _SHOWN_HOSTS else ""
    return f"{', '.join(hosts[:_SHOWN_HOSTS])}{more} (rank{'s' if len(numbers) > 1 else ''} {rank_ranges(numbers)})"


def _spread(values: Sequence[Any], everyone: Sequence[RankFacts], shown: Sequence[str]) -> str | None:
    """Each value with its ranks, as text; None if all ranks have the same."""
    having: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        having.setdefault(repr(value), []).append(rank)
    if len(having) == 1:
        return None
    return ", ".join(f"{shown[ranks[0]]} on {_places(ranks, everyone)}" for ranks in having.values())


def _differences(everyone: Sequence[RankFacts], name: str) -> list[str]:
    """One text for each key, of a dict that all ranks have, whose values differ."""
    found = []
    for key in dict.fromkeys(key for facts in everyone for key in getattr(facts, name)):
        values = [getattr(facts, name).get(key, "missing") for facts in everyone]
        spread = _spread(values, everyone, [str(value) for value in values])
        if spread:
            found.append(f"{key} is {spread}")
    return found


def setting_differences(everyone: Sequence[RankFacts]) -> list[str]:
    """Differences in the settings. Names of folders do not count if the content is compared.

    Args:
        everyone: facts by rank.

    Returns:
        One text per key, with each value, its hosts and ranks.
    """
    folders = {key for facts in everyone for key in facts.packs}
    compared = [
        RankFacts(facts.host, {key: value for key, value in facts.settings.items() if key not in folders})
        for facts in everyone
    ]
    return _differences(compared, "settings")


def pack_differences(everyone: Sequence[RankFacts]) -> list[str]:
    """Differences in the packs: one text per key, with each content, its hosts and ranks."""
    found = []
    for key in dict.fromkeys(key for facts in everyone for key in facts.packs):
        packs = [facts.packs.get(key) for facts in everyone]
        shown = [
            f"{pack.folder} with {pack.num_images} images, manifest {pack.manifest[:_HASH_DIGITS]}"
            if pack
            else f"no pack ({facts.settings.get(key)})"
            for facts, pack in zip(everyone, packs, strict=True)
        ]
        spread = _spread([pack and pack.manifest for pack in packs], everyone, shown)
        if spread:
            found.append(f"{key} is {spread}; copy the pack again to the hosts where it is old")
    return found


def require_agreement(
    world: Communicator, settings: Mapping[str, Any], packs: Mapping[str, PackedCoco] | None = None
) -> None:
    """Compare the ranks' settings, packs and code. Collective of the world; blocks; one allgather, name `agreement`.

    Different versions of code or libraries may work together. Rank 0 only warns of them, on standard error.

    Args:
        settings: dotted keys and values that must be equal on all ranks.
        packs: opened packs, by the key that names their folder. They are compared by content.

    Raises:
        UserError: a key differs; raised on every rank. The message names values, hosts and ranks.
    """
    if world.size == 1:
        return
    own = RankFacts(
        socket.gethostname(),
        dict(settings),
        {
            key: PackFacts(str(pack.directory), manifest_hash(pack.directory), len(pack))
            for key, pack in (packs or {}).items()
        },
        installed_versions(),
    )
    everyone: list[RankFacts] = world.allgather_object(own, name="agreement")
    found = [*setting_differences(everyone), *pack_differences(everyone)]
    versions = _differences(everyone, "versions")
    if found:
        raise UserError(f"the ranks of this job do not agree: {'; '.join([*found, *versions])}")
    if versions and world.rank == 0:
        print(f"warning: the ranks run different code: {'; '.join(versions)}", file=sys.stderr, flush=True)
