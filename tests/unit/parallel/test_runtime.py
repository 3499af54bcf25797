from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megdet_hpc.errors import MachineError, UserError
from megdet_hpc.parallel.horovod import HorovodRuntime
from megdet_hpc.parallel.launch import note_launched
from megdet_hpc.parallel.launchers import GLOO_LAUNCHER, Launch
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.start import started
from megdet_hpc.parallel.transports import TRANSPORTS

CPU = torch.device("cpu")
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE", "SLURM_STEP_ID")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_process_sends_nothing_whatever_the_transport(transport: str) -> None:
    runtime = Runtime(SerialCommunicator())
    comm = runtime.communicator(transport, CPU)
    assert comm is runtime.world
    value = torch.arange(3.0)
    comm.allreduce_sum_(value, name="test.sum")
    assert value.tolist() == [0.0, 1.0, 2.0]
    assert comm.allgather_tensor(value, name="test.stack").tolist() == [[0.0, 1.0, 2.0]]


def test_an_unknown_transport_is_refused_on_one_process_too() -> None:
    with pytest.raises(UserError, match=r"norm\.transport is 'nccl'; accepted: auto, mpi, horovod, torch"):
        Runtime(SerialCommunicator()).communicator("nccl", CPU)


def test_horovodrun_without_mpi_is_refused_before_anything_starts() -> None:
    from megdet_hpc.parallel.horovod import start_horovod

    with pytest.raises(UserError, match=r"started 128 rank\(s\) without MPI.*horovodrun --mpi -np 128"):
        start_horovod(Launch(GLOO_LAUNCHER, 128, 0), 10)


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in LAUNCHER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with started() as runtime:
        assert (runtime.world.size, runtime.world.transport) == (1, "serial")


def test_the_first_rank_says_that_all_have_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in LAUNCHER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MEGDET_LAUNCH_FILE", str(tmp_path / "launched"))
    note_launched({"MEGDET_LAUNCH_FILE": str(tmp_path / "launched"), "PMI_SIZE": "2", "PMI_RANK": "1"})
    assert not (tmp_path / "launched").exists()
    with started():
        assert (tmp_path / "launched").exists()


@pytest.mark.parametrize(("error", "status"), [(UserError, 2), (MachineError, 1)])
def test_a_machines_fault_is_one_line_and_worth_another_attempt(
    error: type[UserError],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for variable in LAUNCHER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MEGDET_STATUS_FILE", str(tmp_path / "status"))
    with pytest.raises(SystemExit) as ended, started():
        raise error("shard-00001.h5: cannot be read")
    assert ended.value.code == status and (tmp_path / "status").read_text() == f"{status}\n"
    assert capfd.readouterr().err == "megdet_hpc: error: shard-00001.h5: cannot be read\n"


def test_one_process_loads_neither_mpi_nor_horovod() -> None:
    program = (
        "import sys, torch\n"
        "from megdet_hpc.parallel.start import started\n"
        "with started() as runtime:\n"
        "    runtime.communicator('horovod', torch.device('cpu'))\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'horovod', 'mpi4py'}))\n"
    )
    environ = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_ranks_that_share_a_gpu_send_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL refuses two ranks on a GPU; the world of the launcher carries tensors of GPUs through host memory."""

    class World(SerialCommunicator):
        transport, size = "mpi", 2

    runtime = HorovodRuntime(World(), local_size=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert runtime.device("cuda_shared") == torch.device("cuda", 0)
    assert runtime.communicator("auto", torch.device("cuda", 0)) is runtime.world
    with pytest.raises(UserError, match="'torch', which ranks that share a GPU cannot use; accepted here: auto, mpi"):
        runtime.communicator("torch", torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"cuda_shared needs --solver\.gradients mpi or torch"):
        runtime.distribute(torch.optim.SGD([torch.zeros(1)], lr=1.0), torch.nn.Linear(1, 1), 1)
    with pytest.raises(UserError, match="runs 2 ranks and shows 0 GPU"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        runtime.device("cuda_shared")
