# Everything runs in .venv, which `make` builds from constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install test test-all lint types demo clean

help:
	@echo "make demo    serve a model larger than its device on this machine, and talk to it"
	@echo "make test    lint, types and tests"
	@echo "make test-all  the same with the long tail (every model, split and tier)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard giantserve/models/native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest -m "not slow"

test-all: lint types
	$(BIN)/pytest

demo: $(STAMP)
	$(BIN)/giantserve demo

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
