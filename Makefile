# make demo    set everything up and run the main job on the shipped model and texts
# make test    set everything up and run the tests (with the static checks)
# make check   ruff and mypy only
# make venv    the environment only
# make clean   remove the environment and what the tools leave behind
#
# PYTHON   Python 3.11 or 3.12 that makes the environment (looked for under its usual names)
# VENV     where the environment goes
# EXTRAS   optional parts to install, of setup.py (dev); dev,dali,eval adds NVIDIA DALI (600 MB on disk) and the harness
# JOBS     test files that run at the same time (3: a layout test's processes wait for one another much of the time)
# PYTEST_ARGS, DEMO_ARGS   further arguments, for example: make test PYTEST_ARGS='tests/unit -x'
#
# Which index packages come from is pip's own configuration. The default wheel of torch for Linux brings the CUDA
# libraries along (several gigabytes); to get the CPU build, point pip at a folder or an index that has it:
#     PIP_FIND_LINKS=<folder with torch-2.13.0+cpu-*.whl> make demo
#     PIP_EXTRA_INDEX_URL=<index of PyTorch's CPU wheels> make demo

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: demo test check venv probes clean

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(or $(shell for p in python3 python3.12 python3.11; do $$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done),python3)
VENV ?= .venv
EXTRAS ?= dev
PYTEST_ARGS ?=
JOBS ?= 3
DEMO_ARGS ?=

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
COMMA := ,
READY := $(VENV)/.ready-$(subst $(COMMA),-,$(EXTRAS))

# Two small probes, each read by one test in a process of its own. Never in the environment itself: transformers 4
# and 5 need different tokenizers, and an installed Transformer Engine breaks `import megatron.core` without CUDA.
TRANSFORMERS5 := transformers==5.23.0 tokenizers==0.23.3 huggingface_hub==1.31.0 httpx==0.28.1 httpcore==1.0.9 anyio==4.16.0 h11==0.16.0
TRANSFORMERS5_READY := $(VENV)/transformers5/.ready-5.23.0
# The package of Python files alone, 0.7 MB: no compiled library, nothing to run on.
TE_NAMES := transformer_engine==2.11.0
TE_NAMES_READY := $(VENV)/te_names/.ready-2.11.0

demo: $(READY)
	$(VENV)/bin/python examples/demo/run.py $(DEMO_ARGS)

test: export OMP_NUM_THREADS := 1
test: $(READY) probes check
	$(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: $(READY)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

venv: $(READY)

probes: $(TRANSFORMERS5_READY) $(TE_NAMES_READY)

# An environment of a supported Python is brought up to date in place; anything else at $(VENV) is left alone.
$(READY): setup.py constraints.txt
	@if ! $(VENV)/bin/python -c '$(SUPPORTED)' 2>/dev/null; then
	  if ! $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null; then
	    found=$$(command -v $(PYTHON) >/dev/null && $(PYTHON) -V 2>&1 | head -n 1 || echo "not there")
	    echo "error: Python 3.11 or 3.12 is needed and '$(PYTHON)' is $${found:-neither}; name one: make PYTHON=/path/to/python3.12" >&2
	    exit 64
	  fi
	  if test -d $(VENV) && test -n "$$(ls -A $(VENV))" && ! test -e $(VENV)/pyvenv.cfg; then
	    echo "error: $(VENV) exists and is no Python environment; name another folder: make VENV=/path/to/folder" >&2
	    exit 73
	  fi
	  if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
	    echo "error: '$(PYTHON)' has no venv module with pip; on Debian and Ubuntu: apt-get install python3-venv" >&2
	    exit 66
	  fi
	  echo "making the environment $(VENV) with $$($(PYTHON) -V)"
	  $(PYTHON) -m venv --clear $(VENV)
	fi
	echo "installing torch (the long download; see the head of the Makefile for the CPU build)"
	$(PIP) install --quiet --constraint constraints.txt torch
	echo "installing megatron_syne and the tools"
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

$(TRANSFORMERS5_READY): | $(READY)
	@echo "installing transformers 5 beside the environment (read by one test)"
	rm -rf $(VENV)/transformers5
	$(PIP) install --quiet --no-deps --only-binary :all: --target $(VENV)/transformers5 $(TRANSFORMERS5)
	touch $@

$(TE_NAMES_READY): | $(READY)
	@echo "installing Transformer Engine's Python files beside the environment (read by one test)"
	rm -rf $(VENV)/te_names
	$(PIP) install --quiet --no-deps --only-binary :all: --target $(VENV)/te_names $(TE_NAMES)
	touch $@

clean:
	@if test -e $(VENV)/pyvenv.cfg; then rm -rf $(VENV); fi
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find megatron_syne tests tools launch examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
