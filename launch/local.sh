#!/bin/sh
# Run a configuration on this machine:   launch/local.sh run.yaml [a.b=c ...] [--dry-run]
# PYTHON: the interpreter of the environment (default: python3). What it does is in local.py.
exec "${PYTHON:-python3}" "$(dirname -- "$0")/local.py" "$@"
