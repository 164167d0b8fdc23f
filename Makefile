PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

.PHONY: demo test test-oldest lint bench

# Each environment is made once, and again when what it is made from changes.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gpu,cli,dev]"
	touch $@

$(OLDEST)/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[gpu,cli,dev]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/python -m fusedact compare mnist-mlp --out runs/demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2

test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -n 2 tests/kernels

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python -m pytest bench --benchmark-only
