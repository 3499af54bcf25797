#!/usr/bin/env bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

# Score a checkpoint on the packed validation set, on one node.
#
#   MEGDET_OUTPUT=runs/megdet_128gpu-123 sbatch jobs/evaluate.sh [OPTIONS OF megdet_hpc.evaluate]
#   sbatch jobs/evaluate.sh --checkpoint runs/baseline/checkpoints/step_NNNNNNNN.pt
#
# Without --checkpoint the newest checkpoint of the run in MEGDET_OUTPUT is scored. Every image is scored once, so the AP is
# the same at any number of ranks.
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

begin_job evaluate 1 8 "$@"
evaluate_newest
