"""What the job scripts are and print, without a scheduler."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import environment
from tests.jobs.conftest import JOBS, set_program

MPI = {key: value for key, value in environment().items() if key.startswith("OMPI_")}
MPI |= {"OMPI_MCA_rmaps_base_oversubscribe": "1"}
PARTS = ("pbs_rsh.sh", "node_env.sh")
SCRIPTS = sorted(path for suffix in ("sh", "pbs") for path in JOBS.glob(f"*_*.{suffix}") if path.name not in PARTS)
SCRIPTS += [JOBS / f"{name}.{suffix}" for name in ("doctor", "evaluate", "follow") for suffix in ("sh", "pbs")]
NAMES = [path.name for path in SCRIPTS]


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command outside any job."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PBS", "MEGDET", "VENV"))}
    return subprocess.run(
        [str(word) for word in command], env={**kept, **variables}, capture_output=True, text=True, timeout=60
    )


def dry_run(script: Path, *options: str, **variables: str) -> list[list[str]]:
    """The words of each command that the script would run."""
    shown = run("bash", script, *options, MEGDET_DRY_RUN="1", **variables)
    assert shown.returncode == 0, shown.stderr
    return [shlex.split(line) for line in shown.stdout.splitlines() if not re.match(r"\d{4}-", line)]


@pytest.fixture
def open_mpi(tmp_path: Path) -> dict[str, str]:
    """A PATH whose mpirun says that it is Open MPI's, whatever MPI this environment has."""
    launcher = tmp_path / "open_mpi/mpirun"
    launcher.parent.mkdir()
    launcher.write_text("#!/bin/bash\necho 'mpirun (Open MPI) 4.1.8'\n", encoding="utf-8")
    launcher.chmod(0o755)
    return {"PATH": f"{launcher.parent}:{os.environ['PATH']}"}


def test_both_schedulers_have_each_script() -> None:
    assert len(SCRIPTS) == 14
    assert {path.stem for path in SCRIPTS if path.suffix == ".sh"} == {
        path.stem for path in SCRIPTS if path.suffix == ".pbs"
    }


def test_the_two_scripts_of_a_job_differ_only_above_the_code() -> None:
    code = {path: path.read_text(encoding="utf-8").split("set -euo pipefail", 1)[1] for path in SCRIPTS}
    for path in SCRIPTS:
        assert code[path] == code[path.with_suffix(".pbs")]
    starts = {text.split("begin_job", 1)[0] for text in code.values()}
    assert len(starts) == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_help_is_the_comment_on_top(script: Path) -> None:
    shown = run("bash", script, "--help")
    assert shown.returncode == 0
    assert re.search(rf"(sbatch|qsub).* jobs/{script.name}", shown.stdout)
    for code in ("set -euo", "#SBATCH", "#PBS", "shellcheck"):
        assert code not in shown.stdout


def test_the_command(checkout: Path, open_mpi: dict[str, str]) -> None:
    [words] = dry_run(
        checkout / "jobs/megdet_128gpu.sh",
        *("--solver.epochs", "18", "--norm.kind", "a b"),
        MEGDET_DATA="/data/with blank",
        MEGDET_RUNS="/my runs",
        **open_mpi,
    )
    assert words[0].endswith("mpirun")
    assert words[1:5] == ["-np", "128", "--map-by", "ppr:8:node"]
    train = words[words.index("megdet_hpc.train") :]
    assert train[train.index("--data.train") + 1] == "/data/with blank/train"
    assert train[train.index("--resume") + 1] == "auto"
    assert train[-8:-4] == ["--solver.epochs", "18", "--norm.kind", "a b"]
    assert train[-4:] == ["--output", "/my runs/megdet_128gpu-local", "--resume", "auto"]


def test_ranks_take_their_python_from_an_archive(checkout: Path, open_mpi: dict[str, str]) -> None:
    refused = run("bash", checkout / "jobs/megdet_8gpu.sh", MEGDET_ENV_ARCHIVE="env.sqfs")
    assert refused.returncode == 2 and "no env.sqfs with its .sha256: run tools/pack_env.sh" in refused.stderr
    (checkout / "env.sqfs.sha256").touch()
    shutil.rmtree(checkout / ".venv")  # not needed where the launcher is the site's
    [words] = dry_run(checkout / "jobs/megdet_8gpu.sh", MEGDET_ENV_ARCHIVE="env.sqfs", **open_mpi)
    program = words.index("python")
    assert words[program - 2 : program + 3] == [
        *("bash", str(checkout / "jobs/node_env.sh"), "python", "-m", "megdet_hpc.train")
    ]
    assert words[words.index("MEGDET_ENV_ARCHIVE") - 1] == "-x"


def test_a_folder_named_in_the_options_is_the_runs_folder(checkout: Path) -> None:
    (checkout / "elsewhere/checkpoints").mkdir(parents=True)
    (checkout / "elsewhere/checkpoints/step_00000020.pt").touch()
    options = ("--output", "elsewhere", "--resume", "start.pt")
    [words] = dry_run(checkout / "jobs/megdet_8gpu.sh", *options)
    # in full, since a PBS job starts in the home folder
    assert words[-4:] == ["--output", str(checkout / "elsewhere"), "--resume", "auto"]
    [words] = dry_run(checkout / "jobs/megdet_8gpu.sh", "--config", "mine.yaml")
    assert words.count("--config") == 1
    # a run's own config.yaml says resume: never
    assert words.index("--config") < words.index("--resume") == len(words) - 2
    refused = run("bash", checkout / "jobs/evaluate.sh", MEGDET_OUTPUT="nowhere")
    assert refused.returncode == 2 and f"no checkpoint in {checkout}/nowhere" in refused.stderr
    [words] = dry_run(checkout / "jobs/evaluate.sh", MEGDET_OUTPUT="elsewhere")
    assert words[-2:] == ["--checkpoint", str(checkout / "elsewhere/checkpoints/step_00000020.pt")]
    for run_folder in ("elsewhere", "elsewhere/deferred"):  # the second is that of a job that was submitted again
        [words] = dry_run(checkout / "jobs/follow.sh", "--patience", "5", MEGDET_OUTPUT=run_folder)
        assert words[-4:] == ["--patience", "5", "--follow", str(checkout / "elsewhere")]
    refused = run("bash", checkout / "jobs/follow.sh")
    assert refused.returncode == 2 and "no run to follow: name its folder in MEGDET_OUTPUT" in refused.stderr


def test_the_data_of_a_configuration_file_count(checkout: Path) -> None:
    mine = checkout / "mine.yaml"
    mine.write_text("data:\n  train: /my/train\n")
    for setting in ({"MEGDET_CONFIG": str(mine)}, {}):
        options = [] if setting else ["--config", str(mine)]
        [words] = dry_run(checkout / "jobs/megdet_8gpu.sh", *options, **setting)
        # the later one counts
        assert words.index("--data.train") < words.index("--config") and words.count("--data.train") == 1
    shutil.rmtree(checkout / "packed")
    # not the job's business where a file may name them
    done = run("bash", checkout / "jobs/megdet_8gpu.sh", "--config", str(mine), MEGDET_PREFLIGHT="0", **MPI)
    assert done.returncode == 0, done.stderr
    refused = run("bash", checkout / "jobs/megdet_8gpu.sh", MEGDET_PREFLIGHT="0", **MPI)
    assert refused.returncode == 2 and "no packed data in" in refused.stderr


def test_the_backbone_of_env_sh_reaches_the_ranks(checkout: Path, open_mpi: dict[str, str]) -> None:
    """As a setting, not as an option: each shipped configuration says `auto` or `null`, and would replace an option."""
    settings = checkout / "jobs/env.sh"
    settings.write_text(settings.read_text().replace("${MEGDET_BACKBONE:-}", "${MEGDET_BACKBONE:-/site/resnet50.pth}"))
    [words] = dry_run(checkout / "jobs/megdet_8gpu.sh", **open_mpi)
    assert words[words.index("MEGDET_BACKBONE") - 1] == "-x"
    assert "--model.backbone_weights" not in words


def test_a_site_that_is_not_there_is_named(checkout: Path) -> None:
    refused = run("bash", checkout / "jobs/megdet_8gpu.sh", MEGDET_SITE="ethernett", MEGDET_DRY_RUN="1")
    assert refused.returncode == 2
    assert "MEGDET_SITE is 'ethernett'; accepted: ethernet, infiniband, slingshot, or a path" in refused.stderr
    assert dry_run(checkout / "jobs/megdet_8gpu.sh", MEGDET_SITE="ethernet")


def test_a_modules_shell_code_may_be_careless(checkout: Path) -> None:
    settings = checkout / "jobs/env.sh"
    settings.write_text(f'echo "$surely_not_set"; false; false | true\n{settings.read_text()}')
    assert dry_run(checkout / "jobs/megdet_8gpu.sh")


def test_a_setting_that_is_no_number_is_named(checkout: Path) -> None:
    refused = run("bash", checkout / "jobs/megdet_8gpu.sh", MEGDET_DRY_RUN="1", MEGDET_WALLTIME_MINUTES="8:00")
    assert refused.returncode == 2
    assert "MEGDET_WALLTIME_MINUTES is '8:00'; accepted: a whole number" in refused.stderr


def test_jobs_with_all_gpus_of_a_node_have_it_alone() -> None:
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        if "ngpus=8" in text.split("set -euo", 1)[0]:
            assert re.search(r"^#PBS -l place=(scatter:)?excl$", text, re.MULTILINE), path
        elif "--gpus-per-node=8" in text:
            assert "\n#SBATCH --exclusive\n" in text, path


def test_the_doctor_looks_at_what_is_there(checkout: Path, open_mpi: dict[str, str]) -> None:
    (checkout / "packed/val").rmdir()
    [words] = dry_run(checkout / "jobs/doctor.sh", "--device", "cpu", "--json", "mine.json", **open_mpi)
    assert words[1:5] == ["-np", "128", "--map-by", "ppr:8:node"]
    look = words[words.index("megdet_hpc.doctor") :]
    assert [look[place + 1] for place, word in enumerate(look) if word == "--data"] == [f"{checkout}/packed/train"]
    # the later one counts
    assert look[-4:] == ["--device", "cpu", "--json", "mine.json"]


def test_sizes_of_the_scaling_bench(checkout: Path) -> None:
    *runs, report = dry_run(checkout / "jobs/bench_scaling.sh", MEGDET_BENCH_NODES="1 2 16 32")
    assert [words[2] for words in runs] == ["8", "16", "128", "8", "16"]
    assert [words[-1].split("/")[-1] for words in runs] == ["nodes_1", "nodes_2", "nodes_16", "strong_1", "strong_2"]
    assert [words[words.index("--solver.accumulate") + 1] for words in runs[3:]] == ["16", "8"]
    assert report[1:3] == ["-m", "megdet_hpc.scaling_report"] and "--table" not in report
    *runs, report = dry_run(checkout / "jobs/bench_scaling.sh", MEGDET_BENCH_NODES="1 2", MEGDET_BENCH_STRONG="0")
    assert len(runs) == 2 and report[-1] == "--table"


def test_packing_verifies_both_splits(checkout: Path) -> None:
    commands = dry_run(checkout / "jobs/pack_coco.sh", MEGDET_COCO="/my coco")
    programs = [next(word for word in words if word.startswith("data_prep.")) for words in commands]
    assert programs == ["data_prep.pack_coco", "data_prep.verify_pack"] * 2
    assert "/my coco/annotations/instances_train2017.json" in commands[0]


def test_a_copy_in_the_spool_folder_finds_the_checkout(checkout: Path, tmp_path: Path) -> None:
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    copy.write_bytes((JOBS / "megdet_128gpu.sh").read_bytes())
    for variable in ("SLURM_SUBMIT_DIR", "PBS_O_WORKDIR"):
        [words] = dry_run(copy, **{variable: str(checkout / "jobs")})
        assert str(checkout / "packed/train") in words
    refused = run("bash", copy, SLURM_SUBMIT_DIR=str(tmp_path))
    assert refused.returncode == 2
    assert "set MEGDET_ROOT" in refused.stderr


LAUNCHERS = {
    "mpich": "mpiexec -n 128 -ppn 8 -genvall",
    "srun": "srun --mpi=pmix --nodes=16 --ntasks=128 --ntasks-per-node=8 --cpus-per-task=5 --kill-on-bad-exit=1",
    "pals": "mpiexec -n 128 --ppn 8 --cpu-bind none",
    "flux": "flux run --nodes=16 --ntasks=128 --exclusive",
    "jsrun": "jsrun --nrs 16 --tasks_per_rs 8 --cpu_per_rs ALL_CPUS --gpu_per_rs ALL_GPUS --bind none",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_words_of_each_launcher(checkout: Path, launcher: str, open_mpi: dict[str, str]) -> None:
    settings = {"MEGDET_LAUNCHER": launcher, "MEGDET_LAUNCH_OPTIONS": "--own 1", **open_mpi}
    [words] = dry_run(checkout / "jobs/megdet_128gpu.sh", **settings)
    own = words[: next(place for place, word in enumerate(words) if word.endswith("/python"))]
    assert " ".join(own).replace("mpiexec.hydra", "mpiexec").startswith(LAUNCHERS[launcher])
    assert own[-2:] == ["--own", "1"] and words[len(own) + 1 : len(own) + 3] == ["-m", "megdet_hpc.train"]


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("HYDRA build details:\n    Version: 5.0.2", "mpiexec -n 128 -ppn 8 -genvall"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.17", "mpiexec -n 128 -ppn 8 -genvall"),
        ("mpirun (Open MPI) 4.1.8", "mpirun -np 128 --map-by ppr:8:node --bind-to none"),
    ],
)
def test_the_mpirun_of_another_mpi_gets_its_own_words(checkout: Path, version: str, first: str) -> None:
    launcher = checkout / ".venv/bin/mpirun"
    launcher.write_text(f"#!/bin/bash\necho {shlex.quote(version)}\n", encoding="utf-8")
    launcher.chmod(0o755)
    [words] = dry_run(checkout / "jobs/megdet_128gpu.sh")
    assert " ".join(words).replace("mpiexec.hydra", "mpiexec").startswith(first)
    [words] = dry_run(checkout / "jobs/megdet_128gpu.sh", MEGDET_LAUNCHER="srun")
    assert words[1] == ("--mpi=pmix" if "Open MPI" in version else "--mpi=pmi2")


def test_options_of_srun_replace_those_of_the_same_name(checkout: Path) -> None:
    settings = {"MEGDET_LAUNCHER": "srun", "MEGDET_SRUN_OPTIONS": "--mpi=cray_shasta --cpu-bind map_cpu:1,9"}
    [words] = dry_run(checkout / "jobs/megdet_128gpu.sh", **settings)
    own = words[: next(place for place, word in enumerate(words) if word.endswith("/python"))]
    assert own[-3:] == ["--mpi=cray_shasta", "--cpu-bind", "map_cpu:1,9"] and "--mpi=pmix" not in own
    assert "--cpu-bind=cores" not in own and "--kill-on-bad-exit=1" in own


def test_depth_of_pals_and_torchrun_on_one_node(checkout: Path) -> None:
    [words] = dry_run(checkout / "jobs/megdet_8gpu.sh", MEGDET_LAUNCHER="pals", MEGDET_CORES_PER_RANK="16")
    assert words[:9] == ["mpiexec", "-n", "8", "--ppn", "8", "--depth", "16", "--cpu-bind", "depth"]
    [words] = dry_run(checkout / "jobs/megdet_8gpu.sh", MEGDET_LAUNCHER="torchrun")
    assert words[1:7] == ["-m", "torch.distributed.run", "--no-python", "--nproc-per-node", "8", "--standalone"]
    assert words[8:10] == ["-m", "megdet_hpc.train"]
    refused = run("bash", checkout / "jobs/megdet_128gpu.sh", MEGDET_DRY_RUN="1", MEGDET_LAUNCHER="torchrun")
    assert refused.returncode == 2 and "needs SLURM or PBS (PALS) for 16 nodes" in refused.stderr


def test_torchrun_once_on_each_node_of_a_job(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("p1\np2\n")
    job = {"PBS_JOBID": "7.server", "PBS_NODEFILE": str(tmp_path / "nodes"), "MEGDET_RANKS_PER_NODE": "4"}
    job["MEGDET_WALLTIME_MINUTES"] = "60"
    [words] = dry_run(checkout / "jobs/megdet_8gpu.pbs", MEGDET_LAUNCHER="torchrun", **job)
    assert words[:7] == ["mpiexec", "-n", "2", "--ppn", "1", "--cpu-bind", "none"]
    assert words[words.index("--nproc-per-node") + 1] == "4" and words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--rdzv-endpoint") + 1].startswith("p1:2")
    [words] = dry_run(checkout / "jobs/megdet_8gpu.pbs", MEGDET_LAUNCHER="pals", **job)
    assert words[:5] == ["mpiexec", "-n", "8", "--ppn", "4"]


@pytest.mark.parametrize("site", ["slingshot", "infiniband", "ethernet"])
def test_a_site_file_sets_what_is_not_set(checkout: Path, site: str, open_mpi: dict[str, str]) -> None:
    [words] = dry_run(checkout / "jobs/megdet_8gpu.sh", MEGDET_SITE=site, NCCL_SOCKET_IFNAME="mine", **open_mpi)
    assert any(word.startswith("NCCL_") for word in words) and "NCCL_SOCKET_IFNAME" in words
    shown = run("bash", "-c", f"source {JOBS}/sites/{site}.sh; env", NCCL_SOCKET_IFNAME="mine")
    assert "NCCL_SOCKET_IFNAME=mine" in shown.stdout


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MEGDET_LAUNCHER": "aprun"}, "MEGDET_LAUNCHER is 'aprun'; accepted: mpirun, mpich, srun, torchrun, pals"),
        ({"MEGDET_DATA": "/no/where"}, "no packed data in /no/where/train"),
        ({"VENV": "/no/env"}, "no environment in /no/env"),
    ],
)
def test_a_wrong_setting_is_named(checkout: Path, variables: dict[str, str], said: str) -> None:
    refused = run("bash", checkout / "jobs/megdet_128gpu.sh", **variables)
    assert refused.returncode == 2
    assert said in refused.stderr


def test_a_failing_preflight_starts_no_training(checkout: Path) -> None:
    set_program(checkout, '[[ $2 == megdet_hpc.doctor ]] && { echo "preflight $*"; exit 1; }; echo trained')
    # a launcher that starts one rank here: all words up to the program are its own
    launcher = checkout / ".venv/bin/mpirun"
    launcher.write_text('#!/bin/bash\nwhile (($#)) && [[ $1 != */python ]]; do shift; done\n"$@"\n', encoding="utf-8")
    launcher.chmod(0o755)
    done = run("bash", checkout / "jobs/megdet_8gpu.sh", "--device", "cpu")
    assert done.returncode == 1
    assert "trained" not in done.stdout
    assert "--preflight" in done.stdout and f"--data {checkout}/packed/train" in done.stdout
    assert "--device cpu" in done.stdout
    assert "preflight failed with status 1" in done.stdout
    # the training's own options, to be looked at too
    assert f" -- --data.train {checkout}/packed/train " in done.stdout and "--output " in done.stdout.split(" -- ")[1]
    # what no other attempt would mend, such as a Horovod without CUDA
    set_program(checkout, "[[ $2 == megdet_hpc.doctor ]] && exit 2; echo trained")
    done = run("bash", checkout / "jobs/megdet_8gpu.sh", "--device", "cpu")
    assert done.returncode == 2
    assert "not submitted again" in done.stdout and "trained" not in done.stdout


def test_a_short_jobs_launch_that_hangs_is_ended(checkout: Path) -> None:
    set_program(checkout, "sleep 1000")
    options = ("--checkpoint", "step_00000020.pt")
    done = run("bash", checkout / "jobs/evaluate.sh", *options, MEGDET_LAUNCH_SECONDS="1", **MPI)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no rank reported within 1 s of the evaluate's launch" in done.stdout
    assert not list(checkout.glob("runs/*"))


@pytest.mark.parametrize("launcher", ["mpirun", "mpich", "torchrun"])
def test_a_launchers_daemon_gets_its_whole_node(launcher: str, tmp_path: Path) -> None:
    """Options of the job that give each task its share would narrow the step of one daemon a node."""
    shares = ["SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_EXACT", "SRUN_CPUS_PER_TASK", "SLURM_NTASKS_PER_GPU"]
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node1\n")
    (tmp_path / "scontrol").chmod(0o755)
    words = f"""jobs_folder={JOBS} scheduler=slurm MEGDET_LAUNCHER={launcher} MEGDET_CORES_PER_RANK=5 python=(python)
job_id=1 SLURM_JOB_NODELIST=node1 PATH={tmp_path}:$PATH
fail() {{ echo "$*" >&2; exit 2; }}
setting_names() {{ :; }}
source {JOBS}/launchers.sh
set_launch 16 8
printf '%s\\n' "${{launch[@]}}"
env
"""
    variables = {**os.environ, **dict.fromkeys(shares, "1"), "MASTER_ADDR": "node1"}
    shown = subprocess.run(["bash", "-c", words], env=variables, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert not [line for line in lines if line.split("=")[0] in shares]
    if launcher == "mpirun":  # ssh passes nothing on by itself
        assert lines[lines.index("MASTER_ADDR") - 1] == "-x"
