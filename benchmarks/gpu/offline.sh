#!/usr/bin/env bash
# Run a command on a GPU machine that reaches no package index, with what was brought along:
#
#     PACKAGES=folder benchmarks/gpu/offline.sh python3 -m pytest -m gpu tests/gpu
#     PACKAGES=folder benchmarks/gpu/offline.sh python3 benchmarks/gpu/suite.py --output benchmarks/results/h200
#
# The folder holds wheels (*.whl: megatron-core, blake3, pydantic, ...) and archives of ready site-packages (*.tar.xz: a
# Transformer Engine built for this Python and torch). torch with CUDA is the machine's own. Everything goes into a
# temporary folder (SITE, if it is to be kept and used again), nothing is installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
: "${PACKAGES:?set PACKAGES to the folder with wheels and archives}"
[ "$#" -gt 0 ] || { echo "usage: PACKAGES=folder $0 command ..." >&2; exit 2; }

if [ -z "${SITE:-}" ]; then
  SITE=$(mktemp -d)
  trap 'rm -rf "$SITE"' EXIT
fi
if [ ! -e "$SITE/.ready" ]; then
  mkdir -p "$SITE"
  shopt -s nullglob
  archives=("$PACKAGES"/*.tar.xz) wheels=("$PACKAGES"/*.whl)
  [ "${#archives[@]}" -gt 0 ] || [ "${#wheels[@]}" -gt 0 ] || { echo "$PACKAGES: neither *.whl nor *.tar.xz" >&2; exit 66; }
  for archive in "${archives[@]}"; do tar -C "$SITE" --no-same-owner -xJf "$archive"; done
  [ "${#wheels[@]}" -eq 0 ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$SITE" "${wheels[@]}"
  touch "$SITE/.ready"
fi
SITE=$(cd "$SITE" && pwd)
export PYTHONPATH="$root:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
"$@"
