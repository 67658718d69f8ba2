# Every target works in a fresh clone: it makes .venv, installs what it needs and builds fastcl first. Needs Python >= 3.10 and g++.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench methods remember gpu lint format wheel wheel-check clean
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
FAMILIES := soft_mask importance projection child_mask bit_mask quantile pull optimizers kronecker low_rank
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh') setup.py

help:
	@echo "make demo        build, and show SPG against forgetting on real data (a few minutes)"
	@echo "make test        build, and run the tests"
	@echo "make test-all    the slow ones too"
	@echo "make bench       time the ops on this CPU; rewrites bench/results and README's tables"
	@echo "make methods     train every method on two streams (minutes); rewrites the README's table of methods"
	@echo "make remember    tune and train NCL and its peers (an hour); rewrites the README's findings"
	@echo "make gpu         on a machine with an NVIDIA GPU: build, test, sanitize and time, without a venv"
	@echo "make lint        ruff, mypy, clang-format     make format   apply them"
	@echo "make wheel       a wheel in dist/             make wheel-check   try it under several torch versions (gigabytes)"

$(VENV)/.installed: pyproject.toml Makefile
	@echo "== Python environment in $(VENV) (torch is large: this takes a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=2.13" "ninja>=1.11" build
	FASTCL_NATIVE=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[triton,demo,bench,test,lint]"
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo "== compiling"
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: $(VENV)/.built
	$(BIN)/python examples/spg_permuted_digits.py

# Two processes, a file in one of them; threads that wait for each other must not spin on the cores that they share.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.built
	@echo "== tests"
	$(PYTEST) -m "not slow and not gpu"
	@echo "== the same op tests on the Triton kernels, in Triton's interpreter"
	TRITON_INTERPRET=1 FASTCL_BACKEND=triton $(PYTEST) -m "not slow and not gpu" $(FAMILIES:%=tests/test_%.py)

test-all: $(VENV)/.built
	$(BIN)/python -m pytest

bench: $(VENV)/.built
	$(BIN)/python bench/compare.py --require-green
	$(BIN)/python bench/report.py

methods: $(VENV)/.built
	$(BIN)/python bench/methods.py --require-green
	$(BIN)/python bench/report.py

remember: $(VENV)/.built
	$(BIN)/python -m bench.remember --tune --require-green
	$(BIN)/python -m bench.remember
	$(BIN)/python bench/report.py

gpu:
	$(PYTHON) gpu/check.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/native/*.cpp' 'tests/cuda/*.cpp')

format: $(VENV)/.installed
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/native/*.cpp' 'tests/cuda/*.cpp')

wheel: $(VENV)/.installed
	$(BIN)/python -m build --wheel --no-isolation

wheel-check: wheel
	$(BIN)/python tests/wheel_check.py dist/*.whl

clean:
	rm -rf build dist .venv *.egg-info fastcl/*.so fastcl/_build_info.json
