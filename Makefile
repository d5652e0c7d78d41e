# Two commands set everything up on a machine with Python 3.11 or later: `make run` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test check clean

run: .venv/ready
	$(BIN)/mechedit run --out run

test: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/pytest -n auto
	OMP_NUM_THREADS=1 $(BIN)/pytest --nbmake --nbmake-timeout=120 notebooks

.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv
