# Two commands set everything up on a machine with Python 3.11 or later: `make run` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test types fuzz torture docs pages families real clean

run: .venv/ready
	$(BIN)/mechedit run --no-tuned --out run

test: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(MAKE) --jobs 2 types pages
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

# One process, which leaves a core to the documentation.
types: .venv/ready-dev
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Twenty minutes of command lines and files that nobody would write; prints its seed, and FUZZ="--seed N" repeats it.
fuzz: .venv/ready-dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=.:tests \
	    $(BIN)/python -m helpers.fuzz --seconds 1200 $(FUZZ)

# Every command that writes, killed at 25 random moments and given a full disk; KILLS and SEED choose others.
torture: KILLS ?= 25
torture: SEED ?= $(shell date +%s)
torture: .venv/ready-dev
	@echo "seed $(SEED)"
	MECHEDIT_KILLS=$(KILLS) MECHEDIT_SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -rP tests/test_killed.py

# The documentation, with the model that one notebook is about where it can be had.
pages: .venv/ready-dev
	$(BIN)/python -m analyses.real_models.make smollm2 --optional
	$(MAKE) docs

docs: .venv/ready-dev
	rm -rf docs/_build
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -q -j 2 -b html docs docs/_build/html

# Two pretrained models, 333 MB to download, into the cache folder or $MECHEDIT_REAL_MODELS.
real: .venv/ready-dev
	$(BIN)/python -m analyses.real_models.make smollm2 gemma3

# Every model type of transformers through all steps, on two cores in about half an hour; writes docs/reference/models.md.
families: .venv/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.families --jobs 2

# Modules are compiled as they are imported: to compile all 20,000 of them takes a core 50 seconds.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

# In one call, which finds out once what is needed.
.venv/ready-dev: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) -e ".[dev]"
	touch .venv/ready $@

clean:
	rm -rf .venv
