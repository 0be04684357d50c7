# Each target sets itself up: an environment of its own in .venv, torch and the extension built from csrc/.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# its build with CUDA, which three signs tell from 2.13.0+cpu; it is compiled and linked against, which needs no GPU
CUDA_VENV := .venv-cuda
CUDA_BIN := $(CUDA_VENV)/bin
CUDA_TORCH := torch===2.13.0
# the release that the CUDA build of this torch brings along
TRITON := triton==3.7.1
RUN ?= runs/demo
# processes that share the tests, a file each: one with both cores takes almost twice as long
TEST_PROCESSES ?= 2
GPU_OUT ?= bench/results
CUDA_LISTING ?= bench/results/cuda-resources.json
GPU_TESTS := tests/test_gpu.py tests/cuda_core/test_cuda_products.py tests/ops tests/triton_kernels tests/test_measuring.py
# of the whole target, 9 minutes: of what build, tests and sanitizer leave, two minutes at least, bench.gpu and
# bench.overhead get two fifths each and bench.growth one; each lists what it left out
GPU_SECONDS ?= 540
GPU_TEST_SECONDS ?= 170
# remembers for which GPUs was built: another list builds anew
empty :=
CUDA_TARGETS := $(CUDA_VENV)/.targets-$(subst $(empty) ,-,$(subst ;,-,$(or $(TORCH_CUDA_ARCH_LIST),default)))
# where the benchmarks' result files go; make bench-check measures anew, by the committed file's command, and compares
RESULTS := bench/results
CHECK_OUT := build/bench
# Everything that the compiled extension or the list of dependencies depends on; the Python code is installed in place.
BUILD_INPUTS := setup.py build_support.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench bench-check kernels cuda environments gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

demo: $(VENV)/.installed ## train one Multi-Rate VAE on real digits, draw its curve, bake one beta
	$(BIN)/mrvae train --out $(RUN) --force
	$(BIN)/mrvae curve --run $(RUN)
	$(BIN)/mrvae bake --run $(RUN) --beta 0.5 --force
	@echo && echo "One training run, its whole curve, and the plain network at one beta:" && ls -d $(RUN)/*

test: $(VENV)/.developed ## the whole test-suite
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: $(VENV)/.developed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.developed ## what gating costs on this CPU, for some minutes: result files, docs/benchmarks.md, README
	$(BIN)/python -m pytest bench
	$(BIN)/python -m bench.overhead --seconds 220 --out $(RESULTS)/cpu-overhead.json
	$(BIN)/python -m bench.growth --seconds 60 --out $(RESULTS)/cpu-growth.json
	$(BIN)/python -m bench.curve_cost --epochs 5 --out $(RESULTS)/cpu-curve-cost.json
	$(BIN)/python -m bench.layers --seconds 40 --out $(RESULTS)/cpu-layers.json
	$(BIN)/python -m bench.report --results $(RESULTS)
	$(BIN)/python -m bench.report --results $(RESULTS) --readme

# Ends with an error, of which bench.check says the code: 1, a slowdown; 2, nothing, or not everything, was compared, as
# on another kind of machine; 3, most of it is too uncertain to say.
bench-check: $(VENV)/.developed ## measure the train steps again and compare with the committed ones of this machine's kind
	$(BIN)/python -m bench.check $(RESULTS)/cpu-overhead.json
	$(BIN)/python -m bench.overhead --like $(RESULTS)/cpu-overhead.json --out $(CHECK_OUT)/cpu-overhead.json
	$(BIN)/python -m bench.check $(RESULTS)/cpu-overhead.json $(CHECK_OUT)/cpu-overhead.json

kernels: $(VENV)/.developed ## compile every Triton kernel for every target, list registers and spills (no GPU)
	$(BIN)/python -m bench.ahead_of_time --out bench/results/triton-resources.json

# Compiled once: the listing reads the objects that the build leaves in build/objects.
cuda: $(CUDA_VENV)/.built ## compile the CUDA kernels, link and import the core, list registers and spills (no GPU)
	@cd / && $(CURDIR)/$(CUDA_BIN)/python -m mrvae_kernels.doctor | grep '^CUDA core  *built' || \
		{ $(CURDIR)/$(CUDA_BIN)/python -m mrvae_kernels.doctor | grep ' core  '; exit 1; }
	$(CUDA_BIN)/python -m bench.cuda_resources --out $(CUDA_LISTING)

environments: $(VENV)/.torch ## install with and without compilers, nvcc and a CUDA torch, from sources, sdist and wheel
	$(BIN)/python tests/environments.py $(if $(wildcard $(CUDA_BIN)/python),--cuda-python $(CUDA_BIN)/python)

# On the GPU with the environment that is there (PYTHON), whose torch and driver fit each other; nothing is installed:
# where there is an nvcc the core is built in place, in mrvae_kernels/. Each step runs whatever the ones before it said;
# one that fails, fails the target. What did not fit into the time is listed.
gpu: ## build, test, sanitize and measure this machine's GPU kernels, 9 minutes; results in GPU_OUT
	@mkdir -p $(GPU_OUT)
	@export PYTHONPATH=.:models; failed=0; end=$$(($$(date +%s) + $(GPU_SECONDS))); \
	$(PYTHON) -m bench.gpu_build 2>&1 | tee $(GPU_OUT)/build.log || failed=1; \
	$(PYTHON) -m bench.gpu_tests --seconds $(GPU_TEST_SECONDS) $(GPU_TESTS) 2>&1 | tee $(GPU_OUT)/tests.log || failed=1; \
	$(PYTHON) -m bench.gpu_sanitize 2>&1 | tee $(GPU_OUT)/sanitizer.log || failed=1; \
	left=$$((end - $$(date +%s) - 30)); [ $$left -gt 120 ] || left=120; fifth=$$((left / 5)); \
	$(PYTHON) -m bench.gpu --out $(GPU_OUT) --prepare --seconds $$((2 * fifth)) $(GPU_FLAGS) || failed=1; \
	name=$$($(PYTHON) -c 'import torch; print(torch.cuda.get_device_name().lower())' | tr ' ' '-') || name=gpu; \
	$(PYTHON) -m bench.overhead --device cuda --modes eager compiled graph inference --numbers float32 tf32 bfloat16 \
		--seconds $$((2 * fifth)) --out "$(GPU_OUT)/$$name-overhead.json" || failed=1; \
	$(PYTHON) -m bench.growth --device cuda --seconds $$fifth --out "$(GPU_OUT)/$$name-growth.json" || failed=1; \
	exit $$failed

clean: ## remove the environment and everything built
	rm -rf $(VENV) $(CUDA_VENV) build dist *.egg-info mrvae_kernels/*.so

$(CUDA_VENV)/.torch:
	@$(PYTHON) build_support.py  # before 5 GB are downloaded: is there an nvcc?
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/python -m pip install --disable-pip-version-check $(CUDA_TORCH) setuptools wheel ninja pybind11 numpy
	touch $@

$(CUDA_TARGETS): $(CUDA_VENV)/.torch
	rm -f $(CUDA_VENV)/.targets-*
	touch $@

# not in place: mrvae_kernels/ holds the extension of $(VENV)
$(CUDA_VENV)/.built: $(CUDA_VENV)/.torch $(CUDA_TARGETS) $(BUILD_INPUTS) $(shell find mrvae_kernels -name '*.py')
	MRVAE_CUDA=1 $(CUDA_BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall .
	touch $@

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
