# Only Python >= 3.11 and make are needed; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install install-dev demo test lint services docs clean

help:
	@echo "make demo      train and evaluate the cascade on the built-in shop log, offline"
	@echo "make test      lint, types, import contracts, all tests"
	@echo "make lint      ruff, mypy and the import contracts alone"
	@echo "make docs      regenerate the generated pages and build the site into site/"
	@echo "make clean     remove .venv and caches"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-baselines

# ALS and LambdaMART of the demo's tables, small wheels; where there are none for this machine the demo goes without and says so.
$(VENV)/.installed-baselines: $(VENV)/.installed
	@$(BIN)/pip install --quiet --only-binary implicit,lightgbm --constraint constraints.txt --editable '.[baselines]' \
	  && touch $@ || echo "No ALS and LambdaMART: their libraries can not be installed here."

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

demo: install $(VENV)/.installed-baselines
	$(BIN)/shortlist demo

lint: install-dev
	$(BIN)/ruff check src tests evidence benchmarks
	$(BIN)/ruff format --check src tests evidence benchmarks
	$(BIN)/lint-imports
	$(BIN)/mypy

# PostgreSQL and Redis for the tests; without them and without the rights to install them, some tests are skipped.
services: install-dev
	@$(BIN)/python tests/services.py

test: lint services
	$(BIN)/pytest -n 2 --dist worksteal

docs: install-dev
	$(BIN)/shortlist prove --page docs/evidence.md
	$(BIN)/shortlist systems --pages docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
