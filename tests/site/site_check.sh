#!/usr/bin/env bash
# Self-test of a site, for a job on 2 nodes and 5 minutes: the doctor's preflight, cross-GPU batch normalization compared with one
# process, and 20 training steps of `tiny` on generated data.
#
#   tests/site/site_check.sh FOLDER LAUNCHER...
#
#   srun --nodes 2 ...:   tests/site/site_check.sh /scratch/me/check srun --ntasks-per-node=8
#   mpirun:               tests/site/site_check.sh /scratch/me/check mpirun -np 16 --map-by ppr:8:node
#
# FOLDER lies where all nodes see it; data and run go there. Python is that of PATH (source .venv/bin/activate). The last line is
# "site check: passed", with status 0. MEGDET_SITE_DEVICE names the device (auto), MEGDET_SITE_SECONDS the limit of each part (120).
set -euo pipefail

if (($# < 2)); then
    sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(mktemp -d "$(cd "$1" && pwd -P)/site_check.XXXXXX")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
device=${MEGDET_SITE_DEVICE:-auto}

# part NAME COMMAND...: run it under the time limit.
part() {
    local name=$1 begin=$SECONDS status=0
    shift
    timeout "${MEGDET_SITE_SECONDS:-120}" "$@" >"$folder/$name.log" 2>&1 || status=$?
    if ((status)); then
        tail -n 30 "$folder/$name.log"
        echo "site check: $name failed with status $status after $((SECONDS - begin)) s; $folder/$name.log has all of it" >&2
        exit 1
    fi
    echo "site check: $name took $((SECONDS - begin)) s: $(grep -v '^ *$' "$folder/$name.log" | tail -n 1)"
}

part draw python data_prep/make_shapes.py --output "$folder/coco" --train 160 --val 8
part pack python data_prep/pack_coco.py --annotations "$folder/coco/annotations/instances_train.json" \
    --images "$folder/coco/train" --output "$folder/train"
part preflight "$@" python -m megdet_hpc.doctor --preflight --timeout 100 --device "$device" --data "$folder/train" \
    --output "$folder/run"
part bn_check "$@" python -m megdet_hpc.bn_check --device "$device"
part training "$@" python -m megdet_hpc.train --config tiny --device "$device" --data.train "$folder/train" --data.val null \
    --norm.size 0 --max_steps 20 --log_every 5 --output "$folder/run"
python - "$folder/run/metrics.jsonl" <<'PYTHON'
import json, math, sys
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
losses = [row["loss"] for row in rows if "loss" in row]
assert len(losses) == 4 and all(map(math.isfinite, losses)), losses
speeds = sorted(row["images_per_s"] for row in rows[1:])
print(f"site check: loss {losses[0]:.3f} to {losses[-1]:.3f}, {speeds[len(speeds) // 2]:.1f} images/s")
PYTHON
rm -rf "$folder"
echo "site check: passed in $SECONDS s"
