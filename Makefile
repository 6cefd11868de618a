# One machine, one virtual environment in .venv; every target installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
# the tests of a GPU wait for compilers and imports most of the time
GPU_WORKERS ?= 6
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
TEST := pytest --numprocesses $(WORKERS) --dist loadfile --durations 10
# pytest ends with code 5 where no test has the marker
NONE_SELECTED := [ $$? -eq 5 ]

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-base paper-mini test test-slow test-gpu coverage bench-ttft bench-attention
.PHONY: lint format check clean

help:                      ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(READY)            ## install blockft and its tools into .venv

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'import matplotlib.font_manager'  # otherwise the first figure may report on stderr that it lists the fonts
	touch $@

demo: setup                ## train a tiny model for block mode and compare (77 s on 2 cores; longer the first time)
	bash data/demo/demo.sh

demo-base: setup           ## train the demo's base model again from random weights (9 minutes)
	bash data/demo/base.sh

paper-mini: setup          ## train and evaluate the small table with SmolLM2-135M on one GPU; repeat to resume
	bash data/paper-mini/paper-mini.sh $(OVERRIDES)

test: setup                ## run the quick tests (16 minutes on 2 cores)
	$(TEST)

test-slow: setup           ## run the slow tests: the demo, the README's commands, launchers
	$(TEST) -m 'slow and not gpu and not gpu2' || $(NONE_SELECTED)

test-gpu: setup            ## run the tests that need one or two GPUs
	@python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'this machine has no GPU')"
	$(TEST) --numprocesses $(GPU_WORKERS) --dist loadgroup -m 'gpu or gpu2' -rs

coverage: setup            ## run quick and slow tests and print the line coverage of blockft
	coverage erase
	coverage run -m $(TEST) -m 'not gpu and not gpu2'
	coverage combine --quiet
	coverage report
	coverage json

bench-ttft: setup          ## measure the time to the first token with an 8B shape on a GPU (5 minutes)
	blockft bench ttft llama-3-8b --lengths 512,1024,2048,4096,8192,16384,32818 \
	  --out data/results/ttft-llama-3-8b.json --png data/results/ttft-llama-3-8b.png

bench-attention: setup     ## measure FlexAttention against dense masks on a GPU
	blockft bench attention --out data/results/flex.json

lint: setup                ## check style and types
	ruff check .
	ruff format --check .
	mypy

format: setup              ## format the code
	ruff format .
	ruff check --fix .

check: lint test test-slow ## run all that continuous integration runs

clean:                     ## remove outputs and caches
	rm -rf out .pytest_cache .mypy_cache .ruff_cache
