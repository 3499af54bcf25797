"""What ranks may differ in, told with hosts and ranks."""

from __future__ import annotations

from megdet_hpc.engine.agreement import PackFacts, RankFacts, pack_differences, setting_differences


def facts(
    host: str, folder: str = "/data/train", manifest: str = "a" * 64, images: int = 100, size: int = 32
) -> RankFacts:
    settings = {"norm.size": size, "data.train": folder, "data.val": None}
    return RankFacts(host, settings, {"data.train": PackFacts(folder, manifest, images)})


def test_equal_ranks_agree_wherever_the_same_pack_lies() -> None:
    everyone = [facts("node00"), facts("node00"), facts("node01", folder="/local/train")]
    assert setting_differences(everyone) == pack_differences(everyone) == []


def test_a_key_is_named_with_every_value_and_its_hosts() -> None:
    everyone = [facts("node00"), facts("node00"), facts("node01", size=16), facts("node02", size=16)]
    assert setting_differences(everyone) == ["norm.size is 32 on node00 (ranks 0-1), 16 on node01, node02 (ranks 2-3)"]


def test_a_stale_copy_is_named_by_folder_images_and_manifest() -> None:
    everyone = [facts("node00"), facts("node01", "/local/train", "b" * 64, 90)]
    assert setting_differences(everyone) == []
    assert pack_differences(everyone) == [
        "data.train is /data/train with 100 images, manifest aaaaaaaaaaaa on node00 (rank 0), /local/train with 90 "
        "images, manifest bbbbbbbbbbbb on node01 (rank 1); copy the pack again to the hosts where it is old"
    ]


def test_a_pack_that_only_some_ranks_use_differs() -> None:
    other = RankFacts("node01", {"norm.size": 32, "data.train": None, "data.val": None})
    assert pack_differences([facts("node00"), other]) == [
        "data.train is /data/train with 100 images, manifest aaaaaaaaaaaa on node00 (rank 0), no pack (None) on node01 "
        "(rank 1); copy the pack again to the hosts where it is old"
    ]


def test_many_hosts_are_counted() -> None:
    everyone = [facts(f"node{n:02d}", size=8 if n else 16) for n in range(9)]
    assert setting_differences(everyone) == [
        "norm.size is 16 on node00 (rank 0), 8 on node01, node02, node03, node04 and 4 more hosts (ranks 1-8)"
    ]
