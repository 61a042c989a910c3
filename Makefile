# Two commands are enough on a fresh machine: `make demo` and `make test`.
# TORCH pins torch for this set-up only (a CPU build, so that nothing with CUDA is pulled in); the package itself
# declares a range. Use another with e.g. `make demo TORCH=torch`.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test lint types unit build docs setup clean

demo: setup
	$(BIN)/pplug-hf demo --output demo-output

test: setup lint types build docs unit

setup: $(VENV)/ready

$(VENV)/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/basedpyright

build:
	$(BIN)/python -m build --outdir build/dist --quiet

docs: setup
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet docs build/docs
	$(BIN)/python scripts/check_docs.py build/docs

unit:
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build demo-output
