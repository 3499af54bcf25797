"""The network that NCCL took, from lines as it writes them.

The lines have the form of logs in public reports: InfiniBand of siderolabs/docs#566 (NCCL 2.28), TCP of
NVIDIA/nccl#1267 (2.19), RoCE and HPC-X' plugin of NVIDIA/nccl#676, EFA of aws/aws-ofi-nccl#161 (2.10), Slingshot of
determined-ai/environments#169. The forms of 2.27 and newer are compared with the installed library.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from megdet_hpc.doctor import nccl_log
from megdet_hpc.doctor.nccl_log import NcclNetwork, probe_network, read_network

INFINIBAND = """\
nccl-test:179:179 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.1<0>
nccl-test:179:179 [0] NCCL INFO Using network IB
nccl-test:179:179 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA
nccl-test:179:179 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
"""
TCP = """\
instance-2:525781:525781 [0] NCCL INFO Bootstrap : Using ens7:10.128.0.31<0>
instance-2:525781:525781 [0] NCCL INFO NET/Plugin: Failed to find ncclNetPlugin_v7 symbol.
NCCL version 2.19.3+cuda12.3
instance-2:525781:525957 [0] NCCL INFO NET/IB : No device found.
instance-2:525781:525957 [0] NCCL INFO NET/Socket : Using [0]ens7:10.128.0.31<0>
instance-2:525781:525957 [0] NCCL INFO Using non-device net plugin version 0
instance-2:525781:525957 [0] NCCL INFO Using network Socket
"""
ROCE = """\
gpu01:351578:351578 [0] NCCL INFO P2P plugin IBext
gpu01:351578:351578 [0] NCCL INFO NET/IB : Using [0]mlx5_9:1/RoCE [RO]; OOB enp225s0f1:10.10.10.2<0>
gpu01:351578:351578 [0] NCCL INFO Using network IB
"""
EFA = """\
algo-1:462:462 [0] NCCL INFO NET/OFI Using aws-ofi-nccl 1.3.0aws
algo-1:462:462 [0] NCCL INFO NET/OFI Selected Provider is efa
algo-1:462:462 [0] NCCL INFO Using network AWS Libfabric
"""
SLINGSHOT = """\
nid000019:51404:52019 [0] NCCL INFO NET/OFI Selected Provider is cxi
nid000019:51404:52019 [0] NCCL INFO Using network AWS Libfabric
"""
NEWER = """\
node1:7:9 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0> [1]eth1:10.1.0.1<0>
node1:7:9 [0] NCCL INFO Initialized NET plugin Socket
node1:7:9 [0] NCCL INFO Assigned NET plugin Socket to comm
node1:7:9 [0] NCCL INFO Using network Socket
node1:7:9 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[0] [send] via NET/Socket/0
"""


@pytest.mark.parametrize(
    ("log", "network"),
    [
        (INFINIBAND, NcclNetwork("IB", ("mlx5_0:1/IB", "mlx5_1:1/IB"), "", ("NET/IB", "P2P"), True)),
        (TCP, NcclNetwork("Socket", ("ens7",))),
        (ROCE, NcclNetwork("IB", ("mlx5_9:1/RoCE",))),
        (EFA, NcclNetwork("AWS Libfabric", (), "efa")),
        (SLINGSHOT, NcclNetwork("AWS Libfabric", (), "cxi")),
        (NEWER, NcclNetwork("Socket", ("eth0", "eth1"), "", ("NET/Socket",))),
        ("", NcclNetwork("")),
    ],
)
def test_the_network_of_a_log(log: str, network: NcclNetwork) -> None:
    assert read_network(log) == network


def test_a_log_from_before_networks_were_named() -> None:
    """NCCL 2.4, as in NVIDIA/nccl-tests#29: InfiniBand counts where it has devices."""
    old = "server3:1:1 [0] NCCL INFO NET/Socket : Using [0]enp41s0f1:<0> [1]virbr0:<0>\n"
    assert read_network(old) == NcclNetwork("Socket", ("enp41s0f1", "virbr0"))
    old += "server3:1:1 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB ; OOB enp41s0f1:<0>\n"
    assert read_network(old) == NcclNetwork("IB", ("mlx5_0:1/IB",))


def test_the_installed_nccl_has_these_forms() -> None:
    spec = importlib.util.find_spec("nvidia")
    files = [
        file
        for root in (spec.submodule_search_locations if spec else []) or []
        for file in Path(root).glob("nccl/lib/libnccl.so*")
    ]
    if not files:
        pytest.skip("no NCCL from PyPI is installed")
    binary = files[0].read_bytes()
    for form in (
        b"Using network %s",
        b"NET/IB : Using%s %s; OOB",
        b"NET/Socket : Using%s",
        b"via NET/%s/%d",
        b"/GDRDMA",
    ):
        assert form in binary, form


def test_tcp_beside_a_fast_adapter_is_slow() -> None:
    (slow,) = probe_network(TCP, 2, ["mlx5_0"], "IB")
    assert slow.verdict == "slow" and slow.detail == "Socket: ens7; NCCL_NET=IB" and "has mlx5_0" in slow.advice
    assert [f.verdict for f in probe_network(TCP, 1, ["mlx5_0"])] == ["fine"]  # one host sends nothing over it
    (fine,) = probe_network(INFINIBAND, 2, ["mlx5_0"])
    assert fine.verdict == "fine"
    assert fine.detail == "IB: mlx5_0:1/IB, mlx5_1:1/IB; channels over NET/IB, P2P with GPUDirect RDMA"
    assert probe_network("", 2, ["mlx5_0"]) == []


def test_the_log_goes_to_a_file_of_the_process_and_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"NCCL_DEBUG": "WARN"}
    folder = nccl_log.keep_log(environ)
    assert folder is not None and environ["NCCL_DEBUG"] == "INFO"
    monkeypatch.setattr(nccl_log.socket, "gethostname", lambda: "node1.cluster.example")  # NCCL cuts it at the dot
    (folder / f"log.node1.{os.getpid()}").write_text(SLINGSHOT)
    (folder / "log.node1.1").write_text(TCP)
    assert nccl_log.read_log(folder, environ) == SLINGSHOT
    assert not folder.exists()
    assert nccl_log.read_log(None, environ) == ""


@pytest.mark.parametrize("environ", [{"NCCL_DEBUG": "INFO"}, {"NCCL_DEBUG_FILE": "/mine"}])
def test_a_users_own_log_stays(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert nccl_log.keep_log(environ) is None and environ == before
