#!/usr/bin/env bash
#SBATCH --job-name=megdet_128gpu
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

# MegDet on 128 GPUs (16 nodes with 8 GPUs each), global batch 256: one rank per GPU, 2 images per rank.
#
#   sbatch jobs/megdet_128gpu.sh [OPTIONS OF megdet_hpc.train]
#   sbatch jobs/megdet_128gpu.sh --solver.epochs 18 --norm.size 64
#   sbatch --partition=gpu --account=me jobs/megdet_128gpu.sh
#   sbatch --test-only jobs/megdet_128gpu.sh         check the directives without submitting
#   MEGDET_DRY_RUN=1 bash jobs/megdet_128gpu.sh     print the command instead of running it
#   bash jobs/megdet_128gpu.sh --help               this text
#
# A run that is cut by preemption, the time limit, a lost node or a crash goes on by itself from its newest checkpoint,
# in the same folder, until it is finished. MEGDET_CONFIG names another configuration or YAML file.
#
# Adapt the directives above to the site, or override them at submission.
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

begin_job megdet_128gpu 16 8 "$@"
train_until_done megdet_r50_fpn_256
