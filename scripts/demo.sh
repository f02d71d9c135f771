#!/usr/bin/env bash
# The whole path on a small model: write a checkpoint, cut it in two, sweep three modes on two ranks, report.
# Usage: scripts/demo.sh OUTDIR        (make demo sets up .venv and calls it)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/demo.sh OUTDIR}
bin=.venv/bin
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # torchrun's own choice, made here so that it need not warn of it
ranks=2

# On a GPU the flash kernels want bfloat16; a CPU may have no instructions for it, so there float32.
if $bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  dtype=bfloat16 batch=16:257:x4 shared=1024,4096 unique=64
else
  dtype=float32 batch=8:33:x2 shared=512,2048 unique=16
fi
model=$out/model-$dtype shards=$out/shards-$dtype results=$out/results-$dtype
mkdir -p "$out"

echo "== 1. A small Hugging Face-format checkpoint: $model"
[ -f "$model/config.json" ] || { rm -rf "$model"; $bin/python tools/make_checkpoint.py demo "$model" --dtype $dtype; }

echo "== 2. Cut into $ranks shards: $shards"
$bin/python tools/make_tp_files.py "$model" "$shards" --num-splits $ranks

echo "== 3. Decode throughput on $ranks ranks, three ways to attend: $results"
for mode in noattention hydragen hydragen_noshared; do
  $bin/torchrun --standalone --nproc_per_node=$ranks scripts/synth.py "$results" $batch $shared $unique \
    --mode $mode --num-iters 3 --num-warmup 1 --model-name "$model" --tp-dir "$shards"
done

echo "== 4. Report"
$bin/python scripts/report.py "$results"
