"""Probes on folders, interfaces and placements made for the test."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megdet_hpc.doctor import examination, filesystem, machine, network, preflight
from megdet_hpc.doctor.__main__ import parser
from megdet_hpc.doctor.findings import Finding, Place
from megdet_hpc.doctor.stage_guard import StageGuard
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.transports import CARRIERS


def test_the_mount_of_a_folder_is_the_deepest(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    blank = tmp_path / "a b"
    (blank / "c").mkdir(parents=True)
    name = str(blank).replace(" ", "\\040")
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {name} lustre rw 0 0\ntmpfs {name}/cc tmpfs rw 0 0\n")
    assert filesystem.mount_of(blank / "c", mounts) == (str(blank), "lustre")
    assert filesystem.mount_of(tmp_path, mounts) == ("/", "ext4")


@pytest.mark.parametrize(
    ("name", "written"),
    [("données", "données"), ("a\u00a0b", "a\u00a0b"), ("tab\there", "tab\\011here"), ("a\\x41", "a\\134x41")],
)
def test_the_mount_of_a_folder_whose_name_is_not_plain(name: str, written: str, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path}/{written} lustre rw 0 0\n", encoding="utf-8")
    assert filesystem.mount_of(tmp_path / name / "b", mounts) == (f"{tmp_path}/{name}", "lustre")


def test_a_folder_is_made_tried_and_left_empty(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    found = [filesystem.probe_writable("output", folder), *filesystem.probe_writing("output", folder)]
    assert [f.verdict for f in found if f.probe in ("output folder", "output HDF5 locks")] == ["fine", "fine"]
    assert [f.probe for f in found] == ["output folder", "output write", "output new files", "output HDF5 locks"]
    assert list(folder.iterdir()) == []


def test_a_file_in_place_of_a_folder_and_a_full_disk_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        found = filesystem.probe_writable("scratch", folder)
        assert (found.verdict, found.probe) == ("wrong", "scratch folder")
        assert str(folder) in found.detail
    monkeypatch.setattr(filesystem, "MIN_FREE_BYTES", 2**60)
    full = filesystem.probe_writable("output", tmp_path / "out")
    assert full.verdict == "wrong" and "make room" in full.advice


def test_reading_speed_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(os.urandom(2**20))
    in_order, random = filesystem.probe_reading("data", file, 2**30)
    assert "MB/s over 1.0 MiB in order" in in_order.detail
    assert "per random read of 100 KB" in random.detail


def interfaces(folder: Path, **states: str) -> Path:
    for name, state in states.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "operstate").write_text(f"{state}\n")
    return folder


def test_interfaces_that_are_down_or_misnamed(tmp_path: Path) -> None:
    good = interfaces(tmp_path / "good", lo="unknown", ib0="up", eth0="down")
    (good / "ib0" / "speed").write_text("200000\n")
    (good / "eth0" / "speed").write_text("-1\n")
    assert network.interfaces(good) == {"eth0": "down", "ib0": "up 200 Gbit/s", "lo": "unknown"}
    none = tmp_path / "none"

    def verdicts(num_hosts: int, net: Path, **environ: str) -> dict[str, str]:
        return {f.probe: f.verdict for f in network.probe_interfaces(num_hosts, environ, net, none)}

    assert verdicts(2, good, NCCL_SOCKET_IFNAME="=ib0,eth0", GLOO_SOCKET_IFNAME="ib0") == {"interfaces": "fine"}
    assert verdicts(2, good, NCCL_SOCKET_IFNAME="^lo,docker") == {"interfaces": "fine"}
    assert verdicts(2, good, GLOO_SOCKET_IFNAME="ens1")["GLOO_SOCKET_IFNAME"] == "wrong"
    # NCCL's name alone is a prefix; with =, and for gloo and Horovod, it is the whole name
    assert verdicts(2, good, NCCL_SOCKET_IFNAME="eth,ib") == {"interfaces": "fine"}
    for variable, value in (
        ("NCCL_SOCKET_IFNAME", "=eth"),
        ("NCCL_SOCKET_IFNAME", "=ib0,eth"),
        ("GLOO_SOCKET_IFNAME", "eth"),
        ("GLOO_SOCKET_IFNAME", "=ib0"),
        ("HOROVOD_GLOO_IFACE", "ib"),
    ):
        assert verdicts(2, good, **{variable: value})[variable] == "wrong", (variable, value)
    cut = interfaces(tmp_path / "cut", lo="unknown", eth0="down")
    assert (verdicts(2, cut), verdicts(1, cut)) == ({"interfaces": "wrong"}, {"interfaces": "fine"})


def test_an_infiniband_port_that_is_down_is_slow(tmp_path: Path) -> None:
    for port, state in (("1", "4: ACTIVE"), ("2", "1: DOWN")):
        folder = tmp_path / "mlx5_0" / "ports" / port
        folder.mkdir(parents=True)
        (folder / "state").write_text(state)
        (folder / "rate").write_text("200 Gb/sec (4X HDR)")
    found = network.probe_interfaces(1, {}, tmp_path / "none", tmp_path)
    assert [(f.verdict, f.detail) for f in found if f.probe == "InfiniBand"] == [
        ("fine", "mlx5_0 port 1: 200 Gb/sec (4X HDR)"),
        ("slow", "mlx5_0 port 2: 1: DOWN"),
    ]


def test_ranks_that_share_cores_or_a_gpu() -> None:
    row = machine.RankPlace(Place("node00", 0), 0, "cuda:0 X", "GPU-1", (0, 1, 2, 3), 4, "4", 8)
    other = replace(row, place=Place("node00", 1), local_rank=1, gpu="GPU-2", cores=(4, 5, 6, 7))

    def verdicts(*rows: machine.RankPlace) -> dict[str, str]:
        return {f.probe: f.verdict for f in machine.probe_placement(rows)}

    assert verdicts(row, other) == {"cores": "fine", "binding": "fine", "GPU": "fine"}
    assert verdicts(row, replace(other, cores=row.cores))["cores"] == "slow"
    assert verdicts(row, replace(other, gpu="GPU-1"))["GPU"] == "wrong"
    bound = [replace(row, cores=(0,), threads=1), replace(other, cores=(1,), threads=1)]
    assert "loader workers share its one core" in machine.probe_placement(bound)[0].advice
    assert "0-3" in machine.rank_table([row, other])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without a GPU")
def test_a_gpu_that_is_asked_for_and_missing_is_wrong() -> None:
    device, (found,) = preflight.find_device(Runtime(SerialCommunicator()), "cuda")
    assert device is None
    assert found.verdict == "wrong" and "shows 0 GPU(s)" in found.detail
    device, (found,) = preflight.find_device(Runtime(SerialCommunicator()), "cpu")
    assert (device, found.verdict) == (torch.device("cpu"), "fine")


def test_a_missing_pack_is_wrong_not_an_exception(tmp_path: Path) -> None:
    manifest, (found,) = preflight.probe_data(tmp_path / "gone", 0, 1)
    assert manifest == ""
    assert found.verdict == "wrong" and f"{tmp_path}/gone: no such folder" in found.detail


def probe_all(*words: str) -> list[Finding]:
    """The findings of one rank, as the doctor gathers them."""
    options = parser().parse_args(["--device", "cpu", "--overlap-rounds", "0", *words])
    _, lines = examination.examine(options, Runtime(SerialCommunicator()), StageGuard("here", 0))
    return [line.finding for line in lines]


def test_a_folder_that_cannot_be_looked_at_is_wrong_not_an_exception(tmp_path: Path) -> None:
    """As below a folder that the user may not search; a name that is too long raises an OSError for root too."""
    pack = str(tmp_path / ("a" * 300) / "pack")
    wrong = {f.probe: f.detail for f in probe_all("--data", pack, "--", "--data.train", pack) if f.verdict == "wrong"}
    assert {"data", "data read", "training"} <= set(wrong) <= {"data", "data file system", "data read", "training"}
    assert all(pack in detail for detail in wrong.values()), wrong


@pytest.mark.parametrize("shards", [[{"file": "shard-00000.h5"}], {"file": "shard-00000.h5"}, []])
def test_a_manifest_of_a_wrong_form_is_wrong_not_an_exception(shards: object, shapes: Path, tmp_path: Path) -> None:
    manifest = json.loads((shapes / "train" / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "shards": shards}))
    wrong = {f.probe: f.detail for f in probe_all("--data", str(tmp_path)) if f.verdict == "wrong"}
    assert set(wrong) == {"data", "data read"}
    assert all("manifest.json: shards" in detail for detail in wrong.values()), wrong


@pytest.mark.parametrize("transport", ["mpi", "torch", "horovod"])
def test_slow_gradients_are_judged_for_what_carries_them(transport: str) -> None:
    slow = network._judge(transport, network.GRADIENT_BYTES[-1], 100.0, carries=True)
    assert (slow.verdict, slow.detail) == ("slow", "160 MB in 100000 ms, 0.0016 GB/s")
    assert "take 1e+02 s an update" in slow.advice
    assert network._judge(transport, network.GRADIENT_BYTES[-1], 100.0, carries=False).verdict == "fine"
    assert network._judge(transport, network.GRADIENT_BYTES[-1], 0.1, carries=True).verdict == "fine"
    assert set(network._CARRIERS) == set(CARRIERS)
