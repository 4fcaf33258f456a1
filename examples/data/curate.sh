#!/usr/bin/env bash
# The road of data on a laptop, each step once: label, score, order, synthesise, tokenise, look. About a minute on
# 2 cores; needs the environment of `make venv` on PATH (or PYTHON=...) and writes to runs/data.
#   examples/data/curate.sh
#   launch/local.sh examples/data/curated.yaml      train on it
# The demo's texts and base model stand in for a corpus and for Llama-3-8B.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
TEXTS=examples/demo/texts
MODEL=examples/demo/base_model
OUT=runs/data
mkdir -p "$OUT"
step() { echo; echo "== $*"; }
curate() { "$PYTHON" tools/curate_data.py "$@" --overwrite; }
prepare() { "$PYTHON" tools/prepare_data.py --tokenizer $MODEL --overwrite "$@"; }
look() { "$PYTHON" tools/inspect_data.py "$@"; }

step "topics: a classifier per language from labelled documents, then a file per topic"
# Here the labels are the names of the demo's sources; a real set has a topic such as "history" in each line.
curate label-topics train --input $TEXTS/en_code.train.jsonl $TEXTS/en_math.train.jsonl $TEXTS/zh_web.train.jsonl \
  $TEXTS/zh_book.train.jsonl --label-key source --model "$OUT/topics"
curate label-topics apply --model "$OUT/topics" --input $TEXTS/en_code.valid.jsonl $TEXTS/zh_web.valid.jsonl \
  --min-confidence 0.5 --output-dir "$OUT/by_topic" --split-by topic

step "perplexity of each document under the base model"
# For a large model: torchrun -m megatron_syne.score, which takes any layout of parallelism.
curate score-perplexity --model $MODEL --input $TEXTS/zh_web.train.jsonl $TEXTS/en_math.train.jsonl \
  --output "$OUT/scored.jsonl"

step "the curriculum: within each source low to high perplexity, in ten buckets, the worst 2 % left out"
curate order --input "$OUT/scored.jsonl" --within source --buckets 10 --drop-highest 0.02 \
  --output-dir "$OUT/ordered" --ending .jsonl.zst

step "synthetic documents from question/answer pairs"
"$PYTHON" - > "$OUT/pairs.jsonl" <<'PYTHON'
import json

for a in range(2, 30):
    for b in range(2, 30):
        answer = f"{a} rows of {b} are {a} x {b} = {a * b}, so there are {a * b} chairs."
        print(json.dumps({"question": f"A hall has {a} rows of {b} chairs. How many?", "answer": answer}))
PYTHON
curate synthesize documents --input "$OUT/pairs.jsonl" --output "$OUT/synthetic.jsonl"

step "token files: in the order of the file, with the perplexity kept, and in two parts as an array of jobs does"
prepare --input "$OUT/ordered/zh_web.jsonl.zst" --output-prefix "$OUT/zh_web"
prepare --input "$OUT/ordered/en_math.jsonl.zst" --output-prefix "$OUT/en_math" --keep perplexity
for part in 0 1; do
  prepare --input "$OUT/synthetic.jsonl" --output-prefix "$OUT/synthetic" --shard $part/2
done
prepare --merge "$OUT/synthetic" --shards 2
"$PYTHON" tools/prepare_data.py --verify "$OUT/zh_web" "$OUT/en_math" "$OUT/synthetic"

step "look: documents, lengths, the plan of the run and its first sample"
look documents "$OUT/zh_web" --tokenizer $MODEL --count 2 --characters 120
look histogram "$OUT/zh_web" "$OUT/en_math" "$OUT/synthetic" --output "$OUT/lengths.png"
look plan --config examples/data/curated.yaml --output "$OUT/mixture.png"
look samples --config examples/data/curated.yaml --index 0 --characters 120
