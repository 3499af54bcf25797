"""What a Horovod's build means for a job's device, and what the two libraries at once showed."""

from __future__ import annotations

import math

from megdet_hpc.doctor.overlap import judge_overlap
from megdet_hpc.doctor.software import judge_gradients


def test_a_horovod_without_cuda_is_wrong_for_gpus_and_no_other_attempt_mends_it() -> None:
    found = judge_gradients(("mpi", "gloo"), "cuda")
    assert (found.verdict, found.lasting) == ("wrong", True)
    assert "built without CUDA" in found.detail and "HOROVOD_BUILD=nccl" in found.advice
    slow = judge_gradients(("mpi", "cuda"), "cuda")
    assert slow.verdict == "slow" and "through host memory" in slow.advice
    for built, device in ((("mpi", "cuda", "nccl"), "cuda"), (("mpi",), "cpu")):
        assert judge_gradients(built, device).verdict == "fine"


def test_gradients_that_change_where_both_libraries_send_are_wrong() -> None:
    fine = judge_overlap("torch", 200, [(1e-7, 0.010, 0.030), (0.0, 0.012, 0.020)])
    assert fine.verdict == "fine"
    assert fine.detail.startswith("200 backward passes with Horovod's gradients at once: 12 ms each, 30 ms with")
    for error in (0.5, math.nan):
        found = judge_overlap("torch", 200, [(0.0, 0.01, 0.01), (error, 0.01, 0.01)])
        assert found.verdict == "wrong" and "first on rank 1" in found.detail
        assert "solver.overlap at false" in found.advice
