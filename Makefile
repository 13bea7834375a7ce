# The virtual environment is made on first use and remade when the dependencies change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check lint clean help

help:
	@echo "make demo    set up and run the demo sweep (no GPU, no download of weights)"
	@echo "make test    set up and run the tests"
	@echo "make check   what CI runs: lint, types, tests"
	@echo "make clean   remove the virtual environment and demo results"

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: $(READY)
	$(BIN)/python -m orchestrator.run sweeps/demo.yaml

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf $(VENV) results/demo
