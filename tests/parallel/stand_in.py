"""A stand-in for a launcher that cannot run here: `stand_in.py NAME WORDS...` starts the ranks of its words.

It sets the variables that the real launcher sets, and no others of a launcher. NAME is one of

- mpiexec: HPE's PALS, as flux-core's plugin pmi-cray-pals imitates it and ALCF's programs read it;
- flux: flux-core's job shell, with PMI-1 as by default;
- jsrun: LSF's JSM, with the variables of its Spectrum MPI, which is an Open MPI.

Like them it ends the other ranks once one has failed, and hands its status on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

Variables = dict[str, object]
JOB = "4711"


def of_pals(rank: int, size: int) -> Variables:
    pals = {"RANKID": rank, "LOCAL_RANKID": rank, "LOCAL_SIZE": size, "NODEID": 0, "DEPTH": 1, "APID": f"apid-{JOB}"}
    pmi = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size, "JOBID": JOB, "CONTROL_PORT": "10000"}
    return {f"PALS_{key}": value for key, value in pals.items()} | {f"PMI_{key}": value for key, value in pmi.items()}


def of_flux(rank: int, size: int) -> Variables:
    flux = {"JOB_ID": JOB, "JOB_SIZE": size, "JOB_NNODES": 1, "TASK_RANK": rank, "TASK_LOCAL_ID": rank}
    return {f"FLUX_{key}": value for key, value in flux.items()} | {"PMI_RANK": rank, "PMI_SIZE": size, "PMI_FD": 9}


def of_jsrun(rank: int, size: int) -> Variables:
    numbers = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size}
    both = {f"{name}_{key}": value for name in ("JSM_NAMESPACE", "OMPI_COMM_WORLD") for key, value in numbers.items()}
    return {**both, "PMIX_RANK": rank, "PMIX_NAMESPACE": JOB, "LSB_JOBID": JOB}


def parse(name: str, words: list[str]) -> tuple[int, list[str], Callable[[int, int], Variables]]:
    """The number of ranks, the program and the variables; an option that the launcher lacks is an error."""
    parser = argparse.ArgumentParser(prog=name, allow_abbrev=False)
    if name == "mpiexec":
        parser.add_argument("-n", type=int, dest="ranks")
        for option in ("--ppn", "--depth", "--cpu-bind"):
            parser.add_argument(option)
        variables = of_pals
    elif name == "flux":
        assert words.pop(0) == "run"
        parser.add_argument("--nodes")
        parser.add_argument("--ntasks", type=int, dest="ranks")
        parser.add_argument("--exclusive", action="store_true")
        variables = of_flux
    else:
        parser.add_argument("--nrs", type=int, default=1)
        parser.add_argument("--tasks_per_rs", type=int, dest="ranks")
        for option in ("--cpu_per_rs", "--gpu_per_rs", "--bind"):
            parser.add_argument(option)
        variables = of_jsrun
    parser.add_argument("program", nargs=argparse.REMAINDER)
    found = parser.parse_args(words)
    return found.ranks, found.program, variables


def main(name: str, words: list[str]) -> int:
    """Start the ranks and wait for them; the status of the first that failed, else 0."""
    size, program, variables = parse(name, words)
    ranks = [
        subprocess.Popen(program, env={**os.environ, **{k: str(v) for k, v in variables(rank, size).items()}})
        for rank in range(size)
    ]
    failed = 0
    while not failed and any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
        failed = next((rank.returncode for rank in ranks if rank.poll()), 0)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()  # its status counts no more
        rank.wait()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
