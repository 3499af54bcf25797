#!/usr/bin/env bash
#SBATCH --job-name=megdet_128gpu
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

# MegDet on 128 GPUs (16 nodes with 8 GPUs each), global batch 256: one rank per GPU, 2 images per rank.
#
#   sbatch jobs/megdet_128gpu.sh [OPTIONS OF megdet_hpc.train]
#   sbatch jobs/megdet_128gpu.sh --solver.epochs 18 --norm.size 32
#   sbatch --partition=gpu --account=me jobs/megdet_128gpu.sh
#   MEGDET_DRY_RUN=1 bash jobs/megdet_128gpu.sh     print the command instead of running it
#   bash jobs/megdet_128gpu.sh --help               this text
#
# Before the first submission:
#   1. tools/setup_env.sh on a login node, with the modules that the job will load (HOROVOD_BUILD=nccl);
#   2. edit jobs/env.sh: modules, folders, network interface;
#   3. adapt the #SBATCH lines above to the site, or override them on sbatch's command line; adapt
#      --cpus-per-task to cores per node / 8. sbatch --test-only checks them without submitting.
#
# Variables (defaults in jobs/env.sh):
#   MEGDET_DATA       packed data, with folders train and val
#   MEGDET_BACKBONE   file with ImageNet weights of the backbone; empty: from scratch
#   MEGDET_RUNS       results; this run's folder in it is JOBNAME-JOBID, or set MEGDET_OUTPUT
#   MEGDET_CONFIG     named config or YAML file of the run                        (megdet_r50_fpn_256)
#   MEGDET_LAUNCHER   mpirun or srun
#   MEGDET_ROOT       the checkout. sbatch runs a copy of this script from its spool folder, so the
#                     checkout is looked for: MEGDET_ROOT, the folder of submission and the one above it,
#                     and the path that scontrol remembers
set -euo pipefail

fail() {
    printf 'megdet_128gpu.sh: %s\n' "$@" >&2
    exit 1
}

# find_root: print the checkout's folder.
find_root() {
    local folder remembered=""
    if [[ -n ${SLURM_JOB_ID:-} ]] && command -v scontrol >/dev/null; then
        # "Command=/path/jobs/script arguments": the path ends at the last /jobs/ before this script's name.
        remembered=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *Command=\(.*\)\/jobs\/megdet_.*/\1/p')
    fi
    for folder in "${MEGDET_ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-}" \
        "${SLURM_SUBMIT_DIR:+$SLURM_SUBMIT_DIR/..}" "$remembered"; do
        if [[ -n $folder && -f $folder/jobs/env.sh && -d $folder/megdet_hpc ]]; then
            (cd "$folder" && pwd -P)
            return
        fi
    done
    fail "cannot find the checkout from ${SLURM_SUBMIT_DIR:-$PWD}: submit from inside it or set MEGDET_ROOT"
}

show_help() { sed -n '/^# MegDet on/,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    show_help
    exit 0
fi

MEGDET_ROOT=$(find_root)
# shellcheck source=jobs/env.sh
source "$MEGDET_ROOT/jobs/env.sh"
# Ranks import the package from the environment; relative paths in the options mean the checkout.
cd "$MEGDET_ROOT"

ranks=${SLURM_NTASKS:-128}
ranks_per_node=${SLURM_NTASKS_PER_NODE:-8}
output=${MEGDET_OUTPUT:-$MEGDET_RUNS/${SLURM_JOB_NAME:-megdet_128gpu}-${SLURM_JOB_ID:-local}}

train=(python -m megdet_hpc.train --config "${MEGDET_CONFIG:-megdet_r50_fpn_256}" --output "$output"
    --data.train "$MEGDET_DATA/train" --data.val "$MEGDET_DATA/val")
if [[ -n $MEGDET_BACKBONE ]]; then
    train+=(--model.backbone_weights "$MEGDET_BACKBONE")
fi
# The options of the command line come last and so win.
train+=("$@")

case $MEGDET_LAUNCHER in
mpirun)
    # mpirun starts one daemon per node through srun, and the ranks inherit its cores. That step has all cores
    # of the node unless one of these narrows it to a task's share; --bind-to none then leaves them to the
    # loader's processes.
    unset SLURM_EXACT SRUN_CPUS_PER_TASK
    launch=(mpirun -np "$ranks" --map-by "ppr:$ranks_per_node:node" --bind-to none)
    # Under SLURM the ranks see the job's variables anyway; naming them keeps that true for other launchers.
    for name in PATH LD_LIBRARY_PATH TMPDIR "${!NCCL_@}" "${!HOROVOD_@}" "${!MEGDET_@}" \
        OMP_NUM_THREADS HDF5_USE_FILE_LOCKING PYTHONUNBUFFERED; do
        if [[ $(declare -p "$name" 2>/dev/null) == "declare -x"* ]]; then launch+=(-x "$name"); fi
    done
    ;;
srun)
    # Since SLURM 22.05 srun no longer takes --cpus-per-task from the job. All GPUs of the node stay visible
    # to each rank, which picks its own by local rank.
    launch=(srun --mpi=pmix --ntasks="$ranks" --ntasks-per-node="$ranks_per_node"
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 --cpu-bind=none --gpu-bind=none)
    ;;
*) fail "MEGDET_LAUNCHER is '$MEGDET_LAUNCHER', expected mpirun or srun" ;;
esac

if [[ -n ${MEGDET_DRY_RUN:-} ]]; then
    printf '%q ' "${launch[@]}" "${train[@]}"
    printf '\n'
    exit 0
fi
command -v "${launch[0]}" >/dev/null || fail "${launch[0]} is not on PATH: load the site's module in jobs/env.sh"
for folder in "$MEGDET_DATA/train" "$MEGDET_DATA/val"; do
    [[ -d $folder ]] || fail "no packed data in $folder: run data_prep/pack_coco.py, or set MEGDET_DATA"
done
mkdir -p "$(dirname "$output")"
printf 'job %s: %s ranks, %s per node, nodes %s, results in %s\n' \
    "${SLURM_JOB_ID:-local}" "$ranks" "$ranks_per_node" "${SLURM_JOB_NODELIST:-$HOSTNAME}" "$output"
exec "${launch[@]}" "${train[@]}"
