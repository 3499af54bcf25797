#!/usr/bin/env bash
#SBATCH --job-name=bench_scaling
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --no-requeue
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

# Scaling of the training: the same short training on 1, 2, 4, ... nodes of one allocation, 2 images per rank.
#
#   sbatch jobs/bench_scaling.sh [OPTIONS OF megdet_hpc.train]
#
# Then the same with the mini-batch of the largest size on fewer nodes (strong scaling). From three sizes on it writes
# scaling.pdf and scaling.md (megdet scaling-report), else it prints images/s and efficiency. MEGDET_BENCH_NODES="1 2 4" names
# other sizes, MEGDET_BENCH_STEPS the number of steps (60), MEGDET_BENCH_STRONG_STEPS that of strong scaling (15);
# MEGDET_BENCH_STRONG=0 leaves it out.
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

begin_job bench_scaling 16 8 "$@"
bench_sizes
