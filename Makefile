# Each target sets itself up: an environment of its own in .venv, torch and the extension built from csrc/.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# the release that the CUDA build of this torch brings along
TRITON := triton==3.7.1
RUN ?= runs/demo
GPU_OUT ?= bench/results
GPU_TESTS := tests/triton_kernels tests/ops/test_triton_ops.py tests/test_measuring.py
# Everything that the compiled extension or the list of dependencies depends on; the Python code is installed in place.
BUILD_INPUTS := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench kernels gpu clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 10

demo: $(VENV)/.installed ## train one Multi-Rate VAE on real digits, draw its curve, bake one beta
	$(BIN)/mrvae train --out $(RUN) --force
	$(BIN)/mrvae curve --run $(RUN)
	$(BIN)/mrvae bake --run $(RUN) --beta 0.5 --force
	@echo && echo "One training run, its whole curve, and the plain network at one beta:" && ls -d $(RUN)/*

test: $(VENV)/.developed ## the whole test-suite
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest

lint: $(VENV)/.developed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.developed ## train-step time, gated over ungated (CPU, a few minutes)
	$(BIN)/python -m pytest bench
	$(BIN)/python -m bench.overhead --out bench/results/cpu-overhead.json

kernels: $(VENV)/.developed ## compile every Triton kernel for every target, list registers and spills (no GPU)
	$(BIN)/python -m bench.ahead_of_time --out bench/results/triton-resources.json

# On the GPU with the environment that is there (PYTHON), whose torch and driver fit each other; nothing is installed.
# Kernels are measured whatever the tests said; one that fails, fails the target. What did not fit into the time is listed.
gpu: ## test this machine's GPU kernels, then measure for up to 10 minutes; results in GPU_OUT
	@mkdir -p $(GPU_OUT)
	failed=0; \
	PYTHONPATH=.:models $(PYTHON) -m pytest -q $(GPU_TESTS) -m 'not ahead_of_time' 2>&1 | tee $(GPU_OUT)/tests.log || failed=1; \
	PYTHONPATH=.:models $(PYTHON) -m bench.gpu --out $(GPU_OUT) --prepare $(GPU_FLAGS) || failed=1; \
	exit $$failed

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info mrvae_kernels/*.so

$(VENV)/.torch:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: install Python 3.10 or newer, or say make PYTHON=..."; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit("Python %d.%d is too old: 3.10 or newer is needed; say make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH) setuptools wheel ninja pybind11 numpy
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(BUILD_INPUTS)
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --verbose -e '.[models]' | grep -vE '^  (creating|copying|adding|running|writing|reading|removing|byte-compiling) '
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -e '.[models,test,dev]' $(TRITON)
	touch $@
