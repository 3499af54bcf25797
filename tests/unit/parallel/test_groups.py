from __future__ import annotations

import pytest

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.launch import find_launch


def test_groups_are_consecutive_ranks() -> None:
    groups = BnGroups(num_ranks=128, images_per_rank=2, bn_size=32)
    assert (groups.ranks_per_group, groups.num_groups) == (16, 8)
    assert [groups.group_of(rank) for rank in (0, 15, 16, 127)] == [0, 0, 1, 7]


def test_zero_is_the_world() -> None:
    groups = BnGroups(num_ranks=6, images_per_rank=2, bn_size=0)
    assert (groups.ranks_per_group, groups.num_groups, groups.group_of(5)) == (6, 1, 0)


def test_a_rank_may_have_several_groups() -> None:
    groups = BnGroups(num_ranks=8, images_per_rank=32, bn_size=2)
    assert (groups.per_rank, groups.ranks_per_group, groups.num_groups, groups.images) == (16, 1, 8, 2)
    assert str(groups) == "128 BN group(s) of 2 image(s), 16 in each rank"
    assert BnGroups(4, 2, 8).per_rank == BnGroups(4, 2, 0).per_rank == 1
    with pytest.raises(UserError, match=r"norm.size 3: .* Accepted here: 1, 2, 4, 8, 16, or 0 for all 16"):
        BnGroups(num_ranks=2, images_per_rank=8, bn_size=3)


def test_the_error_prints_the_equation() -> None:
    with pytest.raises(UserError, match=r"128 ranks x 2 images per rank / BN size 24 = 10.67 groups"):
        BnGroups(num_ranks=128, images_per_rank=2, bn_size=24)
    with pytest.raises(UserError, match=r"Accepted here: 1, 2, 4, 8, or 0 for all 8"):
        BnGroups(num_ranks=4, images_per_rank=2, bn_size=3)
    with pytest.raises(UserError, match=r"= 0\.5 groups"):
        BnGroups(num_ranks=4, images_per_rank=2, bn_size=16)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "128", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "128", "SLURM_PROCID": "0", "SLURM_STEP_ID": "batch"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_STEP_ID": "0"}, ("srun", 8, 3)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, ("mpirun (Open MPI)", 4, 1)),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "1"}, ("horovodrun (Gloo)", 2, 1)),
    ],
)
def test_launchers(environ: dict[str, str], expected: tuple[str, int, int] | None) -> None:
    launch = find_launch(environ)
    assert (launch and (launch.launcher, launch.size, launch.rank)) == expected
