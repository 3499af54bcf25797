"""Render and submit a job: `python -m megdet_hpc.submit --scheduler slurm --config ... --ranks 128 --walltime 8:00`.

The script holds directives, the site's own lines and the options. The steps of the job are in jobs/common.sh, as for
the scripts in jobs/.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write
from megdet_hpc.plan.job_plan import JobPlan, Nodes
from megdet_hpc.plan.options import checked_plan, rank_options, refuse, training_arguments
from megdet_hpc.plan.risks import warnings_of

DESCRIPTION = """Render a job script from a configuration, ranks, walltime and a site's profile, and submit it.

It refuses what python -m megdet_hpc.plan refuses, with status 2, before anything is queued."""

_SUFFIX = {"slurm": ".sh", "pbs": ".pbs"}
_COMMAND = {"slurm": "sbatch", "pbs": "qsub"}
_LENIENT = ["# shell code of a site may fail with these options", "set +euo pipefail"]
_STRICT = "set -euo pipefail"
# Time that a job keeps to save its state, as in MEGDET_MARGIN_MINUTES (jobs/env.sh) and --signal below [minutes].
_LEAST_MINUTES = {"slurm": 5, "pbs": 10}
_ONE_WORD = ("queue", "account", "qos", "constraint", "gpu_request", "select", "place", "filesystems")
# The keys that one scheduler alone has.
_OF_ONE = {"slurm": ("qos", "constraint"), "pbs": ("select", "place", "filesystems")}
_USUAL_CORES_PER_RANK = 5  # four loader processes and the rank itself


@dataclass(frozen=True)
class Profile:
    """Keys of a site's YAML file. All are optional."""

    queue: str | None = None
    """Partition of SLURM or queue of PBS."""
    account: str | None = None
    """Account to which the job's time is charged."""
    gpus_per_node: int | None = None
    """GPUs of a node; also its ranks if neither --nodes nor --ranks-per-node is given [GPUs]."""
    cores_per_node: int | None = None
    """Cores of a node, shared out among its ranks; default: 5 a rank [cores]."""
    modules: tuple[str, ...] = ()
    """Environment modules, loaded in this order after `module purge`."""
    env_sh: str | None = None
    """Shell file that is sourced before jobs/env.sh. It may set the values of that file."""
    qos: str | None = None
    """Quality of service of SLURM."""
    constraint: str | None = None
    """Features that nodes must have, for SLURM, such as `a100&nvlink`."""
    gpu_request: str | None = None
    """How the job asks for a node's GPUs, with {n} for their number; "" where the site takes no request. The default is
    SLURM's --gpus-per-node={n}, others are --gres=gpu:a100:{n} and --gpus-per-task=1; in a PBS select ngpus={n}."""
    select: str | None = None
    """Further resources of each chunk of a PBS select, such as system=polaris."""
    place: str | None = None
    """How PBS places the chunks: scatter:excl by default."""
    filesystems: str | None = None
    """File systems that a PBS job needs, as `-l filesystems=` takes them, such as home:eagle."""
    directives: tuple[str, ...] = ()
    """More directives, without #SBATCH or #PBS, such as `--mem=400G`. They come last, so they replace earlier ones."""


def read_profile(path: Path | None) -> Profile:
    """A site's profile; the defaults if no file is given.

    Raises:
        UserError: no such file, no YAML mapping, an unknown key, or a value of another kind.
    """
    if path is None:
        return Profile()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--profile {path}: cannot be read ({' '.join(str(error).split())})") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"--profile {path}: accepted: a mapping of {_profile_keys()}")
    return Profile(**{key: _profile_value(path, key, value) for key, value in values.items()})


def check_profile(profile: Profile, scheduler: str) -> None:
    """Check that a profile has no key of the other scheduler.

    Raises:
        UserError: it has one.
    """
    other = "pbs" if scheduler == "slurm" else "slurm"
    if wrong := [key for key in _OF_ONE[other] if getattr(profile, key)]:
        raise UserError(f"--profile: {wrong[0]} is a key for {other}, and --scheduler is {scheduler}")


def _profile_keys() -> str:
    return ", ".join(field.name for field in fields(Profile))


def _profile_value(path: Path, key: Any, value: Any) -> Any:
    kinds: dict[str, Any] = {"gpus_per_node": int, "cores_per_node": int, "modules": list, "directives": list}
    if key not in [field.name for field in fields(Profile)]:
        raise UserError(f"--profile {path}: unknown key {key!r}; accepted: {_profile_keys()}")
    kind = kinds.get(key, str)
    if value is None:
        return () if kind is list else None
    if type(value) is not kind or (kind is int and value < 1):
        accepted = "a number of 1 or more" if kind is int else "a list of strings" if kind is list else "a string"
        raise UserError(f"--profile {path}: {key} is {value!r}; accepted: {accepted}")
    texts = value if kind is list else [value]
    if key == "gpu_request" and not value:
        return value
    for text in texts:
        if kind is list and not isinstance(text, str):
            raise UserError(f"--profile {path}: {key} holds {text!r}; accepted: strings")
        _one_line(f"--profile {path}: {key}", str(text))
    if key in _ONE_WORD and " " in value:
        raise UserError(f"--profile {path}: {key} is {value!r}; accepted: one word")
    if key == "env_sh" and not Path(value).expanduser().is_file():
        raise UserError(f"--profile {path}: env_sh {value} is no file")
    return tuple(value) if kind is list else value


def _one_line(what: str, text: str) -> str:
    if not text or not text.isprintable():
        raise UserError(f"{what} is {text!r}; accepted: one line of printable characters")
    return text


def walltime_of(text: str, scheduler: str) -> tuple[int, int]:
    """Hours and minutes of H:MM.

    Raises:
        UserError: another form, or no longer than the time that a job keeps to save its state.
    """
    match = re.fullmatch(r"(\d{1,4}):([0-5]\d)", text)
    if not match:
        raise UserError(f"--walltime {text}; accepted: H:MM, such as 8:00")
    hours, minutes = int(match[1]), int(match[2])
    if 60 * hours + minutes <= (least := _LEAST_MINUTES[scheduler]):
        raise UserError(f"--walltime {text}; accepted: over 0:{least:02d}, which a job keeps to save its state")
    return hours, minutes


@dataclass(frozen=True)
class JobHome:
    """The folder in which a job runs, and the folder of the files that its script sources."""

    root: Path
    """The checkout, or with an installed package a folder of the user. All nodes must see it."""
    jobs: Path
    """jobs/ of the checkout or of the package."""

    def lines(self) -> list[str]:
        """The lines of a job script that find both folders."""
        lines = [f"root=${{MEGDET_ROOT:-{_in_braces(str(self.root))}}}"]
        if self.jobs == self.root / "jobs":
            return [*lines, "# shellcheck source=/dev/null", 'source "$root/jobs/common.sh"']
        lines += [f"export VENV=${{VENV:-{_in_braces(sys.prefix)}}}", "# shellcheck source=/dev/null"]
        return [*lines, f"source {shlex.quote(str(self.jobs / 'common.sh'))}"]


def find_home(asked: Path | None) -> JobHome:
    """The home of a job: a checkout, or a folder for jobs of the installed package.

    Args:
        asked: --root; None: the checkout of this package, or the current folder if the package is installed.

    Raises:
        UserError: there is no such folder, or neither the folder nor the package has the files.
    """
    package = Path(__file__).resolve().parent
    checkout = (asked or package.parent).resolve()
    if (checkout / "jobs" / "common.sh").is_file():
        return JobHome(checkout, checkout / "jobs")
    root, jobs = (asked or Path()).resolve(), package / "jobs"
    if not (jobs / "common.sh").is_file():
        raise UserError(f"no jobs/common.sh in {checkout}; name with --root a checkout that all nodes see")
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder")
    return JobHome(root, jobs)


def render(
    scheduler: str,
    name: str,
    nodes: Nodes,
    walltime: tuple[int, int],
    profile: Profile,
    home: JobHome,
    script: Path | None,
    arguments: list[str],
) -> str:
    """The text of a job script.

    Args:
        scheduler: slurm or pbs.
        name: name of the job, of letters, digits, `_`, `-` and `.`.
        nodes: ranks and where they run.
        walltime: hours and minutes.
        profile: profile of the site.
        home: folders of the job.
        script: path at which the text will be stored, or None. A PBS job needs it to submit itself again.
        arguments: command line of megdet_hpc.train.
    """
    per_rank = (
        max(profile.cores_per_node // nodes.ranks_per_node, 1) if profile.cores_per_node else _USUAL_CORES_PER_RANK
    )
    directives = (_slurm if scheduler == "slurm" else _pbs)(name, nodes, walltime, profile, per_rank)
    lines = [
        "#!/usr/bin/env bash",
        *directives,
        "",
        f"# {nodes.num_ranks} ranks on {nodes.num_nodes} node(s), rendered by",
    ]
    lines += [
        "# python -m megdet_hpc.submit; the steps of the job are in jobs/common.sh.",
        "set -euo pipefail",
        "",
    ]
    if profile.modules:
        lines += [*_LENIENT, "module purge"]
        lines += [f"module load {shlex.quote(module)} || exit 2" for module in profile.modules]
        lines += [_STRICT, ""]
    if profile.env_sh:
        env = shlex.quote(str(Path(profile.env_sh).expanduser().resolve()))
        lines += [*_LENIENT, "# shellcheck source=/dev/null", f"source {env}", _STRICT, ""]
    lines += [*home.lines(), ""]
    words = " ".join(map(shlex.quote, arguments))
    lines += [f'begin_job {name} {nodes.num_nodes} {nodes.ranks_per_node} {words} "$@"']
    if scheduler == "pbs" and script:
        # a PBS job submits jobs/$job_script.pbs again, so this is the path from jobs/ to the script
        again = os.path.relpath(script.with_suffix(""), home.jobs)
        lines += ["# shellcheck disable=SC2034 # read by jobs/restart.sh", f"job_script={shlex.quote(again)}"]
    # the options name the configuration, so the job needs no default
    lines += ["train_until_done none", ""]
    return "\n".join(lines)


def _in_braces(text: str) -> str:
    """A word as the default in ${NAME:-...}, quoted because it may hold blanks and braces."""
    return '"' + re.sub(r'([\\"$`])', r"\\\1", text) + '"'


def _slurm(name: str, nodes: Nodes, walltime: tuple[int, int], profile: Profile, cores_per_rank: int) -> list[str]:
    options = [
        f"--job-name={name}",
        f"--nodes={nodes.num_nodes}",
        f"--ntasks-per-node={nodes.ranks_per_node}",
        *_gpus(profile, "--gpus-per-node={n}", nodes.ranks_per_node),
        f"--cpus-per-task={cores_per_rank}",
        "--mem=0",
        "--exclusive",
        f"--time={walltime[0]:02d}:{walltime[1]:02d}:00",
        "--requeue",
        f"--signal=B:USR1@{60 * _LEAST_MINUTES['slurm']}",
        "--output=%x-%j.out",
        "--open-mode=append",
    ]
    options += [f"--partition={profile.queue}"] if profile.queue else []
    options += [f"--account={profile.account}"] if profile.account else []
    options += [f"--qos={profile.qos}"] if profile.qos else []
    options += [f"--constraint={profile.constraint}"] if profile.constraint else []
    return [f"#SBATCH {option}" for option in [*options, *profile.directives]]


def _gpus(profile: Profile, usual: str, number: int) -> list[str]:
    """The request for a node's GPUs; empty where the site takes none."""
    asked = usual if profile.gpu_request is None else profile.gpu_request
    return [asked.replace("{n}", str(number))] if asked else []


def _pbs(name: str, nodes: Nodes, walltime: tuple[int, int], profile: Profile, cores_per_rank: int) -> list[str]:
    ranks = nodes.ranks_per_node
    chunk = [f"ncpus={cores_per_rank * ranks}", f"mpiprocs={ranks}", *_gpus(profile, "ngpus={n}", ranks)]
    chunk += [profile.select] if profile.select else []
    options = [
        f"-N {name}",
        f"-l select={nodes.num_nodes}:{':'.join(chunk)}",
        f"-l place={profile.place or 'scatter:excl'}",
        f"-l walltime={walltime[0]:02d}:{walltime[1]:02d}:00",
        "-r y",
        "-j oe",
    ]
    options += [f"-q {profile.queue}"] if profile.queue else []
    options += [f"-A {profile.account}"] if profile.account else []
    options += [f"-l filesystems={profile.filesystems}"] if profile.filesystems else []
    return [f"#PBS {option}" for option in [*options, *profile.directives]]


def _parser() -> argparse.ArgumentParser:
    parser = rank_options("megdet_hpc.submit", DESCRIPTION)
    parser.add_argument("--scheduler", choices=list(_SUFFIX), required=True)
    parser.add_argument(
        "--walltime", required=True, metavar="H:MM", help="length of one job; a longer run continues in the next job"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help=f"YAML file of the site; its keys: {_profile_keys()}"
    )
    parser.add_argument("--job-name", help="default: the configuration's name and the ranks")
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder of the job, which all nodes must see: a checkout, or with an installed package any folder; "
        "default: the checkout of this package, or the current folder",
    )
    parser.add_argument("--script", type=Path, metavar="FILE", help="default: runs/submitted/NAME below --root")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the script without writing or submitting it; refuses what a submission refuses",
    )
    return parser


def _absolute_configs(options: argparse.Namespace) -> None:
    """Make paths of configurations absolute, since jobs run in --root. Shipped ones keep their names."""
    options.config = [str(Path(name).resolve()) if Path(name).is_file() else name for name in options.config]


def _check_folders(plan: JobPlan, root: Path) -> None:
    """Refuse data that this command finds in the current folder and the job would look for in another.

    Raises:
        UserError: a relative path of data means two folders.
    """
    for key, value in (("data.train", plan.config.data.train), ("data.val", plan.config.data.val)):
        if value is None:
            continue
        here, there = Path(value), root / value
        if here.is_dir() and not (there.is_dir() and there.samefile(here)):
            raise UserError(f"{key} {value}: is in the current folder, and the job runs in {root}; give its full path")


def _check_script(script: Path, text: str) -> None:
    """Check that a script can be stored. One of the same name with another content may belong to a running job.

    Raises:
        UserError: such a script is there, the path is no file, or it cannot be written.
    """
    if script.exists() and not script.is_file():
        raise UserError(f"--script {script}: is no file")
    if script.exists() and script.read_bytes() != text.encode():
        raise UserError(f"{script} exists with another content; name another --script or --job-name")
    folder = next(parent for parent in script.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"--script {script}: cannot be written ({folder} is no folder, or this user may not write to it)"
        )


def _store(script: Path, text: str) -> None:
    """Write a script that `_check_script` has passed.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_write(script) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"--script {script}: cannot be written ({error.strerror})") from error


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = _parser()
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    scheduler = options.scheduler
    try:
        profile, walltime = read_profile(options.profile), walltime_of(options.walltime, scheduler)
        check_profile(profile, scheduler)
        _absolute_configs(options)
        if options.nodes is None and options.ranks_per_node is None and profile.gpus_per_node:
            options.ranks_per_node = min(profile.gpus_per_node, options.ranks)
        plan = checked_plan("megdet_hpc.submit", options, rest)
        if profile.gpus_per_node and plan.nodes.ranks_per_node > profile.gpus_per_node:
            raise UserError(
                f"{plan.nodes.ranks_per_node} ranks per node on {profile.gpus_per_node} GPUs per node; "
                "accepted: as many or fewer"
            )
        words = [_one_line("an option", word) for word in training_arguments(options, rest)]
        name = options.job_name or f"{Path(options.config[-1]).stem}-{options.ranks}"
        if not re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII):
            raise UserError(f"--job-name {name!r}; accepted: a letter, then letters, digits, '_', '-', '.'")
        home = find_home(options.root)
        root = home.root
        _check_folders(plan, root)
        script = options.script or root / "runs" / "submitted" / f"{name}{_SUFFIX[scheduler]}"
        script = script.resolve()
        if script.suffix != _SUFFIX[scheduler]:
            raise UserError(f"--script {script}; accepted for {scheduler}: a name that ends in {_SUFFIX[scheduler]}")
        for path in (root, home.jobs, script):
            _one_line("a path", str(path))
        text = render(scheduler, name, plan.nodes, walltime, profile, home, script, words)
        _check_script(script, text)
        for warning in warnings_of(plan):
            print(f"warning: {warning}", file=sys.stderr)
        if options.dry_run:
            print(text, end="")
            return
        _store(script, text)
        print(f"wrote {script}", flush=True)
        done = subprocess.run([_COMMAND[scheduler], str(script)], cwd=root)
    except FileNotFoundError:
        refuse(parser, UserError(f"{_COMMAND[scheduler]} is not on PATH: submit from a login node, or use --dry-run"))
    except UserError as error:
        refuse(parser, error)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
