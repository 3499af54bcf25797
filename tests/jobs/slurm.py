"""A real SLURM of 16 pretend nodes with 8 pretend GPUs each on this host, for the tests of jobs/.

Every slurmd lives in its own UTS and mount namespace, so each node answers with its own host name. Daemons run in
the foreground as children of the tests and are ended by their process ids.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

NUM_NODES = 16
GPUS_PER_NODE = 8
NODES = [f"node{number:02d}" for number in range(1, NUM_NODES + 1)]
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "unshare", "mount")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

SLURM_CONF = """
ClusterName=fake
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=1
NodeName=node[01-16] NodeHostname=node[01-16] NodeAddr=127.0.0.1 Port={first}-{last} Sockets=2 CoresPerSocket=20 \
ThreadsPerCore=1 RealMemory=500000 Gres=gpu:8 Feature=a100,hbm80g State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=7-00:00:00 DefaultTime=01:00:00 State=UP OverSubscribe=NO
"""
GRES_CONF = "AutoDetect=off\nNodeName=node[01-16] Name=gpu File={folder}/dev/gpu[0-7] Flags=nvidia_gpu_env\n"
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"


def missing(folder: Path) -> str:
    """Why SLURM cannot run here, or nothing."""
    absent = [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]
    if absent:
        return f"no {', '.join(absent)}; Debian: apt-get install --no-install-recommends slurm-wlm munge"
    if os.geteuid() != 0:
        return "daemons of pretend nodes need root"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "this machine allows no UTS and mount namespaces (unshare)"
    if subprocess.run(["mknod", str(folder / "probe"), "c", "1", "3"], capture_output=True).returncode:
        return "this machine allows no device files (mknod)"
    return ""


def no_pmix() -> str:
    """Why srun cannot start MPI's ranks here, or nothing."""
    found = glob.glob("/usr/lib/*/pmix*/lib/libpmix.so")
    return "" if found else "srun --mpi=pmix finds no libpmix.so; Debian: apt-get install libpmix-dev"


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring free TCP ports."""
    for first in range(20000 + os.getpid() % 5000, 32000, count):
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


class Slurm:
    """A running cluster; `folder` holds its configuration, logs and state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A client command; its environment is what sbatch hands to the job."""
        return subprocess.run(
            command, env=self.environment(variables), cwd=self.folder, capture_output=True, text=True, timeout=60
        )

    def environment(self, variables: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "OMPI", "PMI"))}
        return {**kept, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf"), **variables}

    def submit(self, *arguments: str, **variables: str) -> str:
        """sbatch; returns the job's id."""
        done = self.run("sbatch", "--parsable", *arguments, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        shown = self.run("scontrol", "-o", "show", "job", job_id)
        assert shown.returncode == 0, shown.stderr
        return dict(re.findall(r"(\w+)=(.*?)(?= \w+=|\s*$)", shown.stdout))

    def wait(self, job_id: str, *states: str, timeout: float) -> dict[str, str]:
        """Wait until the job is in one of the states."""
        until = time.monotonic() + timeout
        while (job := self.job(job_id))["JobState"] not in states:
            assert time.monotonic() < until, f"job {job_id} is {job['JobState']}, not {states} after {timeout} s"
            time.sleep(0.1)
        return job

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        for name in ("log", "state", "spool", "dev", "tmp", "munge", "hosts"):
            (self.folder / name).mkdir()
        port = _free_ports(NUM_NODES + 1)
        values = {
            "folder": self.folder,
            "host": socket.gethostname(),
            "port": port,
            "first": port + 1,
            "last": port + NUM_NODES,
        }
        for name, text in (("slurm", SLURM_CONF), ("gres", GRES_CONF), ("cgroup", CGROUP_CONF)):
            (self.folder / f"{name}.conf").write_text(text.format(**values).lstrip(), encoding="utf-8")
        for gpu in range(GPUS_PER_NODE):
            subprocess.run(["mknod", str(self.folder / f"dev/gpu{gpu}"), "c", "1", "3"], check=True)
        self._start_munge()
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._start_node(node)
        until = time.monotonic() + 200  # 17 daemons start, perhaps on busy cores
        while self.run("sinfo", "--noheader", "--format=%D %t").stdout.strip() != f"{NUM_NODES} idle":
            assert time.monotonic() < until, f"not all nodes are idle; see {self.folder}/log"
            time.sleep(0.1)

    def _daemon(self, *command: str) -> None:
        with (self.folder / "log" / "daemons").open("ab") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.chmod(0o711)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{key}={folder / name}" for key, name in files.items()))
        until = time.monotonic() + 10
        while not (folder / "socket").exists():
            assert time.monotonic() < until, "munged did not start"
            time.sleep(0.05)

    def crash_node(self, node: str) -> None:
        """Kill every process of a node at once, as a power cut would, and boot it again."""
        daemon = self.daemons[1 + 1 + NODES.index(node)]  # after munged and slurmctld
        name = os.readlink(f"/proc/{daemon.pid}/ns/uts")
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(folder / "ns" / "uts") == name:
                    os.kill(int(folder.name), signal.SIGKILL)
        daemon.wait(10)
        self._start_node(node)
        self.daemons[1 + 1 + NODES.index(node)] = self.daemons.pop()

    def _start_node(self, node: str) -> None:
        for name in ("spool", "tmp"):
            (self.folder / name / node).mkdir(exist_ok=True)
        # srun and slurmd bind to the node's own name; mpirun must not take the others for this host
        hosts = self.folder / "hosts" / node
        others = [f"127.0.0.{101 + index} {name}\n" for index, name in enumerate(NODES) if name != node]
        hosts.write_text(f"127.0.0.1 localhost {socket.gethostname()} {node}\n" + "".join(others), encoding="utf-8")
        start = 'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -D -N "$1"'
        isolate = ("unshare", "--uts", "--mount", "--propagation", "private")
        self._daemon(*isolate, "bash", "-c", start, "slurmd", node, str(hosts))

    def stop(self) -> None:
        """End jobs, then daemons."""
        self.run("scancel", "--user=root")
        until = time.monotonic() + 15
        while self.run("squeue", "--noheader").stdout.strip() and time.monotonic() < until:
            time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


@contextmanager
def running(folder: Path) -> Iterator[Slurm]:
    """A cluster under `folder`, ended on the way out."""
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
