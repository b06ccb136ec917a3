# On a machine with only Python ≥ 3.11, pip and venv: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
# make test EXTRAS=test,recipes also runs the recipes against the libraries that they are for
EXTRAS ?= test
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean
.DEFAULT_GOAL := demo

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/linters: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/crewlog demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typing
	$(BIN)/lint-imports

bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,bench]'
	$(BIN)/python bench/run.py --out figures.jsonl $(ARGS)
	$(BIN)/python bench/page.py figures.jsonl

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
