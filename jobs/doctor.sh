#!/usr/bin/env bash
#SBATCH --job-name=doctor
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --no-requeue
#SBATCH --time=00:30:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

# Examine the software, GPUs, folders and network of all nodes of a job, and report what is fine, slow or wrong.
#
#   sbatch jobs/doctor.sh [OPTIONS OF megdet_hpc.doctor]
#   sbatch --nodes=2 jobs/doctor.sh --preflight
#
# The status is 1 if something is wrong. The findings are printed and written to findings.json in MEGDET_RUNS/doctor-JOBID.
# docs/doctor.md lists what is examined. The job writes 64 MiB to its folders and removes them.
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

begin_job doctor 16 8 "$@"
examine_nodes
