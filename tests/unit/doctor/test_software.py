"""What a Horovod's build means for a job's device."""

from __future__ import annotations

from megdet_hpc.doctor.software import judge_gradients


def test_a_horovod_without_cuda_is_wrong_for_gpus_and_no_other_attempt_mends_it() -> None:
    found = judge_gradients(("mpi", "gloo"), "cuda")
    assert (found.verdict, found.lasting) == ("wrong", True)
    assert "built without CUDA" in found.detail and "HOROVOD_BUILD=nccl" in found.advice
    slow = judge_gradients(("mpi", "cuda"), "cuda")
    assert slow.verdict == "slow" and "through host memory" in slow.advice
    for built, device in ((("mpi", "cuda", "nccl"), "cuda"), (("mpi",), "cpu")):
        assert judge_gradients(built, device).verdict == "fine"
