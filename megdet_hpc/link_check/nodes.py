"""Nodes on one host: network namespaces, joined by links of a set delay and rate.

With the kernel's netem each node has a veth pair to a common bridge, and `tc netem` delays and shapes what it sends.
Without netem each node has a TUN device, and `relay.py` carries the packets in user space. Root is needed for both.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from megdet_hpc.errors import UserError

SUBNET = "10.231.77.0/24"
_PREFIX = SUBNET.rsplit(".", 1)[0]
_MTU = 65_000  # bytes; few packets, so that the relay's own time is small. Netem too sees packets of up to 64 KiB
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
# Buffers that hold a full link of 10 Gbit/s and 10 ms there and back (least, default and most, in bytes), no slow start
# after each pause between gradients, and little that is unsent in front of a short message, as sites set their hosts.
_SYSCTLS = {
    "net.ipv4.tcp_rmem": "4096 1048576 16777216",
    "net.ipv4.tcp_wmem": "4096 262144 16777216",
    "net.ipv4.tcp_slow_start_after_idle": "0",
    "net.ipv4.tcp_notsent_lowat": "131072",
}
_TOOLS = ("ip", "tc", "nsenter", "unshare", "sysctl")


def _call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`{' '.join(words)}` ended with {done.returncode}: {done.stderr.strip()}")


def missing() -> str | None:
    """What keeps this process from making nodes; None if nothing does."""
    if os.geteuid():
        return "needs root, to make network namespaces"
    if lacking := [tool for tool in _TOOLS if not shutil.which(tool)]:
        return f"needs {', '.join(lacking)} (packages iproute2, util-linux and procps)"
    probe = f"mdl-probe-{os.getpid()}"
    try:
        _call("ip", "netns", "add", probe)
    except UserError as error:
        return f"needs network namespaces: {error}"
    try:
        if not _has_netem(probe) and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            return "needs netem in the kernel (CONFIG_NET_SCH_NETEM), or /dev/net/tun for a relay in its place"
    finally:
        _call("ip", "netns", "del", probe)
    return None


def _has_netem(namespace: str) -> bool:
    words = ["tc", "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    return not subprocess.run(words, capture_output=True, check=False).returncode


def command_relay(relay: subprocess.Popen[str], delay: float, rate: float) -> None:
    """Give a relay its delay and rate [s, bytes/s], and wait for its answer. Raises UserError if it has ended."""
    assert relay.stdin and relay.stdout
    answer = ""
    with suppress(BrokenPipeError):
        relay.stdin.write(f"{delay!r} {rate!r}\n")
        relay.stdin.flush()
        answer = relay.stdout.readline()
    if not answer:
        raise UserError(f"the relay between the nodes ended with status {relay.wait()}; what it said stands above")


class LinkedNodes:
    """A number of nodes, each a network namespace with one link to the others. A context manager.

    Attributes:
        names: host names of the nodes.
        kind: what makes the links: `tc netem`, or a relay over TUN devices.

    Raises:
        UserError: something is missing for it.
    """

    def __init__(self, number: int) -> None:
        if fault := missing():
            raise UserError(fault)
        own = os.getpid()
        self.names = [f"node{k}" for k in range(number)]
        self._spaces = [f"mdl-{own}-{k}" for k in range(number)]
        self._bridge, self._devices = f"mdl-{own}-b", [f"mdl{own % 100_000}n{k}" for k in range(number)]
        self._folder = Path(tempfile.mkdtemp(prefix="link-check-"))
        self._relay: subprocess.Popen[str] | None = None
        self._ends: list[int] = []
        self.kind = ""

    def __enter__(self) -> LinkedNodes:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def _make(self) -> None:
        for space in self._spaces:
            _call("ip", "netns", "add", space)
        over_netem = _has_netem(self._spaces[0])
        if over_netem:
            _call("tc", "-n", self._spaces[0], "qdisc", "del", "dev", "lo", "root")
        self.kind = "tc netem" if over_netem else "a relay in user space over TUN devices"
        (self._join_by_bridge if over_netem else self._join_by_relay)()
        for number, space in enumerate(self._spaces):
            device = self._devices[number]
            _call("ip", "-n", space, "addr", "add", f"{_PREFIX}.{number + 1}/24", "dev", device)
            for up in ("lo", device):
                _call("ip", "-n", space, "link", "set", up, "mtu", str(_MTU), "up")
            _call("nsenter", f"--net=/run/netns/{space}", "sysctl", "-q", *(f"{k}={v}" for k, v in _SYSCTLS.items()))
        hosts = ["127.0.0.1 localhost", *(f"{_PREFIX}.{k + 1} {name}" for k, name in enumerate(self.names))]
        (self._folder / "hosts").write_text("\n".join(hosts) + "\n")
        # the way by which mpirun reaches a node: agent NODE COMMAND
        cases = "\n".join(f"{name}) space={space};;" for name, space in zip(self.names, self._spaces, strict=True))
        agent = self._folder / "agent"
        agent.write_text(
            f"#!/bin/sh\nnode=$1\nshift\ncase $node in\n{cases}\nesac\n"
            'exec nsenter --net=/run/netns/"$space" unshare --uts --mount sh -c \''
            f'mount --bind {self._folder}/hosts /etc/hosts && hostname "$0" && exec sh -c "$*"\' "$node" "$@"\n'
        )
        agent.chmod(0o755)

    def _join_by_bridge(self) -> None:
        _call("ip", "link", "add", self._bridge, "mtu", str(_MTU), "type", "bridge")
        _call("ip", "link", "set", self._bridge, "up")
        for space, device in zip(self._spaces, self._devices, strict=True):
            peer = f"{device}b"
            _call("ip", "link", "add", device, "netns", space, "type", "veth", "peer", "name", peer)
            _call("ip", "link", "set", peer, "mtu", str(_MTU), "master", self._bridge, "up")

    def _join_by_relay(self) -> None:
        for space, device in zip(self._spaces, self._devices, strict=True):
            end = os.open("/dev/net/tun", os.O_RDWR)
            self._ends.append(end)
            fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TUN | _IFF_NO_PI))
            _call("ip", "link", "set", device, "netns", space)
        self._relay = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("relay.py")), *map(str, self._ends)],
            pass_fds=self._ends,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for end in self._ends:
            os.close(end)

    def set_links(self, delay: float, rate: float) -> None:
        """Give every link a delay, and what a node sends a rate [s, bytes/s; 0: none set].

        Raises:
            UserError: the links cannot be set, or the relay has ended.
        """
        if self._relay:
            command_relay(self._relay, delay, rate)
            return
        for space, device in zip(self._spaces, self._devices, strict=True):
            words = ["delay", f"{delay * 1e6:.0f}us"] + (["rate", f"{rate * 8:.0f}bit"] if rate else [])
            limit = ["limit", "20000"]  # packets; none is lost
            _call("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "netem", *words, *limit)

    def on(self, name: str) -> list[str]:
        """The words before a program that start it on a node. Its words are read by a shell once more."""
        return [str(self._folder / "agent"), name, "exec"]

    def mpirun(self, ranks: int) -> list[str]:
        """The words before a program that start it as ranks, in turn on the nodes, by Open MPI over TCP.

        Args:
            ranks: number of ranks, the first of them on the first nodes.
        """
        hosts = ",".join(f"{name}:1" for name in self.names[:ranks])
        settings = {
            "plm": "rsh",
            "plm_rsh_agent": str(self._folder / "agent"),
            "btl": "tcp,self",
            "pml": "ob1",
            "btl_tcp_if_include": SUBNET,
            "oob_tcp_if_include": SUBNET,
            # With the default, put, the answer to a request waits behind the whole message that travels the other way,
            # and a link of 100 Mbit/s carries one direction after the other: 1.5 to 2 times the time.
            "btl_tcp_flags": "send,inplace",
        }
        mca = [word for key, value in settings.items() for word in ("--mca", key, value)]
        return [
            str(self._folder / "agent"),
            self.names[0],
            "exec",
            "mpirun",
            "--allow-run-as-root",  # only root can make the nodes
            "--bind-to",
            "none",
            "-np",
            str(ranks),
            "-H",
            hosts,
            *mca,
        ]

    def close(self) -> None:
        """End the relay and remove the namespaces, and with them their devices."""
        if self._relay:
            assert self._relay.stdin
            with suppress(BrokenPipeError):  # it has ended, with words for it left
                self._relay.stdin.close()
            try:
                self._relay.wait(timeout=10)
            except subprocess.TimeoutExpired:  # the namespaces are removed all the same
                self._relay.kill()
        existing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout.split()
        for space in self._spaces:
            if space in existing:
                subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        self.close()
