#!/usr/bin/env bash
#SBATCH --job-name=megdet_8gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

# The small-batch baseline on one node: 8 GPUs x 2 images, global batch 16.
#
#   sbatch jobs/megdet_8gpu.sh [OPTIONS OF megdet_hpc.train]
#   sbatch --ntasks-per-node=1 --gpus-per-node=1 --mem=48G jobs/megdet_8gpu.sh --solver.accumulate 8 --norm.size 0
#
# A run that is cut goes on by itself, as with jobs/megdet_128gpu. For other shapes override the directives. One GPU with the
# same global batch needs 8 passes for each update.
# Folders, launcher and limits: jobs/env.sh. From login node to finished run: docs/running_on_clusters.md.
set -euo pipefail

# The scheduler runs a copy of this script from its spool folder. So the script looks for the checkout in MEGDET_ROOT, beside
# this file, in the folder of submission and the one above it, and at the path that SLURM remembers.
submitted=${SLURM_SUBMIT_DIR:-${PBS_O_WORKDIR:-}}
for root in "${MEGDET_ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "$submitted" "$submitted/.." \
    "$([[ -z ${SLURM_JOB_ID:-} ]] || scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\)\/jobs\/.*/\1/p')"; do
    [[ ! -f $root/jobs/common.sh ]] || break
done
if [[ ! -f $root/jobs/common.sh ]]; then
    echo "cannot find the checkout from ${submitted:-$PWD}: submit from inside it or set MEGDET_ROOT" >&2
    exit 2
fi
# shellcheck source=jobs/common.sh
source "$root/jobs/common.sh"

begin_job megdet_8gpu 1 8 "$@"
train_until_done megdet_r50_fpn_16
