# `make` alone lists what there is. V=1 shows the commands. Everything is made in .venv and
# build/; Debian packages that are missing are installed when this runs as root.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory
# Each worker would else compile all tests anew, and each program all of flannel_dp.
export PYTHONDONTWRITEBYTECODE :=

VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# Four times as many workers as processors, because most of the time a test waits; more than eight
# only wait for the kernel's lock.
PROCESSORS := $(shell nproc)
WORKERS := --workers $(shell echo $$((4 * $(PROCESSORS) > 8 ? 8 : 4 * $(PROCESSORS))))
FUZZ_RUNS ?= 2000000
SEED := $(or $(SEED),$(shell echo $$((RANDOM << 15 | RANDOM))))
BENCH_NAME ?= $(shell git describe --always --dirty 2>/dev/null || echo local)
BENCH_FLAGS := --benchmark-only --benchmark-disable-gc --timeout=600

V ?= 0
ifeq ($(V),1)
PIP := $(BIN)/python -m pip install --disable-pip-version-check
else
Q := @
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
PYTEST += -q
endif

CORE := setup.py pyproject.toml $(wildcard csrc/*.[ch] csrc/cython/*.pxi flannel_dp/*.pyx \
        flannel_dp/*.pxd)
CFLAGS := -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror

.PHONY: help build tools test check test-random demo demo-modes lint types warnings bench bench-full bench-plot bench-smoke bench-count soak fuzz coverage \
        docs screens man completion dist clean root

help: ## list the targets
	@echo "flannel-dp: what make can do here"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16
	@echo "V=1 shows the commands; PYTEST_ADDOPTS adds options to pytest's."

$(VENV)/.packages-%: scripts/bootstrap pyproject.toml
	$(Q)scripts/bootstrap $(VENV) $*
	@touch $@

.PRECIOUS: $(VENV)/.packages-%

# In compat mode the environment gets a path; else an import hook, which slows every start.
$(VENV)/.built: $(VENV)/.packages-run $(CORE)
	@echo "compiling flannel_dp (C and Cython, about a minute)"
	$(Q)$(PIP) --no-build-isolation --no-deps \
		--config-settings editable_mode=compat --editable . </dev/null
	@touch $@

build: $(VENV)/.built ## install what is missing, compile, set up .venv/bin/flannel-dp

tools: $(VENV)/.packages-test build ## the same, with all that tests and linters need

# Tests are compiled when they are collected; where none is yet, another process takes half of them.
test: root tools ## run all tests (makes network namespaces, so as root)
	$(Q)[ -d tests/unit/__pycache__ ] || $(PYTEST) --collect-only tests/unit tests/sources >/dev/null & \
		$(PYTEST) $(WORKERS)

check: root tools ## between two edits, in less than a minute: unit tests, one test of every other file, lint
	$(Q)$(BIN)/ruff check -q .
	$(Q)$(BIN)/ruff format -q --check .
	$(Q)if ! git diff --quiet HEAD -- flannel_dp; then $(BIN)/mypy --strict flannel_dp | tail -n 5; fi
	$(Q)$(PYTEST) $(WORKERS) --one-each --ignore=tests/fuzz --ignore-glob='*adversity*' \
		--ignore=tests/test_packaging.py --ignore-glob='tests/unit/test_bench_*'

test-random: root tools ## property tests and random edits with new examples; SEED=... repeats a run
	@echo "seed $(SEED) (make test-random SEED=$(SEED) repeats this run)"
	$(Q)FLANNEL_DP_SOAK_SEED=$(SEED) FLANNEL_DP_SOAK_ROUNDS=15 $(PYTEST) $(WORKERS) -k "hypothesis or soak" \
		--hypothesis-profile=random --hypothesis-seed=$(SEED)

demo: root build ## three hosts in network namespaces, their pods talking through the overlay
	$(Q)scripts/demo $(BIN)/flannel-dp

demo-modes: root $(VENV)/.packages-modes build ## host-gw, VxLAN and DirectRouting, with a router and pods by CNI plugins
	$(Q)scripts/demo-modes $(BIN)/flannel-dp

lint: tools ## ruff, its formatter, cython-lint, and the direction of imports
	$(Q)$(BIN)/ruff check -q .
	$(Q)$(BIN)/ruff format -q --check .
	$(Q)PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cython-lint flannel_dp/*.pyx flannel_dp/*.pxd csrc/cython/*.pxi
	$(Q)$(PYTEST) tests/unit/test_imports.py

types: tools ## mypy --strict for the package and the examples
	$(Q)$(BIN)/mypy --strict flannel_dp
	$(Q)for file in examples/*.py; do $(BIN)/mypy --strict "$$file"; done

warnings: build ## compile C and Cython with every warning an error
	$(Q)mkdir -p build/warnings
	$(Q)for file in csrc/*.c; do gcc $(CFLAGS) -c -o build/warnings/$$(basename $$file .c).o $$file; done
	$(Q)FLANNEL_DP_DEBUG=strict $(BIN)/python setup.py -q build_ext \
		--build-lib build/warnings --build-temp build/warnings </dev/null

bench: root tools ## the main figures against floor and peers, ten minutes; bench/results/ keeps them
	$(Q)$(PYTEST) bench $(BENCH_FLAGS) -m "not full" \
		--benchmark-json=bench/results/$(BENCH_NAME).json

bench-full: root tools ## all sizes and peers, an hour
	$(Q)$(PYTEST) bench $(BENCH_FLAGS) --benchmark-json=bench/results/$(BENCH_NAME)-full.json

bench-plot: tools ## pictures of the newest results, in docs/figures
	$(Q)$(BIN)/python -m bench.plot --out docs/figures

bench-smoke: root tools ## the part of it that takes less than a minute
	$(Q)$(PYTEST) bench $(BENCH_FLAGS) -m smoke

bench-count: tools ## count the instructions of the hot loops, and compare with the baseline
	$(Q)$(BIN)/python -m bench.instructions

soak: root tools ## two agents with a hostile etcd and a hostile API server, an hour (SOAK=60 seconds, SEED=...)
	$(Q)$(BIN)/python -m bench.soak --seconds $(or $(SOAK),3600) --seed $(SEED)

fuzz: root tools ## fuzz the C core and its Python API under sanitizers, answers and documents (FUZZ_RUNS=2000000)
	$(Q)FLANNEL_DP_FUZZ_RUNS=$(FUZZ_RUNS) $(PYTEST) tests/fuzz --timeout=0

coverage: root tools ## run all tests and print which lines they miss
	$(Q)FLANNEL_DP_TEST_PROCESSES=real $(BIN)/python -m coverage run --source=flannel_dp -m pytest -q
	$(Q)$(BIN)/python -m coverage report --show-missing --skip-covered

docs: tools ## the pages as a site, in build/site; every warning is an error
	$(Q)$(BIN)/mkdocs build --quiet --strict

screens: root tools ## what the command shows on terminals, docs/screens, and the pages with it
	$(Q)$(PYTEST) -q tests/kernel/test_screens.py --write-screens

man: build ## the manual pages, packaging/man, from the texts of --help
	$(Q)$(BIN)/python scripts/manual.py man

completion: build ## the files for completion in bash, zsh and fish, packaging/completion
	$(Q)$(BIN)/python scripts/manual.py completion

dist: tools ## dist/: a source archive, and a wheel built from it
	$(Q)rm -rf dist
	$(Q)$(BIN)/python scripts/dist.py dist

clean: ## remove all that was made, .venv too
	$(Q)rm -rf .venv build dist *.egg-info flannel_dp/_core.c flannel_dp/*.so .coverage \
		.benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache bench/build \
		tests/fuzz/build
	$(Q)find . -name __pycache__ -prune -exec rm -rf {} +

root:
	@[ "$$(id -u)" = 0 ] || { \
		echo "This makes network namespaces and needs root: sudo make $(MAKECMDGOALS)" >&2; \
		exit 1; }
