# One machine, one virtual environment in .venv; every target installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo demo-base paper-mini test test-slow test-gpu bench-ttft bench-attention lint format check clean

setup: $(READY)

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

demo: setup                ## a model loses accuracy under the block mask and wins it back (77 seconds on 2 cores, once installed)
	bash data/demo/demo.sh

demo-base: setup           ## train the demo's base model again, from nothing (about 9 minutes)
	bash data/demo/base.sh

paper-mini: setup          ## the paper's table with SmolLM2-135M on one GPU; call it again to go on
	bash data/paper-mini/paper-mini.sh $(OVERRIDES)

test: setup                ## the laws and all other quick tests
	pytest

test-slow: setup           ## the demo's claims, launched runs, real data
	pytest -m slow

test-gpu: setup            ## what only a GPU can show
	pytest -m gpu

bench-ttft: setup          ## time to the first token, 8B shape, on a GPU (5 minutes)
	blockft bench ttft llama-3-8b --lengths 512,1024,2048,4096,8192,16384,32818 \
	  --out data/results/ttft-llama-3-8b.json --png data/results/ttft-llama-3-8b.png

bench-attention: setup     ## flex against the dense oracle, on a GPU
	blockft bench attention --out data/results/flex.json

lint: setup
	ruff check .
	ruff format --check .
	mypy

format: setup
	ruff format .
	ruff check --fix .

check: lint test

clean:
	rm -rf out .pytest_cache .mypy_cache .ruff_cache
