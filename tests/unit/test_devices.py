"""The table of kinds of devices; no GPU is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megdet_hpc import devices
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.runtime import Runtime, device_type
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.transports import gpu_build_fault, resolve_transport


@pytest.mark.parametrize("kind", [devices.kind_of(name) for name in devices.GPU_TYPES], ids=devices.GPU_TYPES)
def test_torch_has_the_functions_that_are_asked_of_a_kind(kind: devices.Kind) -> None:
    asked = ("device_count", "set_device", "current_device", "current_stream", "synchronize", "Event")
    asked += ("get_device_properties", "get_device_name", "max_memory_allocated", "reset_peak_memory_stats")
    assert [name for name in asked if not callable(getattr(kind.module, name, None))] == []
    assert kind.type in torch.distributed.Backend.backend_capability[kind.backend]
    assert torch.device(kind.type).type == kind.type


def test_choices_and_what_they_mean() -> None:
    assert devices.DEVICES == ("auto", "cpu", "xpu", "cuda")
    assert [devices.is_gpu(name) for name in ("cpu", "cuda", "xpu", "meta")] == [False, True, True, False]
    assert devices.is_gpu(torch.device("xpu", 1)) and not devices.is_gpu(torch.device("cpu"))
    assert [resolve_transport("auto", name) for name in ("cpu", "cuda", "xpu")] == ["mpi", "torch", "torch"]
    assert "no part for this rank's device (xpu)" in str(gpu_build_fault("xpu", ("mpi", "nccl", "cuda")))
    assert device_type("cuda_shared") == "cuda" and device_type("xpu") == "xpu"
    with pytest.raises(KeyError):
        devices.kind_of("tpu")


def test_auto_is_the_first_kind_of_which_there_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for numbers, expected in (((0, 0), "cpu"), ((0, 2), "xpu"), ((1, 2), "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=numbers[0]: n)
        monkeypatch.setattr(torch.xpu, "device_count", lambda n=numbers[1]: n)
        assert devices.found_type() == device_type("auto") == expected


@pytest.mark.parametrize("kind", devices.GPU_TYPES)
def test_a_kind_of_which_there_is_none_is_refused(kind: str) -> None:
    if devices.kind_of(kind).count():
        pytest.skip(f"this host shows a {kind}")
    with pytest.raises(UserError, match=rf"device {kind}: .* shows 0 GPU\(s\)"):
        Runtime(SerialCommunicator()).device(kind)


def test_the_table_is_read_without_torch() -> None:
    """The doctor's guard starts before torch is loaded, which may take minutes."""
    program = "import sys, megdet_hpc.devices, megdet_hpc.doctor.__main__\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr
