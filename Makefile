# Everything sets itself up: on a fresh machine `make demo` or `make test` needs nothing but Python 3.11+.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
# The first interpreter that runs and is new enough; `make PYTHON=... venv` chooses another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help venv weights demo test lint types format bench constraints clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

venv: $(VENV)/.installed ## Create .venv with this package and its development tools

$(VENV)/.installed: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.11 or newer was found. Install one, or run: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi
	@echo "Installing into $(VENV) ($$($(PYTHON) --version); the first time this takes some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -e ".[dev]"
	@touch $@

weights: venv ## Fetch and convert the two embedded models (180 MB, once; kept in the user's cache)
	@$(BIN)/persona models pull

demo: weights ## Watch several personas share one model
	@$(BIN)/python examples/demo.py $(ARGS)

lint: venv ## Check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: venv ## Check types
	@$(BIN)/mypy

test: lint types weights ## Check style and types, then run every test (ARGS="-k name" for some)
	@$(BIN)/python -m pytest $(ARGS)

format: venv ## Format the code and fix what can be fixed
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

bench: venv ## Run every benchmark, quick variant
	@$(PIP_INSTALL) -e ".[bench]"
	@for file in benchmarks/[a-z]*.py; do \
		name=$$(basename $$file .py); \
		if grep -q -- '--quick\|harness.arguments' $$file && grep -q '__main__' $$file; then $(BIN)/python -m benchmarks.$$name --quick $(ARGS); fi; \
	done

constraints: venv ## Rewrite constraints.txt with the versions installed in .venv
	@$(PIP_INSTALL) -e ".[dev,bench]"
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --all --exclude pip --exclude-editable \
		| sed -E 's/^(torch==[0-9.]+).*/\1 ; sys_platform == "linux"/'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## Remove caches and build products (not .venv, not the weights)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
