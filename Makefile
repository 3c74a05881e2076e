# Two commands from a clone to a result: `make demo` trains a model, `make test` checks it.
# Each sets up what it needs, once, in .venv.
#
# PYTHON=/path/to/python uses that Python as it is (torch 2.11 or later installed, nothing is
# downloaded; checks whose tools it lacks are skipped, by name): make test PYTHON=python3

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
SHELL := /bin/bash -o pipefail
export MAX_JOBS ?= $(shell nproc)

ifdef PYTHON
  PY := $(shell command -v $(PYTHON) || echo $(PYTHON))
  SETUP := build/.setup-external
  INSTALL :=
  FRAMEWORKS_PY := $(PY)
  FRAMEWORKS :=
else
  PY := $(CURDIR)/.venv/bin/python
  SETUP := .venv/.setup
  INSTALL := .venv/.installed
  FRAMEWORKS_PY := $(CURDIR)/.venv-frameworks/bin/python
  FRAMEWORKS := .venv-frameworks/.setup
endif

# ninja, cmake, ctest and clang-format come as Python packages, beside the interpreter.
export PATH := $(dir $(PY)):$(PATH)

SOURCES := setup.py $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' \))
EXTENSION := build/.extension
KERNEL_REPO := build/.kernel-repo
CXX_FILES := find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'

# The content of build/.built-for, which changes only when the interpreter or these options do.
BUILT_FOR := $(PY) LLMLOSS_CUDA=$(LLMLOSS_CUDA)$(if $(LLMLOSS_DEBUG), LLMLOSS_DEBUG=$(LLMLOSS_DEBUG))
ifneq ($(shell cat build/.built-for 2> /dev/null),$(BUILT_FOR))
  .PHONY: build/.built-for
endif

# pip in .venv; of the harmless warnings about places to look in, none.
PIP := .venv/bin/python -m pip --disable-pip-version-check
QUIET := 2>&1 | { grep -v '^WARNING: Location' || true; }

# $(1): module or program. Ends the line's command where PYTHON= lacks it: say so and go on.
needs = $(PY) -c "import $(1)" 2> /dev/null || { echo "$(1) is not installed: skipped"; exit 0; }
needs_program = command -v $(1) > /dev/null || { echo "$(1) is not installed: skipped"; exit 0; }

.PHONY: help setup build quick debug demo demo-distributed test test-all test-aarch64 test-frameworks test-torch-211 \
  kernel-repo wheel wheel-test docs check format lint types style cpp-test sanitize fuzz mutants bench \
  bench-readme clean

help:  ## What can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

# torch first: the rest must not choose its version. Versions of the rest: pyproject.toml.
.venv/.setup: pyproject.toml
	@echo "Setting up .venv: torch and the tools (once; a minute or two)"
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make sets up .venv with Python 3.11 or later; name another Python by PYTHON="; exit 1; }
	@python3 -m venv .venv
	@$(PIP) install -q torch==2.13.0 $(QUIET)
	@.venv/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); \
	  extras = p['project']['optional-dependencies']; \
	  print(*p['build-system']['requires'], *sum((v for k, v in extras.items() if k not in ('frameworks', 'peers')), []), sep='\n')" \
	  > .venv/requirements.txt
	@$(PIP) install -q -r .venv/requirements.txt $(QUIET)
	@touch $@

# A second environment, since trainers bring much, on top of the first.
.venv-frameworks/.setup: pyproject.toml .venv/.setup
	@echo "Setting up .venv-frameworks: the trainers (once; a minute or two)"
	@python3 -m venv .venv-frameworks
	@.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$(.venv-frameworks/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth"
	@.venv/bin/python -c "import tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['frameworks'], sep='\n')" \
	  > .venv-frameworks/requirements.txt
	@.venv-frameworks/bin/python -m pip --disable-pip-version-check install -q --no-deps \
	  -r .venv-frameworks/requirements.txt $(QUIET)
	@touch $@

# A third, with the oldest torch that is supported.
.venv-torch-211/.setup: .venv/.setup
	@echo "Setting up .venv-torch-211: torch 2.11 and the tools (once; some minutes, 3 GB)"
	@python3 -m venv .venv-torch-211
	@.venv-torch-211/bin/python -m pip --disable-pip-version-check install -q torch==2.11.0 \
	  -r .venv/requirements.txt $(QUIET)
	@touch $@

build/.setup-external: build/.built-for
	@$(PY) -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11)" 2> /dev/null \
	  || { echo "PYTHON=$(PYTHON) must name a Python that has torch 2.11 or later"; exit 1; }
	@touch $@

build/.built-for:
	@mkdir -p build && echo '$(BUILT_FOR)' > $@

$(EXTENSION): $(SETUP) $(SOURCES) pyproject.toml build/.built-for
	@echo "Building the extension"
	@$(PY) setup.py -q build_ext --inplace > build/extension.log 2>&1 || { cat build/extension.log; exit 1; }
	@grep '^llmloss_ext' build/extension.log || true
	@touch $@

# The `llmloss` command and the package's metadata; re-uses what was built.
.venv/.installed: .venv/.setup pyproject.toml | $(EXTENSION)
	@$(PIP) install -q --no-build-isolation --no-deps -e . $(QUIET)
	@touch $@

setup: $(SETUP)  ## Makes .venv
build: $(EXTENSION) $(INSTALL)  ## Builds the extension in place

debug:  ## Builds it for gdb instead (-O0 -g, assertions), until the next make build
	@$(MAKE) --no-print-directory build LLMLOSS_DEBUG=1

demo: build  ## Trains a small GPT on real text with a vocabulary of 131,072 (under 4 minutes)
	@$(PY) -m llmloss_ext train --out runs/demo --overwrite

# The same small job by one process, then by two in each way that they can share it.
SHARED := -m llmloss_ext train --overwrite --steps 20 --seq-len 64 --max-tokens 40000 --eval-every 10
demo-distributed: build  ## Trains on two processes in three ways, beside one process (under 4 minutes)
	@$(PY) $(SHARED) --out runs/demo-one
	@set -e; for how in ddp fsdp tp; do \
	  OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node 2 \
	    $(SHARED) --parallel $$how --out runs/demo-$$how --compare-to runs/demo-one; done

test: build  ## Style, types, C++ tests, emulated kernels, Python tests (12 minutes)
test-all: build  ## The same and what is slow: sanitizers, mutants of the kernels (half an hour; CI)
test test-all:
	@$(PY) -c "import pytest" 2> /dev/null || { echo "PYTHON=$(PYTHON) has no pytest"; exit 1; }
	@$(PY) tests/side_by_side.py "$(MAKE)" $(if $(filter test-all,$@),--all)

test-frameworks: build kernel-repo $(FRAMEWORKS)  ## The losses inside the trainers that people use (under 8 minutes)
	@OMP_NUM_THREADS=1 $(FRAMEWORKS_PY) -m pytest -q -p no:cacheprovider tests/frameworks

# Not in CI, for which it takes too long. What has nothing to do with torch is left out; the library in
# place is built for this torch, until the next make build.
test-torch-211: .venv-torch-211/.setup  ## The Python tests under torch 2.11, the oldest one supported (20 minutes)
	@$(MAKE) --no-print-directory build PYTHON=$(CURDIR)/.venv-torch-211/bin/python LLMLOSS_CUDA=0
	@OMP_NUM_THREADS=1 .venv-torch-211/bin/python -m pytest -q -p no:cacheprovider \
	  --ignore-glob='*/test_simt_*' --ignore=tests/test_core.py --ignore=tests/frameworks

# Links what was built under another name, which takes seconds.
$(KERNEL_REPO): $(EXTENSION) tools/kernel_repo.py $(shell find llmloss_ext -name '*.py')
	@$(PY) -m tools.kernel_repo --out build/kernel-repo
	@touch $@

kernel-repo: build $(KERNEL_REPO)  ## Lays out build/kernel-repo, for Hugging Face's kernel hub

# These, too, only link what was built.
wheel: build  ## Builds and checks build/dist: a wheel and a source distribution
	@$(PY) -c "import auditwheel" 2> /dev/null || { echo "PYTHON=$(PYTHON) has no auditwheel"; exit 1; }
	@$(PY) -m tools.wheel --out build/dist

# WHEEL_PYTHONS="python3.12 python3.13": others to try it with, each of which has a torch.
wheel-test: wheel  ## Installs the wheel where there is no compiler, and runs what a user runs first
	@$(PY) -m tools.wheel_try $(addprefix --python ,$(WHEEL_PYTHONS))

# Only the package, the committed results and what is installed: no network.
docs: build  ## Builds the documentation as a site, build/docs/index.html (under a minute)
	@$(call needs,sphinx); rm -rf build/docs && OMP_NUM_THREADS=1 $(PY) -m sphinx -q -E -W --keep-going \
	  -c docs -d build/doctrees . build/docs
	@echo "build/docs/index.html"

# The tests that catch most for their time: definitions, values and gradients of every function.
QUICK := tests/test_definitions.py tests/test_cross_entropy.py tests/test_token_stats.py tests/test_inplace.py \
  tests/test_errors.py tests/test_operator_checks.py tests/test_nn.py tests/linear/test_functional.py \
  tests/linear/test_errors.py tests/linear/test_divergence.py tests/losses tests/parallel/test_shard.py \
  tests/cli/test_main.py

quick: lint types build  ## Lint, types and the tests that catch most (under 90 seconds once built)
	@echo "The tests that catch most"; OMP_NUM_THREADS=1 \
	  $(PY) -m pytest -q -x -k "not compil and not data_parallel and not full_disk" $(QUICK)

check: lint types style  ## Lint, types and format, as CI checks them

lint: $(SETUP)  ## Lints the Python code
	@$(call needs,ruff); echo "Lint"; $(PY) -m ruff check -q .

types: $(SETUP)  ## Checks the types of the package
	@$(call needs,mypy); echo "Types"; $(PY) -m mypy --no-error-summary

style: $(SETUP)  ## Checks the format of all code
	@$(call needs,ruff); echo "Format"; $(PY) -m ruff format -q --check .
	@$(call needs_program,clang-format); $(CXX_FILES) | xargs clang-format --dry-run -Werror

format: $(SETUP)  ## Formats all code
	@$(PY) -m ruff format -q . && $(PY) -m ruff check -q --fix .
	@$(CXX_FILES) | xargs clang-format -i

# $(1): build folder, $(2): options, $(3): what else it needs
define ctest
	@$(3) $(call needs_program,cmake); $(call needs_program,ninja); mkdir -p build; \
	  { cmake -S . -B $(1) -G Ninja -DPython_EXECUTABLE=$(PY) $(2) && cmake --build $(1); } > $(1).log 2>&1 \
	    || { cat $(1).log; exit 1; }; \
	  ctest --test-dir $(1) -j $(MAX_JOBS) --output-on-failure --no-tests=error | grep -v '^Internal\|^Test project\|Start '
endef

cpp-test: $(SETUP)  ## C++ tests of the torch-free core and kernels
	@echo "C++ tests"
	$(call ctest,build/core,-DCMAKE_BUILD_TYPE=Release)

# Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user
test-aarch64: $(SETUP)  ## The C++ tests, built for 64-bit Arm and run in an emulator
	@echo "C++ tests for AArch64"
	$(call ctest,build/aarch64,-DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64,\
	  $(call needs_program,aarch64-linux-gnu-g++); $(call needs_program,qemu-aarch64);)

sanitize: $(SETUP)  ## The same under AddressSanitizer and UBSan
	@echo "C++ tests under AddressSanitizer and UBSan"
	$(call ctest,build/sanitize,-DCMAKE_BUILD_TYPE=Debug -DLLMLOSS_SANITIZE=ON)
	@echo "Emulated CUDA kernels under AddressSanitizer and UBSan"
	@$(PY) tests/simt/sanitize.py

# Each run draws its own examples; what it finds becomes a test of its own.
fuzz: build  ## The tests by examples, with new ones each time (ten minutes)
	@LLMLOSS_FUZZ=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -p no:cacheprovider -m "hypothesis and not cuda" tests
	@LLMLOSS_FUZZ=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -p no:cacheprovider tests/cli/test_fuzz.py

mutants: build  ## Makes mutants of the sources, lists those that no test notices (hours; it can be stopped)
	@PYTHONPATH=.:tests $(PY) -m mutants $(MUTANTS)

bench: build  ## Times the losses beside torch and the machine's limits, and writes a report (two minutes)
	@$(PY) -m llmloss_ext bench run --suite quick --out runs/bench --overwrite

bench-readme: demo  ## Measures what README quotes (twenty minutes), and writes it there
	@$(PY) -m llmloss_ext bench run --suite cpu --out bench/results/cpu --overwrite
	@$(PY) -m bench.readme --demo runs/demo

clean:  ## Removes what was built; .venv stays
	rm -rf build dist *.egg-info llmloss_ext/_C*.so .venv/.installed
