# The developer's verbs. PYTHON picks the interpreter that the environment is made from; VENV= (empty) uses the active one.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
SHELL  := /bin/bash

ifeq ($(VENV),)
PY := $(PYTHON)
INSTALLED := build/.installed
PY_READY  :=
else
PY := $(VENV)/bin/python
export PATH := $(abspath $(VENV)/bin):$(PATH)
INSTALLED := $(VENV)/.installed
PY_READY  := $(PY)
endif

# Processes that share the tests: one per core; a single one where there is a GPU, whose memory and time some tests measure.
WORKERS ?= $(shell command -v nvidia-smi >/dev/null && echo 1 || nproc)

# Verbs that install nothing run in the environment as it is: $(VENV) where it exists, else the active interpreter.
AS_IS = $(shell test -x $(PY) && echo $(PY) || echo $(PYTHON))

# The toolkit behind nvcc (which may be a wrapper); empty where there is none.
CUDA    := $(shell command -v nvcc >/dev/null && realpath "$$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^\#\$$ TOP=//p')")
NATIVE  := CMakeLists.txt setup.py pyproject.toml $(wildcard cmake/*) $(shell find csrc -type f)
FORMATS := $(shell find csrc preprocess/kernels tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help install build test test-cuda lint types fmt bench sanitize gpu-check demo headers-2.11 ptxas clean
help:  ## this list
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED)  ## environment, torch (the CPU build where there is no GPU) and this package

ifneq ($(VENV),)
$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "widedeep needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
endif

# Without a GPU the small CPU build of torch is asked of its own index first; where that cannot be reached, pip's default decides.
$(INSTALLED): $(NATIVE) | $(PY_READY)
	@$(PY) -c 'import torch' 2>/dev/null || { command -v nvidia-smi >/dev/null && $(PY) -m pip install -q "$(TORCH)"; } \
	  || $(PY) -m pip install -q --retries 0 --timeout 20 --index-url https://download.pytorch.org/whl/cpu "$(TORCH)" 2>/dev/null \
	  || $(PY) -m pip install -q "$(TORCH)"
	@test -z "$(CUDA)" || test -e "$(CUDA)/include/cublasLt.h" || $(PY) -m pip install -q --no-deps 'nvidia-cublas>=13,<14'
	$(PY) -m pip install -q --group build -e '.[test]'
	@mkdir -p $(dir $@) && touch $@

build:  ## compile the kernels in place with the tools already installed (no network)
	$(AS_IS) -m pip install -q --no-build-isolation --no-deps -e .

test: $(INSTALLED)  ## the whole suite; what needs a GPU is skipped by name where there is none
	$(PY) -m pytest $(if $(filter-out 0 1,$(WORKERS)),-n $(WORKERS) --maxprocesses 8 --dist worksteal)

test-cuda:  ## the GPU tests alone, with the environment as it is
	$(AS_IS) -m pytest -m cuda

lint: $(PY_READY)  ## ruff and clang-format, changing nothing
	$(PY) -m pip install -q --group lint
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	clang-format --dry-run --Werror $(FORMATS)

# Without PYTHONPATH: what lies there mypy takes for installed packages, of which it reports nothing.
types: $(INSTALLED)  ## mypy over the packages and the benches
	$(PY) -m pip install -q --group types
	env -u PYTHONPATH $(PY) -m mypy

fmt: $(PY_READY)  ## rewrite the sources as lint wants them
	$(PY) -m pip install -q --group lint
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .
	clang-format -i $(FORMATS)

HEADERS_2_11 := build/torch-2.11
headers-2.11: $(PY_READY)  ## compile-check the bindings against the headers of the oldest supported torch
	@test -d $(HEADERS_2_11)/torch || { $(PY) -m pip download -q torch==2.11.0 --no-deps -d $(HEADERS_2_11) \
	  && $(PY) -m zipfile -e $(HEADERS_2_11)/torch-2.11.0-*.whl $(HEADERS_2_11) && rm $(HEADERS_2_11)/*.whl; }
	@for source in csrc/bindings/schema.cpp csrc/bindings/*_cpu.cpp $(if $(CUDA),csrc/bindings/*_cuda.cpp); do \
	  $(CXX) -std=c++20 -fsyntax-only -Wall -Wextra -Wno-unused-parameter -DTORCH_TARGET_VERSION=0x020b000000000000 -DUSE_CUDA \
	    -isystem $(HEADERS_2_11)/torch/include -isystem "$(CUDA)/include" \
	    -Icsrc $$source || exit 1; done && echo "the bindings compile against torch 2.11"

bench:  ## the op families of a step by pytest-benchmark, with GB/s and TFLOP/s; on a GPU also each kernel beside its target
	$(AS_IS) -m pytest bench/bench_*.py --benchmark-columns=median,iqr,rounds -q
	@! $(AS_IS) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || $(AS_IS) -m bench.budget

sanitize:  ## build, then compute-sanitizer over small cases of all kernels (needs a GPU)
	$(AS_IS) -m bench.gpu_check --seconds 3600 --only build loads memcheck racecheck initcheck

gpu-check:  ## build, tests, sanitizer and benches on a GPU machine, in less than nine minutes; one table at the end
	$(AS_IS) -m bench.gpu_check

ptxas:  ## registers of every CUDA kernel of the last build; fails when one spills
	$(AS_IS) cmake/ptxas_report.py build

demo: $(INSTALLED)  ## synthetic Outbrain -> preprocess -> train -> report, in a few minutes on a laptop
	$(PY) -m bench.demo --out runs/demo

clean:  ## forget every build and environment
	rm -rf build $(VENV) widedeep/*.so *.egg-info
