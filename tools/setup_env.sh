#!/usr/bin/env bash
# Make the environment of megdet_hpc: a virtual environment with PyTorch, an MPI, mpi4py and Horovod built against
# that MPI, and this package (editable) with its development tools.
#
#   tools/setup_env.sh [--help] [--site] [--dry-run]
#
# --dry-run checks the settings, prints what would be made, and makes nothing. It goes with --site too.
# --site takes the PyTorch, torchvision and MPI of the Python on PATH (a site's modules) as they are. It adds ready packages that
# are missing and compiles nothing. Ranks then need neither Horovod nor mpi4py (docs/running_on_clusters.md).
#
# It needs Python 3.10 or newer with its venv module and headers, a C++20 compiler, make, about 9 GB of disk and
# a package index that pip can reach. It needs no root, no conda and no git. The first run takes about 10 minutes
# on 2 cores, mostly to download PyTorch and to compile Horovod. Built wheels are kept, and a run with nothing to
# do ends in a second. If a run is interrupted, start it again.
#
# Environment variables:
#   PYTHON         interpreter to make the environment from              (python3)
#   VENV           folder of the environment; an active conda environment
#                  is completed in place with VENV="$CONDA_PREFIX"       (.venv in the checkout)
#   MEGDET_CACHE   where built wheels and logs are kept  (${XDG_CACHE_HOME:-$HOME/.cache}/megdet_hpc)
#   MEGDET_MPI     path: the MPI whose mpicxx is on PATH; wheel: PyPI's Open MPI inside the environment;
#                  mpich, impi: PyPI's MPICH or Intel MPI there, with mpi4py and without Horovod;
#                  auto: the MPI that the environment was built with; in a new one path if mpirun and
#                  mpicxx are both on PATH, wheel if mpicxx is not                               (auto)
#   HOROVOD_BUILD  cpu; nccl: gradients between GPUs through NCCL; none: no MPI and no Horovod;
#                  auto: the kind that the environment was built with; in a new one nccl where an NVIDIA
#                  driver is found, else cpu. On a login node without a driver say nccl          (auto)
#   MAKE_JOBS      compile jobs at once           (cores, but one per 2 GB of free memory)
#   CUDA_HOME      toolkit for nccl, of PyTorch's CUDA major version; unset: that of the nvcc on PATH or in
#                  /usr/local/cuda; if none fits, NVIDIA's compiler from PyPI (270 MB, only for the build)
#   HOROVOD_NCCL_HOME  NCCL for nccl, with include/ and lib/   (that of PyTorch's packages)
#   CC, CXX        compilers                      (cc or gcc or clang, and c++ or g++ or clang++)
#
# A build is kept until another kind is named.
#
# Afterwards: source .venv/bin/activate
set -euo pipefail

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
ROOT=$(dirname "$TOOLS")
readonly TOOLS ROOT
# shellcheck source=tools/setup_log.sh
source "$TOOLS/setup_log.sh"
# shellcheck source=tools/setup_checks.sh
source "$TOOLS/setup_checks.sh"
# shellcheck source=tools/setup_mpi.sh
source "$TOOLS/setup_mpi.sh"
# shellcheck source=tools/setup_cuda.sh
source "$TOOLS/setup_cuda.sh"
# shellcheck source=tools/setup_wheels.sh
source "$TOOLS/setup_wheels.sh"
# shellcheck source=tools/setup_site.sh
source "$TOOLS/setup_site.sh"

readonly PIP_QUIET=(--disable-pip-version-check --no-input --progress-bar off)

say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }

fail() {
    printf 'setup_env.sh: %s\n' "$1" >&2
    shift
    if (($#)); then printf '  %s\n' "$@" >&2; fi
    exit 1
}

# pinned NAME: the version that constraints.txt gives.
pinned() {
    local version
    version=$(sed -n "s/^$1==\([^ ;#]*\).*/\1/p" "$ROOT/constraints.txt")
    [[ -n $version ]] || fail "constraints.txt gives no version of $1"
    echo "$version"
}

# installed_version NAME: the version in the environment; nothing where it is not installed.
installed_version() {
    "$ENV_PYTHON" -c 'import importlib.metadata as m, sys
try: print(m.version(sys.argv[1]))
except m.PackageNotFoundError: pass' "$1" 2>/dev/null || true
}

# The stamp: all settings and files that determine the content of the environment.
settings() { printf '%s;' "$ROOT" "$VENV" "$MPI_KIND" "$MPI_BIN" "$HOROVOD_KIND" "$CUDA_ASKED"; }

inputs() {
    {
        "$ENV_PYTHON" -VV
        cat "$ROOT/constraints.txt" "$ROOT"/setup.{cfg,py} "$ROOT/pyproject.toml" "$TOOLS"/setup_*.sh "$TOOLS/patch_horovod.py"
    } | sha256sum
}

up_to_date() {
    local name
    [[ -f $STAMP && -x $ENV_PYTHON && $(<"$STAMP") == "$(settings)"$'\n'"$(inputs)" ]] || return 1
    for name in torch torchvision megdet_hpc; do
        [[ -n $(installed_version "$name") ]] || return 1
    done
    [[ $HOROVOD_KIND == none || -n $(installed_version horovod) ]]
}

# read_settings SITE DRY_RUN: the settings and their defaults; SITE is not empty for --site, DRY_RUN for --dry-run.
read_settings() {
    PYTHON=${PYTHON:-python3}
    VENV=${VENV:-$ROOT/.venv}
    MEGDET_CACHE=${MEGDET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/megdet_hpc}
    MEGDET_MPI=${MEGDET_MPI:-auto}
    HOROVOD_BUILD=${HOROVOD_BUILD:-auto}
    [[ $MEGDET_MPI =~ ^(auto|path|wheel|mpich|impi)$ ]] ||
        fail "MEGDET_MPI is '$MEGDET_MPI', expected auto, path, wheel, mpich or impi."
    [[ $HOROVOD_BUILD =~ ^(auto|cpu|nccl|none)$ ]] ||
        fail "HOROVOD_BUILD is '$HOROVOD_BUILD', expected auto, cpu, nccl or none."
    if [[ -n $2 ]]; then
        LOG=$(mktemp)
        trap 'rm -f "$LOG"' EXIT
    else
        mkdir -p "$MEGDET_CACHE/logs" || fail "cannot write to the cache $MEGDET_CACHE; set MEGDET_CACHE."
        MEGDET_CACHE=$(cd "$MEGDET_CACHE" && pwd -P)
        LOG=$MEGDET_CACHE/logs/setup-$(date +%Y%m%d-%H%M%S)-$$.log
    fi
    [[ $VENV == /* ]] || VENV=$PWD/$VENV
    ENV_PYTHON=$VENV/bin/python
    STAMP=$VENV/.megdet_setup
    # These settings of the calling shell would put other packages before the environment's own. A site's modules add their
    # packages by PYTHONPATH.
    [[ -n $1 ]] || unset PYTHONPATH
    unset PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER
    export PYTHONNOUSERSITE=1
}

make_venv() {
    if [[ -x $ENV_PYTHON ]] && "$ENV_PYTHON" -m pip --version >>"$LOG" 2>&1; then
        "$ENV_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "$VENV holds $("$ENV_PYTHON" -V), 3.10 or newer is needed; delete the folder or set VENV."
        return
    fi
    say "environment: making $VENV"
    logged "make the environment" "$PYTHON" -m "$VENV_MODULE" "$VENV"
}

# install_packages: install what setup.cfg asks for, at the versions of constraints.txt.
install_packages() {
    local wanted
    wanted=$("$ENV_PYTHON" - "$ROOT/setup.cfg" <<'PYTHON'
import configparser, sys
config = configparser.ConfigParser()
config.read(sys.argv[1], encoding="utf-8")
extras = config["options.extras_require"]
print(config["options"]["install_requires"] + extras["fast"] + extras["test"])
PYTHON
    )
    say "packages: PyTorch $(pinned torch), torchvision $(pinned torchvision) and the rest (2 min where not yet there)"
    printf '%s\n' "$wanted" "${BUILD_REQUIREMENTS[@]}" >"$VENV/.megdet_requirements"
    logged "install the packages" "$ENV_PYTHON" -m pip install "${PIP_QUIET[@]}" \
        -c "$ROOT/constraints.txt" -r "$VENV/.megdet_requirements"
    rm -f "$VENV/.megdet_requirements"
}

find_cmake() {
    CMAKE=$(first_of cmake)
    # Horovod needs 3.13 or newer; an older or broken one on PATH is not used.
    if ! "$ENV_PYTHON" -c 'import re, subprocess, sys
text = subprocess.run([sys.argv[1], "--version"], capture_output=True, text=True).stdout
sys.exit([int(part) for part in re.findall(r"\d+", text)[:2]] < [3, 13])' "${CMAKE:-cmake}" 2>/dev/null; then
        logged "install cmake" "$ENV_PYTHON" -m pip install "${PIP_QUIET[@]}" "cmake==$(pinned cmake)"
        CMAKE=$VENV/bin/cmake
    fi
}

build_communication() {
    find_mpi
    say "MPI: $MPI_NAME $MPI_VERSION in $MPI_PREFIX ($MPI_KIND)"
    find_cmake
    install_cached mpi4py "mpi4py$(pinned mpi4py)-$(platform_key)-$(mpi_key)-$(recipe_hash mpi4py)" build_mpi4py
    find_toolkit
    install_cached horovod "$(horovod_key)" build_horovod
    printf '%s\n' "$MPI_KIND" "$MPI_BIN" >"$VENV/.megdet_mpi"
    printf '%s\n' "$CUDA_ASKED" "$HOROVOD_KEY" >"$VENV/.megdet_cuda"
}

horovod_key() {
    echo "horovod$(pinned horovod)-torch$(installed_version torch)-$HOROVOD_KEY-$(platform_key)-$(mpi_key)-$(recipe_hash horovod)"
}

# check_result: check that each part works, with mpirun and without.
check_result() {
    say "check: versions, one rank without mpirun, two ranks with it"
    logged "import the packages" "$ENV_PYTHON" -c 'import torch, torchvision, megdet_hpc; torch.ops.torchvision.nms'
    [[ $HOROVOD_KIND != none ]] || return 0
    local -a ranks_env=(
        "PATH=$MPI_BIN:$VENV/bin:$PATH" OMP_NUM_THREADS=1
        OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
        PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
    )
    logged "run horovodrun --check-build" env "${ranks_env[@]}" "$VENV/bin/horovodrun" --check-build
    if [[ $HOROVOD_KIND == nccl ]]; then
        logged "find NCCL in this Horovod" "$ENV_PYTHON" -c 'import horovod.torch as hvd; assert hvd.nccl_built()'
    fi
    # mpirun may be forbidden on a login node, so only the environment's own has to work here.
    local program="$TOOLS/check_ranks.py"
    if [[ $MPI_KIND == wheel ]]; then
        logged "run one rank" timeout 120 env "${ranks_env[@]}" "$ENV_PYTHON" "$program" 1
        logged "run two ranks" timeout 120 env "${ranks_env[@]}" mpirun -np 2 "$ENV_PYTHON" "$program" 2
    elif ! timeout 120 env "${ranks_env[@]}" mpirun -np 2 "$ENV_PYTHON" "$program" 2 >>"$LOG" 2>&1; then
        say "note: two ranks did not run here ($LOG tells why). Inside an allocation try, with mpirun or the site's" \
            "launcher: mpirun -np 2 $ENV_PYTHON $program 2"
    fi
}

# set_up: all steps, in order.
set_up() {
    local files
    say "log: $LOG"
    : >>"$LOG"
    check_python
    check_disk
    if [[ $HOROVOD_KIND != none ]]; then check_build_tools; fi
    mkdir -p "$VENV"
    if command -v flock >/dev/null; then
        exec 8>"$VENV/.megdet_lock"
        flock -n 8 || {
            say "another set-up is working on $VENV, waiting"
            flock 8
            choose
        }
        if up_to_date; then
            say "up to date: $VENV"
            return
        fi
    fi
    make_venv
    rm -f "$STAMP"
    # computed before the work, so that a file edited during it makes the next run repeat it
    files=$(inputs)
    install_packages
    if is_ready "$MPI_KIND"; then
        install_ready
    elif [[ $HOROVOD_KIND != none ]]; then
        build_communication
    elif [[ ! -f $VENV/.megdet_horovod ]]; then
        echo none >"$VENV/.megdet_horovod"
    fi
    say "megdet_hpc: installing from $ROOT, editable"
    logged "install megdet_hpc" "$ENV_PYTHON" -m pip install "${PIP_QUIET[@]}" --no-deps --no-build-isolation -e "$ROOT"
    check_result
    printf '%s\n' "$(settings)" "$files" >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    local parts
    parts="Python $("$ENV_PYTHON" -c 'import platform; print(platform.python_version())')"
    parts+=", torch $(installed_version torch), torchvision $(installed_version torchvision)"
    if [[ $HOROVOD_KIND != none ]]; then
        parts+=", Horovod $(installed_version horovod) ($HOROVOD_KIND) and mpi4py $(installed_version mpi4py)"
        parts+=" on $MPI_NAME $MPI_VERSION ($MPI_KIND)"
    elif is_ready "$MPI_KIND"; then
        parts+=", mpi4py $(installed_version mpi4py) on $MPI_KIND, no Horovod"
    fi
    say "ready: $parts. Use it with: source $VENV/bin/activate"
}

# choose: decide on MPI and Horovod from the settings, the environment and the machine. Fetches nothing.
choose() {
    choose_horovod
    choose_mpi
}

main() {
    local dry_run="" site=""
    local argument
    for argument; do
        case $argument in
        --dry-run) dry_run=yes ;;
        --site) site=yes ;;
        -h | --help) sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "unknown argument '$argument'; see tools/setup_env.sh --help." ;;
        esac
    done
    read_settings "$site" "$dry_run"
    if [[ -n $site ]]; then
        set_up_site "$dry_run"
        return
    fi
    [[ ! -f $VENV/.megdet_site ]] ||
        fail "$VENV was made by --site: repeat with --site, or name another folder by VENV."
    choose
    if [[ -n $dry_run ]]; then
        say "Horovod: $HOROVOD_KIND; MPI: $MPI_KIND${MPI_BIN:+ ($MPI_BIN)}; environment: $VENV"
        if up_to_date; then say "up to date"; else say "not up to date: a run would work on it"; fi
    elif up_to_date; then
        say "up to date: $VENV"
    else
        set_up
    fi
}

# Both commands are on one line: bash reads a script while it runs it, so an edit during a long run could change it.
main "$@"; exit
