# make setup | demo | test | test-full | lint | format
VENV ?= .venv
PYTHON ?= python3
export PYTHON TORCH_INDEX

python := $(VENV)/bin/python
stamp := $(VENV)/.vllm-dsa-setup

.PHONY: setup demo test test-full lint format
.DEFAULT_GOAL := test

setup: $(stamp)

$(stamp): pyproject.toml scripts/setup.sh scripts/name_vllm.py
	scripts/setup.sh $(VENV)
	@touch $@

demo: setup
	$(python) examples/demo.py

# What CI runs. The rest, some minutes each, is in test-full.
test: setup
	$(python) -m pytest -m "not gpu and not slow" $(ARGS)

test-full: setup
	$(python) -m pytest -m "not gpu" $(ARGS)

lint: setup
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: setup
	$(python) -m ruff check --fix .
	$(python) -m ruff format .
