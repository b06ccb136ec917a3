# On a machine with only Python ≥ 3.11, pip and venv: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
# make test-all EXTRAS=test,recipes also runs the recipes against the libraries that they are for
EXTRAS ?= test
BIN := $(VENV)/bin

.PHONY: demo test test-all lint bench picture clean
.DEFAULT_GOAL := demo

# what was installed with these extras: demo, then test with more of them, installs the rest
$(VENV)/installed-%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

demo: $(VENV)/installed-$(EXTRAS)
	$(BIN)/crewlog demo

# what every change needs, in three minutes; three processes, for tests wait more than they compute
test: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m pytest -q -n 3 --dist worksteal -m 'not soak and not long'

# everything; what is skipped for want of a program is listed at the end
test-all: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m pytest -q -n 3 --dist worksteal -m 'not soak and not alone'
	$(BIN)/python -m pytest -q -m alone

lint: $(VENV)/installed-test,lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typing
	$(BIN)/lint-imports

bench: $(VENV)/installed-test,bench
	$(BIN)/python bench/run.py --out figures.jsonl $(ARGS)
	$(BIN)/python bench/page.py figures.jsonl

# docs/picture.svg, from the real demo
picture: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python docs/picture.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
