#!/usr/bin/env bash
#SBATCH --job-name=follow
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

# Score the checkpoints of a run with evaluation.mode deferred as they appear, on one node, until the run has ended.
#
#   MEGDET_OUTPUT=runs/megdet_128gpu-123 sbatch jobs/follow.sh [OPTIONS OF megdet_hpc.evaluate]
#   sbatch jobs/follow.sh --follow runs/megdet_128gpu-123
#
# It may be submitted before, during or after the run. When its time is over it is submitted again, and goes on. A run that
# gives no sign for --patience minutes (60) ends it with status 75; submit it again once the run goes on.
# Folders, launcher and limits: jobs/env.sh. What it does: docs/evaluation.md.
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

begin_job follow 1 8 "$@"
follow_run
