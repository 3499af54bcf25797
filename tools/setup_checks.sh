# shellcheck shell=bash
# Checks that the machine has what the installation needs. Sourced by setup_env.sh; uses its fail and say.
# Each failure names the missing piece and the ways to get it, with root and without.
# shellcheck disable=SC2034  # what is set here is read in the other parts

# Disk for a CUDA build of PyTorch with its libraries, for the other packages, and for unpacking and building.
readonly DISK_NEEDED_GB=9
# Memory of one compile job of Horovod with PyTorch's headers.
readonly JOB_MEMORY_GB=2

# check_python: $PYTHON is 3.10 or newer and can make virtual environments (VENV_MODULE: venv or virtualenv).
check_python() {
    command -v "$PYTHON" >/dev/null ||
        fail "no Python found as '$PYTHON'." \
            "With root: apt-get install python3 python3-venv python3-dev." \
            "Without: set PYTHON to an interpreter of conda, uv or pyenv."
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$PYTHON" -V 2>&1) at $(command -v "$PYTHON") is too old, 3.10 or newer is needed." \
            "Set PYTHON to a newer one, such as PYTHON=python3.11."
    if "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
        VENV_MODULE=venv
    elif "$PYTHON" -c 'import virtualenv' 2>/dev/null; then
        VENV_MODULE=virtualenv
    elif [[ -x $ENV_PYTHON ]] && "$ENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        VENV_MODULE=none
    else
        fail "'$PYTHON' cannot make virtual environments: its venv or ensurepip module is missing." \
            "With root: apt-get install python3-venv." \
            "Without: set PYTHON to an interpreter of conda, uv or pyenv, or install virtualenv for this one."
    fi
}

# check_build_tools: the tools that compile mpi4py and Horovod. Sets CC, CXX and MAKE_JOBS.
check_build_tools() {
    local include scratch
    include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [[ -f $include/Python.h ]] ||
        fail "Python.h is missing (looked in $include), extensions cannot be compiled." \
            "With root: apt-get install python3-dev." \
            "Without: set PYTHON to an interpreter of conda, uv or pyenv, which bring it."
    CC=${CC:-$(first_of cc gcc clang)}
    CXX=${CXX:-$(first_of c++ g++ clang++)}
    [[ -n $CC && -n $CXX ]] ||
        fail "no C and C++ compiler found (cc, c++)." \
            "With root: apt-get install build-essential. Without: conda install -c conda-forge compilers make."
    scratch=$(mktemp -d)
    echo '#include <concepts>
#include <numbers>
template <std::integral T> T twice(T x) { return 2 * x; }
int main() { return twice(0); }' >"$scratch/try.cc"
    # shellcheck disable=SC2086  # CXX may carry options
    if ! $CXX -std=c++20 "$scratch/try.cc" -o "$scratch/try" >>"$LOG" 2>&1; then
        rm -rf "$scratch"
        fail "'$CXX' does not compile C++20, which PyTorch's headers need (GCC 10 or Clang 13 is the oldest)." \
            "With root: apt-get install g++. Without: load a newer compiler module, or set CC and CXX."
    fi
    rm -rf "$scratch"
    command -v make >/dev/null ||
        fail "make is missing. With root: apt-get install make. Without: conda install -c conda-forge make."
    if [[ -z ${MAKE_JOBS:-} ]]; then
        local memory_kb cores
        cores=$(nproc)
        memory_kb=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
        MAKE_JOBS=$((memory_kb / 1000000 / JOB_MEMORY_GB))
        MAKE_JOBS=$((MAKE_JOBS < 1 ? 1 : MAKE_JOBS > cores ? cores : MAKE_JOBS))
    fi
    [[ $MAKE_JOBS =~ ^[1-9][0-9]*$ ]] || fail "MAKE_JOBS is '$MAKE_JOBS', expected a number of jobs from 1 up."
    export CC CXX
}

# check_disk: disk for the environment, unless PyTorch is there already.
check_disk() {
    local free_gb parent=$VENV
    compgen -G "$VENV/lib/python3*/site-packages/torch/version.py" >/dev/null && return 0
    while [[ ! -d $parent ]]; do parent=$(dirname "$parent"); done
    free_gb=$(df -Pk "$parent" | awk 'NR == 2 {print int($4 / 1000000)}')
    ((free_gb >= DISK_NEEDED_GB)) ||
        fail "$parent has $free_gb GB free, the environment needs $DISK_NEEDED_GB GB." \
            "Free some, or set VENV to a folder on a larger file system."
}

# first_of NAME...: print the first of these commands that exists; nothing where none does.
first_of() {
    local name
    for name; do
        command -v "$name" && return 0
    done
    return 0
}
