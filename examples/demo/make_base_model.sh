#!/usr/bin/env bash
# Make examples/demo/base_model/model.safetensors: from scratch, on English prose, with this stack.
# About 15 minutes on 2 cores; needs the environment of `make venv` on PATH (or PYTHON=...).
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
rm -rf runs/demo_base runs/demo_base_data runs/demo_base_hf
"$PYTHON" tools/prepare_data.py --tokenizer examples/demo/base_model --min-tokens 10 \
  --input examples/demo/texts/en_web.train.jsonl --output-prefix runs/demo_base_data/en_web
"$PYTHON" tools/prepare_data.py --tokenizer examples/demo/base_model --min-tokens 10 \
  --input examples/demo/texts/en_web.valid.jsonl --output-prefix runs/demo_base_data/en_web_valid
"$PYTHON" -m megatron_syne.train --config examples/demo/base.yaml "$@"
"$PYTHON" tools/convert_checkpoint.py export --from "$(ls -d runs/demo_base/checkpoints/iter_* | tail -1)" \
  --out runs/demo_base_hf --dtype bf16
cp runs/demo_base_hf/model.safetensors examples/demo/base_model/model.safetensors
