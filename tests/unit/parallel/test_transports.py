"""Which library carries which message, as a table written by hand."""

from __future__ import annotations

import pytest

from megdet_hpc.parallel.transports import (
    CARRIERS,
    Overlap,
    gpu_build_fault,
    hides_gradients,
    horovod_cycle_ms,
    resolve_transport,
)


def test_auto_depends_on_the_device_and_a_name_does_not() -> None:
    assert [resolve_transport("auto", device) for device in ("cpu", "cuda")] == ["mpi", "torch"]
    for transport in CARRIERS:
        assert [resolve_transport(transport, device) for device in ("cpu", "cuda")] == [transport] * 2


@pytest.mark.parametrize(
    ("device", "transport", "layers", "nccl", "hidden"),
    [
        ("cuda", "auto", True, True, False),
        ("cuda", "torch", True, True, False),
        ("cuda", "mpi", True, True, True),
        ("cuda", "horovod", True, True, True),  # one thread starts both
        ("cuda", "auto", False, True, True),  # norm.kind gn, or a BN group of one rank
        ("cuda", "auto", True, False, True),  # gradients over MPI
        ("cpu", "auto", True, False, True),
        ("cpu", "torch", True, True, True),  # gloo
    ],
)
def test_two_nccl_communicators_are_kept_apart(
    device: str, transport: str, layers: bool, nccl: bool, hidden: bool
) -> None:
    def hides(choice: Overlap) -> bool:
        return hides_gradients(
            choice, device_type=device, transport=transport, layers_send=layers, gradients_over_nccl=nccl
        )

    assert hides("auto") is hidden
    assert (hides(True), hides(False)) == (True, False)


@pytest.mark.parametrize(
    ("device", "transport", "milliseconds"),
    [
        ("cpu", "auto", 10),
        ("cpu", "mpi", 10),
        ("cpu", "torch", 10),
        ("cpu", "horovod", 1),
        ("cuda", "auto", 1),
        ("cuda", "torch", 1),
        ("cuda", "mpi", 10),
        ("cuda", "horovod", 1),
    ],
)
def test_horovods_cycle_is_long_where_mpi_or_the_core_is_needed(device: str, transport: str, milliseconds: int) -> None:
    assert horovod_cycle_ms(transport, device) == milliseconds


def test_a_horovod_without_cuda_is_no_use_on_a_gpu() -> None:
    fault = gpu_build_fault("cuda", ("mpi", "gloo"))
    assert fault == "this Horovod was built without CUDA (it has mpi, gloo), and this rank's tensors are on a GPU"
    for device, built in (("cpu", ("mpi",)), ("cuda", ("mpi", "cuda")), ("cuda", ("mpi", "nccl", "rocm"))):
        assert gpu_build_fault(device, built) is None
