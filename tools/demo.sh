#!/usr/bin/env bash
# The whole way from data to pictures: generate a set or take one in COCO's format, pack it, train `tiny` on two ranks
# under horovodrun, evaluate the checkpoint, and print where everything is.
#
#   tools/demo.sh                       generated shapes, about 5 minutes on two idle cores
#   tools/demo.sh ../shared/data/bccd   your own set: DIR/annotations/instances_{train,val}*.json, and the images
#                                       in DIR/{train,val}*/ or DIR/images/
#
# Variables: VENV (default .venv), DEMO_OUTPUT (default runs/demo-NAME-TIME; must not exist),
# DEMO_RANKS (default 2), DEMO_EPOCHS (default: the config's for shapes, 4 for other data).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
fi
data=${1:-}
# shellcheck source=tools/activate.sh
source tools/activate.sh
ranks=${DEMO_RANKS:-2}
name=shapes
[[ -z $data ]] || name=$(basename "$data")
output=${DEMO_OUTPUT:-runs/demo-$name-$(date +%Y%m%d-%H%M%S)}
[[ ! -e $output ]] || { echo "demo: $output exists already; name another folder in DEMO_OUTPUT" >&2; exit 1; }
# one thread per rank, and ranks that yield their core while they wait, since Horovod's threads share the two cores
export OMP_NUM_THREADS=1 OMPI_MCA_mpi_yield_when_idle=1
mkdir -p "$output"

# first match of a glob, or a failure that names it
only() {
  local found=("$@")
  [[ -e ${found[0]} ]] || { echo "demo: DATA=$data has no ${found[0]#"$data"/}" >&2; exit 1; }
  printf '%s\n' "${found[0]}"
}

step() { printf '\n== %s\n' "$*"; }

if [[ -z $data ]]; then
  step "draw shapes"
  data=$output/coco
  python data_prep/make_shapes.py --output "$data"
  extra=()
else
  # natural images: larger than the shapes, and few epochs, since the demo shows the way and not a result
  extra=(--data.short_sides '[192, 224]' --data.val_short_side 208 --data.max_side 320
    --model.anchor_sizes '[16, 32, 64, 128, 256]' --solver.epochs 4
    --solver.drop_epochs '[]' --solver.drop_factors '[]')
fi
[[ -z ${DEMO_EPOCHS:-} ]] || extra+=(--solver.epochs "$DEMO_EPOCHS")

for split in train val; do
  step "pack $split"
  annotations=$(only "$data"/annotations/instances_"$split"*.json)
  images=$data/images
  [[ -d $images ]] || images=$(only "$data/$split"*)
  python data_prep/pack_coco.py --annotations "$annotations" --images "$images" --output "$output/packed/$split"
done

step "train on $ranks ranks"
horovodrun -np "$ranks" python -m megdet_hpc.train --config tiny --device cpu "${extra[@]}" \
  --data.train "$output/packed/train" --data.val "$output/packed/val" --output "$output/run"

step "evaluate"
checkpoint=$(find "$output/run/checkpoints" -name 'step_*.pt' | sort | tail -n 1)
horovodrun -np "$ranks" python -m megdet_hpc.evaluate --checkpoint "$checkpoint" --device cpu \
  --data.val "$output/packed/val" --results "$output/detections.json" 2>&1 | tee "$output/evaluate.log"
scores=$(grep -o 'result: AP=[0-9.]* AP50=[0-9.]*' "$output/evaluate.log" | tail -n 1)
[[ -n $scores ]] || { echo "demo: the evaluation printed no result" >&2; exit 1; }

step "what is where"
printf '%-18s%s\n' \
  "packed data" "$output/packed" \
  "checkpoint" "$checkpoint" \
  "curves" "$output/run/curves.png" \
  "predictions" "$output/run/predictions.png" \
  "metrics" "$output/run/metrics.jsonl" \
  "TensorBoard" "$VENV/bin/tensorboard --logdir $output/run" \
  "detections" "$output/detections.json"
echo "$scores output=$output"
