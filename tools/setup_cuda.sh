# shellcheck shell=bash
# The choice between a CPU and an NCCL build of Horovod, and the search for CUDA and NCCL. Sourced by setup_env.sh; uses
# its say, fail and logged.
# shellcheck disable=SC2034  # what is set here is read in the other parts

# Wheels of the compiler, at the versions of constraints.txt. Only the build needs them, so they are not in the environment.
readonly TOOLKIT_WHEELS=(nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl nvidia-cuda-runtime)

# choose_horovod: set HOROVOD_KIND (cpu, nccl, none) and CUDA_ASKED. CUDA_ASKED holds the folders that the caller names, or
# those of the build if auto keeps one. Named folders are checked here, before anything is fetched.
choose_horovod() {
    local note="$VENV/.megdet_horovod" built=""
    HOROVOD_KIND=$HOROVOD_BUILD HOROVOD_KEY="" CUDA_ASKED=""
    if [[ -f $note ]]; then
        built=$(<"$note")
    elif [[ -n $(installed_version horovod) ]]; then
        # Horovod was installed by other means: its kind is kept, but it is built again
        built=$("$ENV_PYTHON" -c 'import horovod.torch as hvd
print("-torch-cuda" if hvd.nccl_built() else "-torch-cpu-")' 2>/dev/null) || built=""
    fi
    if [[ $HOROVOD_BUILD == auto ]]; then
        case $built in
        none) HOROVOD_KIND=none ;;
        *-torch*-cpu-*) HOROVOD_KIND=cpu ;;
        *-torch*-cuda*) keep_nccl ;;
        *) if nvidia_driver; then HOROVOD_KIND=nccl; else HOROVOD_KIND=cpu; fi ;;
        esac
        if [[ -n $built && $HOROVOD_KIND != nccl ]] && nvidia_driver; then
            say "Horovod: the environment keeps the kind it was made with, $HOROVOD_KIND; HOROVOD_BUILD=nccl builds" \
                "one for the GPUs here"
        elif [[ $HOROVOD_KIND == none ]]; then
            say "Horovod: none, as the environment was made; HOROVOD_BUILD=cpu or nccl adds it, for more than one process"
        elif [[ -z $built && $HOROVOD_KIND == cpu ]]; then
            say "Horovod without NCCL: no NVIDIA driver here (on a login node say HOROVOD_BUILD=nccl)"
        fi
        [[ -z $built ]] || return 0
        check_folders
    elif [[ $HOROVOD_BUILD == nccl ]]; then
        # no folder is named, so any NCCL build will do
        if [[ $built == *-torch*-cuda* && -z ${CUDA_HOME:-}${HOROVOD_NCCL_HOME:-} ]]; then
            keep_nccl
            return
        fi
        check_folders
    fi
    if [[ $HOROVOD_KIND == nccl ]]; then CUDA_ASKED="${CUDA_HOME:-}:${HOROVOD_NCCL_HOME:-}"; fi
}

nvidia_driver() { [[ -e /proc/driver/nvidia/version ]]; }

# keep_nccl: the NCCL build of the environment, with the folders it was built from.
keep_nccl() {
    local -a asked=()
    HOROVOD_KIND=nccl
    if [[ -f $VENV/.megdet_cuda ]]; then mapfile -t asked <"$VENV/.megdet_cuda"; fi
    CUDA_ASKED=${asked[0]:-:}
    HOROVOD_KEY=${asked[1]:-}
}

# check_folders: check that CUDA_HOME and HOROVOD_NCCL_HOME hold CUDA and NCCL. If Horovod is not built for NCCL they are
# not used, so a fault in them is only reported.
check_folders() {
    local version wanted fault=""
    wanted=$(pinned nvidia-cuda-runtime)
    if [[ -n ${CUDA_HOME:-} && ! -x $CUDA_HOME/bin/nvcc ]]; then
        fault="CUDA_HOME is '$CUDA_HOME', which has no bin/nvcc"
    elif [[ -n ${CUDA_HOME:-} ]]; then
        version=$(toolkit_version "$CUDA_HOME/bin/nvcc")
        [[ ${version%%.*} == "${wanted%%.*}" ]] ||
            fault="CUDA_HOME is '$CUDA_HOME', CUDA ${version:-of an unknown version}; PyTorch $(pinned torch) was built with CUDA ${wanted%.*}"
    fi
    if [[ -z $fault && -n ${HOROVOD_NCCL_HOME:-} ]] && ! has_nccl "$HOROVOD_NCCL_HOME"; then
        fault="HOROVOD_NCCL_HOME is '$HOROVOD_NCCL_HOME', which has no include/nccl.h or no lib/libnccl.so"
    fi
    if [[ -n $fault && $HOROVOD_KIND == nccl ]]; then
        fail "$fault." \
            "CUDA_HOME: a CUDA ${wanted%%.*} toolkit; unset, one is looked for on PATH, and fetched where there is none." \
            "HOROVOD_NCCL_HOME: a folder with both; unset, the NCCL of PyTorch's packages is taken." \
            "HOROVOD_BUILD=cpu needs neither."
    elif [[ -n $fault ]]; then
        say "note: $fault; not used without NCCL"
    fi
}

# has_nccl FOLDER: whether it can be HOROVOD_NCCL_HOME. Debian keeps the library in a folder named after the processor.
has_nccl() {
    [[ -f $1/include/nccl.h ]] || return 1
    compgen -G "$1/lib*/libnccl.so" >/dev/null || [[ -f $1/lib/$(uname -m)-linux-gnu/libnccl.so ]]
}

# toolkit_version NVCC: the version of its toolkit, such as 13.0.
toolkit_version() { { "$1" --version 2>/dev/null || true; } | sed -n 's/.*release \([0-9.]*\),.*/\1/p'; }

# find_toolkit: set HOROVOD_KEY, the part of the cache's key about CUDA. For nccl also set NCCL_DIR and CUDA_HOME, which is
# empty if the compiler must be fetched. If this PyTorch has no CUDA, auto takes cpu.
find_toolkit() {
    local missing=""
    if [[ $HOROVOD_KIND == nccl ]]; then
        # the wanted Horovod is built already, so no toolkit is needed
        [[ -z $HOROVOD_KEY || $(<"$VENV/.megdet_horovod") != "$(horovod_key)" ]] || return 0
        find_cuda missing
        if [[ -n $missing && $HOROVOD_BUILD == auto && ! -f $VENV/.megdet_horovod ]]; then
            say "Horovod without NCCL: $missing"
            HOROVOD_KIND=cpu CUDA_ASKED=""
        elif [[ -n $missing ]]; then
            fail "Horovod for NCCL cannot be built: $missing." "HOROVOD_BUILD=cpu builds one for CPUs."
        fi
    fi
    HOROVOD_KEY=cpu
    if [[ $HOROVOD_KIND == nccl ]]; then
        HOROVOD_KEY=cuda$TOOLKIT_VERSION.$(printf '%s:%s' "$CUDA_HOME" "${HOROVOD_NCCL_HOME:-}" | sha256sum | cut -c1-8)
    fi
}

# find_cuda NAME: find a toolkit of PyTorch's CUDA major version, and an NCCL. Variable NAME gets what is missing.
find_cuda() {
    local -n reason=$1
    local torch_cuda nvcc
    # a kept build that must be built again uses the same folders, if they still exist
    if [[ -z ${CUDA_HOME:-} && -x ${CUDA_ASKED%%:*}/bin/nvcc ]]; then CUDA_HOME=${CUDA_ASKED%%:*}; fi
    if [[ -z ${HOROVOD_NCCL_HOME:-} && -d ${CUDA_ASKED#*:} ]]; then HOROVOD_NCCL_HOME=${CUDA_ASKED#*:}; fi
    torch_cuda=$("$ENV_PYTHON" -c 'import torch; print(torch.version.cuda or "")')
    if [[ -z $torch_cuda ]]; then
        reason="this PyTorch has no CUDA"
        return
    fi
    CUDA_HOME=$(find_nvcc "${torch_cuda%%.*}")
    if [[ -n $CUDA_HOME ]]; then
        TOOLKIT_VERSION=$(toolkit_version "$CUDA_HOME/bin/nvcc")
    else
        TOOLKIT_VERSION=$(pinned nvidia-cuda-nvcc)
        if [[ ${TOOLKIT_VERSION%%.*} != "${torch_cuda%%.*}" ]]; then
            reason="no CUDA compiler of version ${torch_cuda%%.*} found (nvcc; load the CUDA module or set CUDA_HOME)"
            return
        fi
    fi
    NCCL_DIR=$("$ENV_PYTHON" -c 'import nvidia.nccl; print(next(iter(nvidia.nccl.__path__)))' 2>/dev/null || true)
    if [[ -z ${HOROVOD_NCCL_HOME:-} && ! -f $NCCL_DIR/include/nccl.h ]]; then
        reason="no NCCL found (neither in PyTorch's packages nor as HOROVOD_NCCL_HOME)"
    fi
}

# find_nvcc MAJOR: print the folder of a toolkit of that version: CUDA_HOME, the one on PATH, or the usual one.
find_nvcc() {
    local nvcc top
    for nvcc in "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(first_of nvcc)" /usr/local/cuda/bin/nvcc; do
        [[ -x $nvcc && $(toolkit_version "$nvcc") == "$1".* ]] || continue
        # --dryrun tells the toolkit's folder, even if nvcc is a wrapper or a link.
        top=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
        (cd "${top:-$(dirname "$(readlink -f "$nvcc")")/..}" && pwd -P)
        return
    done
}

# fetch_toolkit BENCH: fetch the compiler from PyPI into one folder that looks like a toolkit; sets CUDA_HOME.
fetch_toolkit() {
    local name
    local -a wheels=()
    for name in "${TOOLKIT_WHEELS[@]}"; do wheels+=("$name==$(pinned "$name")"); done
    say "CUDA $TOOLKIT_VERSION: no nvcc of it here, fetching NVIDIA's compiler from PyPI for this build (270 MB)"
    logged "fetch the CUDA compiler" "$ENV_PYTHON" -m pip install "${PIP_QUIET[@]}" --no-deps \
        --target "$1/toolkit" "${wheels[@]}"
    CUDA_HOME=$(echo "$1"/toolkit/nvidia/cu*)
    [[ -x $CUDA_HOME/bin/nvcc && -d $CUDA_HOME/lib ]] || fail "$CUDA_HOME: these wheels hold no bin/nvcc and lib/"
    # The wheels have libraries with a version in their names only, and CMake looks in lib64.
    ln -s lib "$CUDA_HOME/lib64"
    ln -s "$(basename "$CUDA_HOME"/lib/libcudart.so.*)" "$CUDA_HOME/lib/libcudart.so"
}
