"""The network that NCCL took, read from its own log. RCCL writes the same lines."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from megdet_hpc.doctor.findings import Finding

_PROBE = "NCCL network"
# "Using network IB"; since 2.27 "Assigned NET plugin IB to comm" too. The last communicator's counts.
_NETWORK = re.compile(r"(?:Using network|Assigned NET plugin) (.+?)(?: to comm)?\s*$", re.MULTILINE)
# "NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/RoCE [RO]; OOB ib0:10.0.0.1<0>", "NET/Socket : Using [0]eth0:10.0.0.1<0>"
_USING = re.compile(r"NET/(\w+) ?: Using ?((?:\[\d+\]\S+ ?)+)")
_DEVICE = re.compile(r"\[\d+\](\S+)")
_PROVIDER = re.compile(r"NET/OFI Selected [Pp]rovider is (\w+)")
_VIA = re.compile(r"Channel \S+ ?: .* via ([A-Z0-9]\S*)")
_SLOW = "Socket"


@dataclass(frozen=True)
class NcclNetwork:
    """What a log says of the network of one process.

    Attributes:
        name: NCCL's name of it, such as IB, Socket or AWS Libfabric; empty if the log says none.
        devices: devices or interfaces that it uses.
        provider: libfabric's provider, such as cxi or efa; empty without libfabric.
        ways: ways of the channels, such as P2P, SHM, NET/IB.
        gpu_direct: whether a channel reads GPU memory over the network (GPUDirect RDMA).
    """

    name: str
    devices: tuple[str, ...] = ()
    provider: str = ""
    ways: tuple[str, ...] = ()
    gpu_direct: bool = False

    @property
    def text(self) -> str:
        """The network as text. It has no addresses, so that it is the same on alike hosts."""
        of = f" ({self.provider})" if self.provider else ""
        devices = f": {', '.join(self.devices)}" if self.devices else ""
        ways = f"; channels over {', '.join(self.ways)}" if self.ways else ""
        direct = " with GPUDirect RDMA" if self.gpu_direct else ""
        return f"{self.name or 'none'}{of}{devices}{ways}{direct}"


def read_network(log: str) -> NcclNetwork:
    """The network that a log of NCCL names (NCCL_DEBUG=INFO)."""
    names = _NETWORK.findall(log)
    name = names[-1].strip() if names else ""
    listed = {kind: tuple(dict.fromkeys(map(_plain, _DEVICE.findall(text)))) for kind, text in _USING.findall(log)}
    # a log of an old version has only the devices; NCCL prefers InfiniBand
    if not name and listed:
        name = next((kind for kind in listed if kind != _SLOW), _SLOW)
    ways = [re.sub(r"^(NET/[^/]+|[^/]+).*", r"\1", way) for way in _VIA.findall(log)]
    return NcclNetwork(
        name,
        listed.get(name, ()),
        (_PROVIDER.findall(log) or [""])[-1] if name not in listed else "",
        tuple(sorted(set(ways))),
        "/GDRDMA" in log,
    )


def _plain(device: str) -> str:
    """A device without its address: `eth0:10.0.0.1<0>` is eth0, `mlx5_0:1/IB` stays."""
    return device.partition(":")[0] if "<" in device else device


def keep_log(environ: MutableMapping[str, str] = os.environ) -> Path | None:
    """Let NCCL write its log into a new folder, before its first use.

    Returns:
        The folder, which `read_log` removes; None if the user has NCCL's log already, which stays as it is.
    """
    if "NCCL_DEBUG_FILE" in environ or environ.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        return None
    folder = Path(tempfile.mkdtemp(prefix="megdet_nccl_"))
    log = str(folder / "log.%h.%p")
    environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET", NCCL_DEBUG_FILE=log)
    return folder


def read_log(folder: Path | None, environ: MutableMapping[str, str] = os.environ) -> str:
    """This process's log of NCCL; empty if there is none. The folder of `keep_log` is removed."""
    host = socket.gethostname().partition(".")[0]  # as NCCL cuts it
    file = environ.get("NCCL_DEBUG_FILE", "").replace("%h", host).replace("%p", str(os.getpid()))
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace") if file else ""
    except OSError:
        return ""
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def fast_devices(root: Path = Path("/sys/class")) -> list[str]:
    """The adapters of this host for InfiniBand, RoCE and Slingshot."""
    return sorted(path.name for kind in ("infiniband", "cxi") for path in root.glob(f"{kind}/*"))


def probe_network(log: str, num_hosts: int, fast: list[str], asked: str = "") -> list[Finding]:
    """The finding on the network that NCCL took. Not a collective.

    Args:
        log: this process's log of NCCL; nothing is found in an empty one.
        num_hosts: number of hosts of the job. On one NCCL sends nothing over its network.
        fast: adapters of this host for InfiniBand, RoCE and Slingshot.
        asked: value of NCCL_NET.
    """
    if not log:
        return []
    network = read_network(log)
    text = f"{network.text}{f'; NCCL_NET={asked}' if asked else ''}"
    if network.name == _SLOW and num_hosts > 1 and fast:
        costs = (
            f"gradients take TCP, though this host has {', '.join(fast)}: load the site's plugin (aws-ofi-nccl) for "
            "Slingshot or EFA, or see why NET/IB found no device (NCCL_DEBUG=INFO, NCCL_IB_HCA, NCCL_IB_DISABLE); "
            "jobs/sites has the variables"
        )
        return [Finding("slow", _PROBE, text, costs)]
    return [Finding("fine", _PROBE, text)]
