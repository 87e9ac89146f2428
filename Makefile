# `make demo` and `make test` do all the set-up themselves; `make` alone lists the verbs.
PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
READY := .venv/.ready
# What the extension is built with has to be there before it; the versions are those of the extra `dev`.
BUILD_PINS := $(shell sed -nE 's/^ *"((setuptools|wheel|pybind11|ninja)==[^"]*)",/\1/p' pyproject.toml)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
SOURCES := setup.py $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help setup check test test-slow quick test-gpu test-deepspeed test-llama-factory test-trainers gpu demo bench bench-repeat tables evidence site wheels sanitize clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: $(READY) $(BIN)/.built  ## .venv with pinned packages, fastdpo in it, its extension built

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "make: needs Python 3.10 or newer, got $$($(PYTHON) -V 2>&1); name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv \
	  || { echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv" >&2; exit 1; }
	@echo "installing the pinned packages into .venv and building the extension: a few minutes, once"
	$(PIP) install --quiet $(BUILD_PINS)
	$(PIP) install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

# A second look at the same build folder: says what was built and what was not, which pip keeps to itself.
$(BIN)/.built: $(READY) $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

check: setup  ## lint, formatting, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_layers.py

test: check  ## every capability, on a machine without a GPU: minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu and not slow' -n $(WORKERS)

# By file, so that what a file's tests start together (ranks, compilers) is started once.
test-slow: setup  ## what is slow by nature: several processes, the demo, distributions, long curves, recorded runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and not gpu' -n $(WORKERS) --dist loadfile

quick: setup  ## one case of each test, planted bugs, and what changed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --quick -n $(WORKERS)

test-gpu: setup  ## the tests that need a GPU, in .venv
	$(BIN)/python -m pytest -m gpu

# DeepSpeed's own setup asks for a torch that is there, so it comes after the others.
$(BIN)/.deepspeed: $(READY)
	$(PIP) install --quiet --no-build-isolation --no-deps $$(sed -nE 's/^ *"((deepspeed|hjson|py-cpuinfo|msgpack|einops)==[^"]*)",/\1/p' pyproject.toml)
	@touch $@

test-deepspeed: setup $(BIN)/.deepspeed  ## what needs DeepSpeed: the hook and the loop under ZeRO, on the CPU, over gloo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed

# LLaMA-Factory wants older libraries than everything else here, so it has an environment of its own.
LLAMA_FACTORY := .venv-llama-factory
$(LLAMA_FACTORY)/.ready: tests/integrations/llama_factory.txt pyproject.toml
	@$(PYTHON) -m venv $(LLAMA_FACTORY)
	$(LLAMA_FACTORY)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps --requirement $<
	@touch $@

test-llama-factory: $(LLAMA_FACTORY)/.ready  ## patch_llama_factory, and patch_trl of TRL 0.24, in an environment of their own
	OMP_NUM_THREADS=1 $(LLAMA_FACTORY)/bin/python -m pytest tests/integrations/test_llama_factory.py \
	  tests/integrations/test_trl_0_24*.py

# Trainers of other times: an environment for each, which has its own libraries and, behind them, those of .venv:
# torch is there once.
TRAINERS := $(patsubst tests/integrations/released/%.txt,.venv-trainers/%/.ready,$(wildcard tests/integrations/released/*.txt))
.venv-trainers/%/.ready: tests/integrations/released/%.txt $(READY)
	@$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps --requirement $<
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/behind.pth"
	@touch $@

test-trainers: setup $(BIN)/.deepspeed $(TRAINERS)  ## released trainers on lazy logits, each in an environment of its own
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integrations/test_released_trainers.py

# Uses the active Python with what it has, no .venv and no network: GPU images bring their own torch. All of it is
# `python -m benchmarks.gpu`, which needs no make. A failed test does not keep the measurements from being made (each
# is checked before it is timed); it does fail the verb. Without nvcc, or where it fails, all else is run, and the
# CUDA contenders show the reason.
#   make gpu                            # all parts: kernels compiled, tests, suites, and their tables and plots
#   make gpu PART=compile               # one part, within 540 s: compile, tests-op, tests-kernels, tests-others, 1 to 7
#   make gpu PART=3 RESULTS=DIR         # into a folder; the same command again goes on with what is left
#   make gpu DRY=1                      # without a GPU: every test and case on one that is not there
#   FASTDPO_COMMIT=$(git rev-parse HEAD) make gpu ...     # on a machine that gets a copy without .git
PART ?=
RESULTS ?=
DRY ?=
gpu:  ## on a machine with a GPU: compile the kernels, run the tests and the benchmarks (PART=..., RESULTS=DIR; DRY=1: without one)
	@$(if $(DRY),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON)) -m benchmarks.gpu \
	  $(if $(PART),--part '$(PART)') $(if $(RESULTS),--results '$(RESULTS)') $(if $(DRY),--dry)

sanitize: setup  ## the C++ kernels for the CPU under AddressSanitizer and UBSan, by their own tests: minutes
	$(BIN)/python -m tests.kernels.sanitized

demo: setup  ## train a small model with DPO on the spot
	$(BIN)/python examples/demo.py

bench: setup  ## that what `make gpu` times runs, on the CPU at tiny sizes, which say nothing about speed: into .benchmarks
	$(BIN)/python -m benchmarks.run op row step accuracy memory --device cpu --preset tiny --results .benchmarks --page .benchmarks

# On a quiet machine: two runs of this version have to agree within the noise that they state, or it exits with 1.
#   make bench-repeat PRESET=small SUITES='op row'
SUITES ?= op row step
PRESET ?= tiny
bench-repeat: setup  ## whether two runs of one version agree within the stated noise (SUITES=..., PRESET=tiny, small, gpu)
	$(BIN)/python -m benchmarks.repeat $(SUITES) --preset $(PRESET)

tables: setup  ## write the tables and plots of README and docs from benchmarks/results
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m fastdpo.training.data.checks_page docs/data.md
	$(BIN)/python -m tests.promises docs/promises.md README.md
	$(BIN)/python -m tests.wrong_calls docs/wrong_calls.md

evidence: setup  ## write docs/evidence.md: what is compiled, counted and simulated without a GPU; minutes
	$(BIN)/python -m benchmarks.evidence

# The site's own tools, beside .venv's: pages are made of docstrings, so the package has to be there.
$(BIN)/.docs: $(READY)
	$(PIP) install --quiet $$(sed -nE 's/^ *"(mkdocs[a-z-]*==[^"]*)",/\1/p' pyproject.toml)
	@touch $@

site: setup $(BIN)/.docs  ## build the documentation as a site, into site/; a link that leads nowhere fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The manylinux wheels are cibuildwheel's, which wants docker: `pipx run cibuildwheel --platform linux`.
wheels: setup  ## an sdist, this machine's wheel without CUDA, and the pure one of macOS and Windows, into dist/
	FASTDPO_CUDA=0 $(BIN)/python -m build --no-isolation --outdir dist .
	FASTDPO_PURE=1 $(BIN)/python -m build --no-isolation --wheel --outdir dist .

clean:  ## remove what was built; .venv stays
	rm -rf build dist site *.egg-info fastdpo/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(BIN)/.built
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
