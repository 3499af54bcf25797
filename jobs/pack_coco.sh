#!/usr/bin/env bash
#SBATCH --job-name=pack_coco
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=16
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=2G
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

# Pack COCO 2017 from MEGDET_COCO into MEGDET_DATA/train and MEGDET_DATA/val on CPU nodes, and verify it.
#
#   sbatch jobs/pack_coco.sh [OPTIONS OF data_prep/pack_coco.py]
#
# Rank 0 plans, and all ranks write shards. If the job is interrupted, submit it again; finished shards are kept.
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

begin_job pack_coco 2 16 "$@"
pack_and_verify
