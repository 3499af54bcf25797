# shellcheck shell=bash
# An environment on top of a site's own PyTorch and MPI: tools/setup_env.sh --site. Sourced by setup_env.sh; uses its say, fail
# and logged. Nothing is compiled, and nothing that the site has is replaced.

# What the site must have, and what is never added: they belong to its drivers, network and compilers.
readonly SITE_OWN=(torch torchvision mpi4py horovod)

# site_has NAME: whether the site's Python can find the package.
site_has() { "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1" 2>/dev/null; }

check_site() {
    check_python
    site_has torch || fail "'$PYTHON' ($(command -v "$PYTHON")) has no PyTorch: load the site's module, such as" \
        "module load pytorch, or name its interpreter: PYTHON=/path/to/python tools/setup_env.sh --site." \
        "Without a site's PyTorch run tools/setup_env.sh, which brings its own."
    site_has torchvision || fail "'$PYTHON' has PyTorch $(site_version torch) and no torchvision, whose compiled part must" \
        "fit it: load another of the site's modules, or put the fitting release on PYTHONPATH: pip install --no-deps" \
        "--target FOLDER torchvision==VERSION; export PYTHONPATH=FOLDER:\$PYTHONPATH (torchvision's README lists the pairs)."
    "$PYTHON" -c 'import torch, torchvision
torch.ops.torchvision.nms
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
assert version >= (2, 4), f"PyTorch {torch.__version__} is older than 2.4"' >>"$LOG" 2>&1 ||
        fail "the site's PyTorch and torchvision cannot be used: $(tail -n 1 "$LOG")"
}

# site_version NAME: its version at the site.
site_version() { "$PYTHON" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null || echo none; }

# site_requirements: the packages of setup.cfg and its extra `fast` without those that only the site may bring.
site_requirements() {
    "$PYTHON" - "$ROOT/setup.cfg" "${SITE_OWN[@]}" <<'PYTHON'
import configparser, re, sys
config = configparser.ConfigParser()
config.read(sys.argv[1], encoding="utf-8")
lines = (config["options"]["install_requires"] + config["options.extras_require"]["fast"]).splitlines()
print("\n".join(line for line in lines if line and re.split(r"[^\w-]", line)[0] not in sys.argv[2:]))
PYTHON
}

# link_site: let the environment see what the site's Python sees, in its order: packages of modules (PYTHONPATH), and those of a
# virtual environment. So they are found where the modules' PYTHONPATH is not set.
link_site() {
    local purelib
    purelib=$("$ENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    "$PYTHON" - "$ROOT" "$VENV" >"$purelib/megdet_site.pth" <<'PYTHON'
import os, sys, sysconfig
root, venv = map(os.path.realpath, sys.argv[1:])
skipped = {root, *(os.path.realpath(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib"))}
for folder in dict.fromkeys(os.path.realpath(entry) for entry in sys.path if entry and os.path.isdir(entry)):
    if folder not in skipped and os.path.basename(folder) != "lib-dynload" and not folder.startswith(venv + os.sep):
        print(folder)
PYTHON
}

# site_constraints: what the site has stays as it is: pip may add packages and change none. Of two of one name the first on the
# path counts, which is the one that is imported.
site_constraints() {
    "$PYTHON" -c 'import importlib.metadata as m, re
found = {}
for d in m.distributions():
    if d.metadata["Name"] and d.version:
        found.setdefault(re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(), d.version)
own = ("megdet-hpc", "pip", "setuptools")
print("\n".join(f"{name}=={version}" for name, version in sorted(found.items()) if name not in own))'
}

# set_up_site DRY_RUN: all steps; with DRY_RUN the checks alone. The environment names its kind in .megdet_horovod, so that a later
# run without --site leaves it alone.
set_up_site() {
    local kept=$VENV/.megdet_site_packages
    if [[ -z $1 ]]; then
        say "log: $LOG"
        : >>"$LOG"
    fi
    [[ ! -e $VENV || -f $VENV/.megdet_site ]] ||
        fail "$VENV is there and was not made by --site: name another folder, VENV=.venv_site tools/setup_env.sh --site"
    check_site
    say "site: Python $("$PYTHON" -c 'import platform; print(platform.python_version())'), torch $(site_version torch)," \
        "torchvision $(site_version torchvision), mpi4py $(site_version mpi4py), Horovod $(site_version horovod)"
    if [[ -n $1 ]]; then
        if [[ -e $VENV ]]; then say "environment: a run would work on $VENV"; else say "environment: a run would make $VENV"; fi
        return
    fi
    # before the environment, so that a run that is interrupted while it is made can be started again
    mkdir -p "$VENV"
    : >"$VENV/.megdet_site"
    if ! { [[ -x $ENV_PYTHON ]] && "$ENV_PYTHON" -m pip --version >>"$LOG" 2>&1; }; then
        say "environment: making $VENV over $(command -v "$PYTHON")"
        logged "make the environment" "$PYTHON" -m "$VENV_MODULE" --system-site-packages "$VENV"
    fi
    echo none >"$VENV/.megdet_horovod"
    link_site
    site_constraints >"$kept"
    site_requirements >"$VENV/.megdet_requirements"
    say "packages: what the site lacks, from ready wheels only"
    logged "install the packages" "$ENV_PYTHON" -m pip install "${PIP_QUIET[@]}" --only-binary :all: \
        -c "$kept" -r "$VENV/.megdet_requirements" "setuptools>=70"
    say "megdet_hpc: installing from $ROOT, editable"
    logged "install megdet_hpc" "$ENV_PYTHON" -m pip install "${PIP_QUIET[@]}" --no-deps --no-build-isolation -e "$ROOT"
    logged "import the packages" env -u PYTHONPATH "$ENV_PYTHON" -c 'import torch, torchvision, megdet_hpc; torch.ops.torchvision.nms'
    say "added: $(env -u PYTHONPATH "$ENV_PYTHON" -m pip list --local --format=freeze 2>>"$LOG" | paste -sd' ')"
    if [[ -n ${PYTHONPATH:-} ]]; then
        say "note: the folders of PYTHONPATH are in the environment now; load the same modules in jobs for their libraries"
    fi
    say "ready: source $VENV/bin/activate; python -m megdet_hpc.doctor says what is missing and what that costs"
}
