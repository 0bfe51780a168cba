# `make report` and `make test` do everything on a fresh machine with Python, pip, make and g++.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)
# torch and triton pair: figures counted from compiled kernels depend on both.
PINS := "torch==2.13.0" "triton==3.7.1; sys_platform == 'linux'"
CUDA_VENV := .venv-cuda
CUDA_PINS := "torch==2.14.1"
CUDA_TREE := build/cuda-tree

.PHONY: report test install bench lint test-cuda test-long test-all asan tsan mutants gpu gpu-static clean

report: install  ## train a small model through the ops, benchmark, write build/report/index.md
	$(BIN)/python -m benchmarks.report

test: install  ## every test that needs no GPU; on a machine with one, the same tests on it
	$(BIN)/python -m pytest tests -n 2 --dist worksteal -m "not long"

install: $(VENV)/installed  ## the virtual environment with the package built in place

bench: install  ## the benchmarks alone
	mkdir -p build
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=build/benchmarks.json -p no:logging

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the same sources built with CUDA C++ against a CUDA build of torch, in an environment and a tree of their own.
test-cuda: $(CUDA_VENV)/installed
	rm -rf $(CUDA_TREE) && mkdir -p $(CUDA_TREE)
	cp -r csrc clex_kernels tests setup.py pyproject.toml README.md $(CUDA_TREE)
	rm -f $(CUDA_TREE)/clex_kernels/*.so
	cd $(CUDA_TREE) && ../../$(CUDA_VENV)/bin/python setup.py -q build_ext --inplace
	cd $(CUDA_TREE) && ../../$(CUDA_VENV)/bin/python -m clex_kernels --require-cuda
	cd $(CUDA_TREE) && ../../$(CUDA_VENV)/bin/python -m pytest -n 2 tests/test_frequencies.py tests/test_tables.py tests/test_rotary_table.py \
	  tests/test_table_cache.py tests/test_rotary.py tests/test_rotary_interface.py tests/test_rotary_checks.py tests/test_attention.py \
	  tests/test_attention_cpu.py tests/test_decode.py tests/test_append.py tests/test_qkv_rotary.py \
	  tests/test_qkv_rotary_cpu.py tests/test_cuda_on_host.py

gpu-static: install  ## what is known of GPUs without one, build/gpu_static/index.md; REFRESH=1 keeps its figures
	$(BIN)/python -m benchmarks.gpu_static $(if $(filter 1,$(REFRESH)),--refresh)

gpu:  ## with CUDA, in the environment of PYTHON: check and time every kernel; TUNE=1: choose launch tables
	@$(PYTHON) -c "import torch" || { echo "make gpu: expected a torch with CUDA in the environment of PYTHON=$(PYTHON)"; exit 1; }
	$(PYTHON) -m benchmarks.on_gpu.device
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m clex_kernels --require-cuda || $(PYTHON) setup.py -q build_ext --inplace --force
	$(PYTHON) -m benchmarks.gpu_measured $(if $(filter 1,$(TUNE)),--tune)

test-long: install  ## soak, fuzzing and properties at length
	$(BIN)/python -m pytest tests -n 2 --dist worksteal -m long

asan: install  ## the extension built with ASan and UBSan, under the tests of the CPU
	$(BIN)/python tests/sanitizers/address.py

tsan: install  ## what threads share in csrc, under ThreadSanitizer
	$(BIN)/python tests/sanitizers/thread.py

mutants: install  ## one thing broken at a time, and which tests notice; WORDS="softcap csrc/decode": those alone
	$(BIN)/python -m tests.mutants $(WORDS)

test-all: test lint test-cuda test-long tsan asan mutants  ## all of that

clean:
	rm -rf build clex_kernels/*.so $(VENV) $(CUDA_VENV)

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade setuptools wheel ninja $(PINS)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,bench,lint]"
	$(BIN)/python -m clex_kernels
	touch $@

$(CUDA_VENV)/installed:
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet setuptools wheel ninja $(CUDA_PINS) \
	  "torchdiffeq>=0.2.5" "pytest>=8" "pytest-xdist>=3.6" "scipy>=1.11" "transformers>=5.0" mpmath
	touch $@
