# Everything a contributor runs; CI runs the same targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := src/bitquest/ops/libbitquest.so.1

.PHONY: demo test setup lint types imports native unit clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "BitQuEST needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "Could not create $(VENV). On Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

setup: $(STAMP)  ## make .venv and install the package with everything development needs

demo: $(STAMP)  ## train three small models on real prose, pack, verify, report: demo/report.html
	$(BIN)/bitquest demo --out demo

test: $(STAMP) lint types imports unit  ## what CI runs

lint: $(STAMP)
	$(BIN)/ruff check src tests examples
	$(BIN)/ruff format --check src tests examples

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

$(NATIVE): setup.py $(shell find csrc -type f 2>/dev/null) | $(STAMP)
	@if command -v $${CXX:-g++} >/dev/null; then BITQUEST_NATIVE=require $(BIN)/python setup.py --quiet build_ext --inplace && touch $@; \
	else echo "no C++ compiler here: the native engine is left out, and its tests are skipped"; fi

native: $(STAMP) $(NATIVE)  ## compile the CPU engine anew after a change in csrc

unit: $(STAMP) $(NATIVE)
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
