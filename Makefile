# Two commands from a clone to a result: `make demo` trains a model, `make test` runs every check.
# Each sets up what it needs, once, in .venv.
#
# PYTHON=/path/to/python uses that Python as it is (torch 2.11 or later installed, nothing is
# downloaded): make test PYTHON=python3

.DEFAULT_GOAL := help
SHELL := /bin/bash -o pipefail
JOBS := $(shell nproc)
export MAX_JOBS ?= $(JOBS)

ifdef PYTHON
  PY := $(shell command -v $(PYTHON))
  SETUP := build/.setup-external
else
  PY := $(CURDIR)/.venv/bin/python
  SETUP := .venv/.setup
endif

# ninja, cmake and ctest come with the tools.
export PATH := $(dir $(PY)):$(PATH)

SOURCES := setup.py $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' \))
EXTENSION := build/.extension
BUILD_TOOLS := setuptools wheel ninja cmake
TOOLS := numpy pybind11 pytest hypothesis ruff mypy clang-format rich matplotlib mistral-common

CXX_FILES := find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
# With PYTHON= some tools may be missing: say so and go on.
needs = $(PY) -c "import $(1)" 2> /dev/null || { echo "$(1) is not installed: skipped"; exit 0; }

.PHONY: help setup build demo test check format lint types style cpp-test sanitize bench clean

help:  ## What can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.venv/.setup: pyproject.toml
	@echo "Setting up .venv: torch and the tools (once; about a minute)"
	@python3 -m venv .venv
	@.venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 2>&1 | { grep -v '^WARNING: Location' || true; }
	@.venv/bin/python -m pip install -q --disable-pip-version-check $(BUILD_TOOLS) $(TOOLS) 2>&1 | { grep -v '^WARNING: Location' || true; }
	@touch $@

build/.setup-external:
	@$(PY) -c "import torch" || { echo "$(PY) has no torch: install torch 2.11 or later in it"; exit 1; }
	@mkdir -p build && touch $@

$(EXTENSION): $(SETUP) $(SOURCES) pyproject.toml
	@echo "Building the extension"
	@mkdir -p build
	@$(PY) setup.py -q build_ext --inplace > build/extension.log 2>&1 || { cat build/extension.log; exit 1; }
	@grep '^llmloss_ext' build/extension.log || true
	@touch $@

setup: $(SETUP)  ## Makes .venv
build: $(EXTENSION)  ## Builds the extension in place

demo: build  ## Trains a small GPT on real text with a vocabulary of 131,072 (under 4 minutes)
	@$(PY) -m llmloss_ext train

test: check build cpp-test sanitize  ## Every check: style, types, C++ tests, Python tests
	@$(PY) -m pytest -q

check: lint types style  ## Lint, types and format, as CI checks them

lint: $(SETUP)  ## Lints the Python code
	@$(call needs,ruff); $(PY) -m ruff check -q .

types: $(SETUP)  ## Checks the types of the package
	@$(call needs,mypy); $(PY) -m mypy

style: $(SETUP)  ## Checks the format of all code
	@$(call needs,ruff); $(PY) -m ruff format -q --check .
	@$(call needs,clang_format); $(CXX_FILES) | xargs $(PY) -m clang_format --dry-run -Werror

format: $(SETUP)  ## Formats all code
	@$(PY) -m ruff format -q . && $(PY) -m ruff check -q --fix .
	@$(CXX_FILES) | xargs $(PY) -m clang_format -i

# $(1): build folder, $(2): options
define ctest
	@$(call needs,cmake); mkdir -p build; \
	  { cmake -S . -B $(1) -G Ninja -DPython_EXECUTABLE=$(PY) $(2) && cmake --build $(1); } > $(1).log 2>&1 \
	    || { cat $(1).log; exit 1; }; \
	  ctest --test-dir $(1) -Q --output-on-failure --output-log $(1).tests --no-tests=error
endef

cpp-test: $(SETUP)  ## C++ tests of the torch-free core and kernels
	$(call ctest,build/core,-DCMAKE_BUILD_TYPE=Release)

sanitize: $(SETUP)  ## The same under AddressSanitizer and UBSan
	$(call ctest,build/sanitize,-DCMAKE_BUILD_TYPE=Debug -DLLMLOSS_SANITIZE=ON)

bench: build  ## Times the losses against torch (about two minutes)
	@$(PY) -m bench

clean:  ## Removes what was built; .venv stays
	rm -rf build dist *.egg-info llmloss_ext/_C*.so
