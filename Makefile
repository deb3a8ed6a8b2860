# make setup | demo | test | test-full | test-faults | compile-all | soak | lint | format
VENV ?= .venv
PYTHON ?= python3
export PYTHON TORCH_INDEX

python := $(VENV)/bin/python
stamp := $(VENV)/.vllm-dsa-setup

.PHONY: setup demo test test-full test-faults compile-all soak lint format
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

# Every planted fault, and the tests that must see it.
test-faults: setup
	$(python) -m pytest -m "not gpu" tests/test_faults.py tests/test_kernel_faults.py $(ARGS)

# An hour of traffic; prints what it measured.
soak: setup
	$(python) examples/soak.py $(ARGS)

# Every shape of the Triton kernels for every chip, with the Triton of this environment and with that of torch 2.11.
compile-all: setup
	$(python) tests/compile_kernels.py --all
	$(python) -m pip install -q --upgrade --no-deps --target build/triton-3.6 triton==3.6.0
	PYTHONPATH=build/triton-3.6 $(python) tests/compile_kernels.py --all

lint: setup
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: setup
	$(python) -m ruff check --fix .
	$(python) -m ruff format .
