# `make demo` and `make test` work on a bare machine: both make .venv by themselves, once.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help env test durability demo demo-data clean find-python

# An interpreter of your choice: make env PYTHON=/path/to/python3.12
PYTHON ?=
PYTEST_ARGS ?= -q
# As examples/configs/vlm_tiny_easyvqa.yaml names them.
DEMO := runs/demo
DATA := datasets/easy-vqa
# The demo's time counts from here, the installation included.
STARTED := $(shell printf '%(%s)T' -1)
PYENV_PYTHONS := $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.1[2-9]*/bin/python)
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.12 python3 python $(PYENV_PYTHONS))

PROBE := import sys; print("%d.%d.%d" % sys.version_info[:3]); import venv, ensurepip

# Sets $$python to the first candidate that is 3.12 or newer and can make environments.
define FIND_PYTHON
python=""
tried=""
for candidate in $(CANDIDATES); do
    if ! found=$$(command -v "$$candidate"); then
        tried="$$tried, $$candidate not found"
    elif version=$$("$$found" -c '$(PROBE)' 2>/dev/null); then
        IFS=. read -r major minor _ <<< "$$version"
        if (( major > 3 || (major == 3 && minor >= 12) )); then python="$$found"; break; fi
        tried="$$tried, $$candidate is $$version"
    else
        tried="$$tried, $$candidate cannot make environments (no venv module) or does not run"
    fi
done
if [ -z "$$python" ]; then
    echo "error: no Python >= 3.12 found ($${tried#, }); install one (pyenv install 3.12, or" \
         "apt install python3.12-venv) or name it: make env PYTHON=/path/to/python3.12" >&2
    exit 2
fi
endef

# Without a GPU: one thread a process (two processes share few cores) and DeepSpeed's CPU back end.
define DEVICE_ENV
export PATH="$(CURDIR)/.venv/bin:$$PATH"
gpus=0
if listing=$$(nvidia-smi -L 2>/dev/null); then gpus=$$(grep -c '^GPU' <<< "$$listing" || true); fi
export OMP_NUM_THREADS=1
# DeepSpeed builds a small C++ part on first use; checkouts that share one cache rebuild it in turn.
export TORCH_EXTENSIONS_DIR="$(CURDIR)/.venv/torch_extensions"
if [ "$$gpus" = 0 ]; then export DS_ACCELERATOR=cpu; fi
endef

help:
	echo "make demo       train a small vision-language model on pictures, report in $(DEMO)/report"
	echo "make test       style check and tests"
	echo "make durability the tests of faults alone: kills, damage, hangs, full disks, hostile files"
	echo "make env        the environment in .venv alone"
	echo "make demo-data  the demo's pictures as prepared datasets in $(dir $(DATA)) alone"
	echo "make clean      remove .venv, the demo's files and caches"

find-python:
	$(FIND_PYTHON)
	echo "$$python"

# The stamp holds a hash of what decides the dependencies, so a fresh checkout time changes nothing.
env:
	want=$$(cat setup.py pyproject.toml .python-version | sha256sum | cut -d' ' -f1)
	stamp=.venv/.dependencies
	if [ -f $$stamp ] && [ "$$(cat $$stamp)" = "$$want" ]; then exit 0; fi
	started=$$(date +%s)
	if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
	    $(FIND_PYTHON)
	    echo "env: making .venv with $$python"
	    "$$python" -m venv --clear .venv
	fi
	echo "env: installing the dependencies (once, some minutes and 6 GB)"
	rm -f $$stamp
	# DeepSpeed's own kernels are built when first used, not at install time.
	DS_BUILD_OPS=0 .venv/bin/python -m pip install -qq --disable-pip-version-check \
	    --editable '.[demo,dev]'
	echo "$$want" > $$stamp
	echo "env: ready after $$(( $$(date +%s) - started )) s"

test: env
	$(DEVICE_ENV)
	echo "test: ruff"
	ruff check --quiet .
	echo "test: pytest"
	python -m pytest $(PYTEST_ARGS)

durability: env
	$(DEVICE_ENV)
	time python -m pytest $(PYTEST_ARGS) -m 'durability and not slow' --durations=15

demo-data: env
	$(DEVICE_ENV)
	mkdir -p $(dir $(DATA))
	echo "demo: tokenizer and pictures"
	python -m tools.preprocess train-tokenizer --from easy-vqa --vocab 512 --force \
	    --out $(DATA).model
	for split in train test; do
	    python -m tools.preprocess ingest easy-vqa --split $$split --force \
	        --tokenizer $(DATA).model --out $(DATA)-$$split.gvd
	done

demo: demo-data
	$(DEVICE_ENV)
	export GHOSTVIS_DEMO_STARTED=$(STARTED)
	# The demo's model is smaller than a GPU's launch overhead, and `make env` installs no GPU layers.
	export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
	rm -rf $(DEMO)
	echo "demo: training on 2 processes"
	port=$$(python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
	deepspeed --num_accelerators 2 --master_port $$port \
	    examples/pretrain_vlm.py --config examples/configs/vlm_tiny_easyvqa.yaml
	echo "demo: the same answers from the export, in transformers"
	last="$$(ls -d $(DEMO)/hf/step-* | tail -1)"
	python -m ghostvis_mega convert verify "$(DEMO)/checkpoints/$${last##*/}" "$$last" \
	    --answers 8 --data $(DATA)-test.gvd

clean:
	rm -rf .venv $(DEMO) $(DATA)-train.gvd $(DATA)-test.gvd $(DATA).model .pytest_cache .ruff_cache build ./*.egg-info
