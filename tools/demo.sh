#!/usr/bin/env bash
# All steps from data to pictures: generate a set or use one in COCO's format, pack it, train on two ranks under
# horovodrun, evaluate the best checkpoint, and print the paths of all results.
#
#   tools/demo.sh                       generated shapes and the configuration tiny, about 5 minutes on two idle cores
#   tools/demo.sh ../shared/data/bccd   your own set: DIR/annotations/instances_{train,val}*.json, and the images
#                                       in DIR/{train,val}*/ or DIR/images/; the configuration small_set, whose length
#                                       follows the number of images (docs/small_sets.md)
#
# Images and annotations that are damaged are left out, and named at the end.
#
# Variables: VENV (default .venv), DEMO_OUTPUT (default runs/demo-NAME-TIME; must not exist), DEMO_RANKS (default 2),
# DEMO_EPOCHS (default: the configuration's), DEMO_WEIGHTS (for your own set: a run's folder, a checkpoint or a
# torchvision detector to begin with; default: weights/resnet18.pth as backbone, if that file is there).
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
# one thread per rank; ranks yield their core while they wait, since Horovod's threads share the two cores
export OMP_NUM_THREADS=1 OMPI_MCA_mpi_yield_when_idle=1
mkdir -p "$output"

# only PATTERN...: print the first match of a glob; fail with its name if there is none
only() {
  local found=("$@")
  [[ -e ${found[0]} ]] || { echo "demo: DATA=$data has no ${found[0]#"$data"/}" >&2; exit 1; }
  printf '%s\n' "${found[0]}"
}

step() { printf '\n== %s\n' "$*"; }

config=(--config tiny)
if [[ -z $data ]]; then
  step "draw shapes"
  data=$output/coco
  python data_prep/make_shapes.py --output "$data"
else
  # a mini-batch of 2 images on one rank or two
  config=(--config small_set --data.images_per_rank $((ranks > 1 ? 1 : 2)))
  if [[ -n ${DEMO_WEIGHTS:-} ]]; then
    config+=(--model.weights "$DEMO_WEIGHTS")
  elif [[ -f weights/resnet18.pth ]]; then
    config+=(--model.backbone resnet18 --model.backbone_weights weights/resnet18.pth)
  fi
fi
if [[ -n ${DEMO_EPOCHS:-} ]]; then
  config+=(--solver.epochs "$DEMO_EPOCHS")
  [[ ${config[1]} == tiny ]] || config+=(--solver.least_iterations null)
fi

for split in train val; do
  step "pack $split"
  annotations=$(only "$data"/annotations/instances_"$split"*.json)
  images=$data/images
  [[ -d $images ]] || images=$(only "$data/$split"*)
  python data_prep/pack_coco.py --on-error skip --annotations "$annotations" --images "$images" \
    --output "$output/packed/$split"
done
config+=(--data.train "$output/packed/train" --data.val "$output/packed/val")

step "plan"
python -m megdet_hpc.plan "${config[@]}" --ranks "$ranks" --nodes 1 2>&1 | tee "$output/plan.txt"

step "train on $ranks ranks"
horovodrun -np "$ranks" python -m megdet_hpc.train "${config[@]}" --device cpu --output "$output/run"

step "evaluate the best checkpoint"
checkpoint=$output/run/best.json
[[ -f $checkpoint ]] || checkpoint=$(find "$output/run/checkpoints" -name 'step_*.pt' | sort | tail -n 1)
horovodrun -np "$ranks" python -m megdet_hpc.evaluate --checkpoint "$checkpoint" --device cpu \
  --data.val "$output/packed/val" --results "$output/detections.json" 2>&1 | tee "$output/evaluate.log"
scores=$(grep -oE 'result: (AP=[0-9.]+ AP50=[0-9.]+|nothing to score)' "$output/evaluate.log" | tail -n 1) || true
[[ -n $scores ]] || { echo "demo: the evaluation printed no result" >&2; exit 1; }

step "what is where"
printf '%-18s%s\n' \
  "packed data" "$output/packed" \
  "best checkpoint" "$checkpoint" \
  "curves" "$output/run/curves.png" \
  "predictions" "$output/run/predictions.png" \
  "metrics" "$output/run/metrics.jsonl" \
  "TensorBoard" "$VENV/bin/tensorboard --logdir $output/run" \
  "detections" "$output/detections.json" \
  "predict" "$VENV/bin/megdet predict --checkpoint $output/run PHOTOS --output found"
python - "$output"/packed/train "$output"/packed/val <<'PYTHON'
import json
import sys
from pathlib import Path

for folder in map(Path, sys.argv[1:]):
    left_out = json.loads((folder / "manifest.json").read_text())["skipped"]
    for entry in left_out[:10]:
        print(f"left out of {folder.name}: {entry['file']}: {entry['message']}")
    if len(left_out) > 10:
        print(f"left out of {folder.name}: {len(left_out) - 10} more, listed in {folder / 'manifest.json'}")
PYTHON
echo "$scores output=$output"
