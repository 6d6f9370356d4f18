#!/usr/bin/env bash
# The main job from end to end on real data, by the public verbs alone: a REPA run and its baseline, compared.
#
#   launchers/local/demo.sh                    the scikit-learn digits: real 8 x 8 scans, no download
#   launchers/local/demo.sh folder/of/images   one sub-folder a class; also a .zip or .tar of it
#
# Everything lands in ./demo. Started again after an interruption, it goes on where it stopped.
set -euo pipefail
source=${1:-digits}
out=${DEMO_OUT:-demo}
preset=demo
size=8
if [ "$source" != digits ]; then
    preset=cifar10
    size=32
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two processes share the cores
tracking="sqlite:///$out/mlflow.db"
began=$SECONDS
say() { printf '\n\033[1m[%3d s] %s\033[0m\n' $((SECONDS - began)) "$1"; }

say "1. Images become a data set"
repa-scale prepare "$source" --out "$out/data" --size "$size"
classes=$(python -c "import json, sys; print(len(json.load(open(sys.argv[1]))['class_names']))" "$out/data/dataset.json")

for method in repa baseline; do
    say "2. Training: method=$method, two processes, ZeRO stage 3"
    deepspeed --num_gpus 2 --module repa_scale.train "experiment=${preset}_$method" \
        "data.path=$out/data" "model.num_classes=$classes" "run.dir=$out/$method" \
        "tracking.uri=$tracking" tracking.experiment=demo "train.sample_every=${DEMO_SAMPLE_EVERY:-100}" "${@:2}"
done

say "3. Samples of both, from the EMA weights"
for method in repa baseline; do
    repa-scale sample "$out/$method" --out "$out/samples/$method" --count 100
    if [ "$source" = digits ]; then
        repa-scale evaluate "$out/samples/$method" --data "$out/data"
    fi
done

say "4. The comparison, from what MLflow holds"
repa-scale compare --uri "$tracking" --experiment demo --out "$out/report"

say "5. An export for serving, and samples of it"
[ -d "$out/export" ] || repa-scale export "$out/repa" --out "$out/export"
repa-scale sample "$out/export" --out "$out/samples/export" --count 20

say "Done"
cat <<NEXT
The report          $out/report/index.html
Samples             $out/samples/repa/grid.png and $out/samples/baseline/grid.png
The runs            $out/repa, $out/baseline (status.json, metrics.jsonl, checkpoints, log)
The exported model  $out/export
All runs in MLflow  mlflow ui --backend-store-uri $tracking
Your first real run
  repa-scale prepare path/to/imagenet/train --out data/imagenet256 --size 256
  deepspeed --hostfile hosts --module repa_scale.train experiment=repa_sit_xl data.path=data/imagenet256 run.dir=runs/repa
NEXT
